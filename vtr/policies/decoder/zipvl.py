"""ZipVL (He et al., ICCV 2025, arXiv 2410.08584): in every layer attention among the tokens that carry most of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn

import torch

from vtr.base import Attend, LayerAttention, Policy, Tokens
from vtr.checks import check_count, check_number, check_on_continue
from vtr.keep import top
from vtr.settings import register_policy


def probe_rows(n: int, recent: int, drawn: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [min(recent + drawn, n)], ascending: the last ``recent`` of ``n`` tokens, and some drawn before them."""
    rest = max(n - recent, 0)
    return torch.cat([torch.randperm(rest, generator=generator)[:drawn].sort().values, torch.arange(rest, n)])


def fewest(sums: torch.Tensor, tau: float, probes: int) -> int:
    """How many of the largest ``sums`` ([n], attention received from ``probes`` rows) hold the share ``tau`` of it.

    In float64: near 1 the rounding of float32 would count more tokens or fewer. Waits for the device.
    """
    held = sums.double().sort(descending=True).values.cumsum(0) >= tau * probes - 1e-9
    return min(int((~held).sum()) + 1, len(sums))


def normalised(sums: torch.Tensor, probes: torch.Tensor, among: Literal["probes", "all"] = "probes") -> torch.Tensor:
    """float32 [n]: ``sums`` by how many rows may see a token: of the ``probes`` (int64 [r], ascending), or of all."""
    at = torch.arange(len(sums), device=sums.device)
    if among == "all":
        return sums / (len(sums) - at)
    return sums / (len(probes) - torch.searchsorted(probes.to(sums.device), at)).clamp_min(1)


@register_policy("zipvl")
@dataclass
class ZipVL(Policy):
    """In each layer attention and cache are for those tokens alone that get most of the attention; none is gone.

    A few probe rows say how much attention each token gets in the layer about to run. Of these sums the fewest that
    hold the share ``tau`` say how many tokens take part, so layers and questions get budgets of their own; which ones,
    the sums say after each is divided by the number of probes that can see the token. Those tokens alone are queries
    and keys, at their positions, and only they are cached. The others have the layer's MLP and are candidates again in
    the next layer.

    Training-free. He et al., ICCV 2025, arXiv 2410.08584 (version 2; version 1 quantised the cache). No official code
    can be had, so this follows the paper's equations, and where they leave something open it is decided here: one set
    of tokens per layer, by the mean over heads; the MLP runs for all tokens; under probes the attention of which
    ``tau`` is a share is that of the probe rows; all text takes part (``scope="vision"``: in the paper text can lose
    its place as well, the last token too); nothing is decided again while decoding, and what is decoded is cached
    everywhere; the quantiser of version 1 is left out. The device is waited for once per layer and row: how many stay
    is known there.

    Args:
        tau: share of the probes' attention that the tokens that take part hold, in (0, 1]; 1.0 changes nothing.
        recent, drawn: how many probe rows there are: the prompt's last tokens, and random ones of the others.
        scope: "vision": all text takes part; "all": text too takes part only if it is among the best.
        normalise: "probes" divides a token's sum by the probes that can see it; "all" by all tokens that can (as in the
            authors' earlier ZipCache), which favours late tokens.
        kv: "evict": what does not take part in a layer is not in its cache. There is nothing else to choose.
        seed: of the random probes.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    tau: float = 0.975
    recent: int = 64
    drawn: int = 64
    scope: Literal["vision", "all"] = "vision"
    normalise: Literal["probes", "all"] = "probes"
    kv: Literal["evict"] = "evict"
    seed: int = 0
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < check_number(self.tau, "tau") <= 1:
            raise ValueError(f"tau={self.tau!r}: a share of attention lies in (0, 1]")
        check_count(self.recent, "recent", 1, 2**20)
        check_count(self.drawn, "drawn", 0, 2**20)
        for name, known in {"scope": ("vision", "all"), "normalise": ("probes", "all")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.kv != "evict":
            raise ValueError(f"kv={self.kv!r}: the cache is not quantised here, choose 'evict'")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or abs(self.seed) > 2**50:
            raise ValueError(f"seed={self.seed!r}: an int of at most 50 bits")
        check_on_continue(self.on_continue)

    def entering(self, num_hidden_layers: int, total: int) -> NoReturn:
        """Raises ValueError: how many tokens take part depends on the picture and the question."""
        raise ValueError(f"how many tokens {self.spec} lets take part in a layer is not known before it runs")

    def important(self, sums: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
        """int64 [p], ascending: the tokens of a prompt that are to take part.

        Args:
            sums: float32 [n], attention that each gets from the probe rows. probes: int64 [r], ascending.
        """
        return top(normalised(sums, probes, self.normalise), fewest(sums, self.tau, len(probes)))

    def attend(self, layer: int, tokens: Tokens, attention: LayerAttention) -> Attend | None:
        place = torch.cat([tokens.place, tokens.text_place])
        place, number = place.sort()  # the prompt's tokens in their order; what has been decoded stands behind them
        probes = probe_rows(len(place), self.recent, self.drawn, tokens.generator(self.seed)).to(place.device)
        best = number[self.important(attention.received(place[probes])[place], probes)]
        vision, n = best[best < len(tokens)].sort().values, len(tokens)
        text = best[best >= n].sort().values - n if self.scope == "all" else None
        return Attend(vision, vision, text)
