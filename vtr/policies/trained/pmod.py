"""p-MoD (Zhang et al., ICCV 2025, arXiv 2412.04449): each layer's router chooses which vision tokens pass it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from vtr.base import Best, Route, Tokens
from vtr.checks import check_count, check_number
from vtr.keep import keep_count
from vtr.learned import Learned
from vtr.limits import MOST_LAYERS
from vtr.schedule import progressive
from vtr.settings import register_policy

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(-1),
    "none": lambda z: z,
}


class Routers(nn.Module):
    """One Linear(hidden_size → 1) a routed layer, zero at first: every token then weighs 1."""

    def __init__(self, hidden_size: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.routers = nn.ModuleDict({str(layer): nn.Linear(hidden_size, 1) for layer in layers})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] → [n]."""
        weights: torch.Tensor = self.routers[str(layer)](hidden).squeeze(-1)
        return weights


@register_policy("pmod")
@dataclass(eq=False)
class PMoD(Learned):
    """Mixture of depths with trained routers: the better tokens pass a layer, the others go around it and come back.

    A layer's router reads the hidden states that enter it, w = 0.2 · tanh(router(h)) + 1 (TanhNorm), and
    the ⌊ratio · V⌋ tokens of largest w (at least one) pass, at their original positions. Symmetric reweighting
    (STRing): of those that pass the MLP's output is scaled by w, of those that go around the whole hidden state; text
    is left alone. How many pass falls with depth (PRD: :func:`vtr.schedule.progressive`). Decoded tokens pass every
    layer.

    All of it is computed in the model's dtype. w saturates, and in bfloat16 it has some tens of distinct values, so
    ties are common. By default the lower slot passes. The official code leaves it to ``torch.topk`` over the whole row,
    text included, whose order differs by device and number of tokens; ``ties="official"`` does the same (so that with
    it, decoding without a cache may choose others at every step).

    Args:
        high: layers of which more than this share would pass are dense. low: at least this share passes.
        factor: added to the half cosine. period: the layer at which it is over; None: the last one.
        shape: "cosine", or "linear" (the official code's shiftedlinear_decay).
        ratios: the share that passes each decoder layer, None for a dense layer; instead of all of the above.
        norm: "activation_scale_bias", as official checkpoints name it; tanh, sigmoid, softmax or none.
        ties: which of equally weighted tokens pass: "lower" or "official".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    high: float = 0.85
    low: float = 0.15
    factor: float = 0.5
    period: int | None = None
    shape: Literal["cosine", "linear"] = "cosine"
    ratios: Sequence[float | None] | None = None
    norm: str = "tanh_0.2_1"
    ties: Literal["lower", "official"] = "lower"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("high", "low", "factor"):
            check_number(getattr(self, name), name)
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"low={self.low}, high={self.high}: shares of tokens, 0 <= low <= high <= 1")
        if self.shape not in ("cosine", "linear"):
            raise ValueError(f"shape={self.shape!r}: choose 'cosine' or 'linear'")
        if self.ties not in ("lower", "official"):
            raise ValueError(f"ties={self.ties!r}: choose 'lower' or 'official'")
        if self.period is not None:
            check_count(self.period, "period", 1, MOST_LAYERS)
        if self.ratios is not None:
            if isinstance(self.ratios, str) or not isinstance(self.ratios, Sequence):
                raise TypeError(f"ratios must be a list with a ratio or None for each layer, got {self.ratios!r}")
            self.ratios = [None if r is None else check_number(r, "ratios") for r in self.ratios]
            if any(r is not None and not 0 <= r <= 1 for r in self.ratios):
                raise ValueError(f"ratios={self.ratios}: each lies in [0, 1], or is None for a dense layer")
        self._act, self._scale, self._bias = _parsed(self.norm)
        self._known: tuple[int, list[float | None]] = (0, [])

    def layers(self, num_hidden_layers: int) -> list[float | None]:
        """The share of vision tokens that passes each decoder layer; None where all do, unweighted."""
        if self.ratios is not None:
            return list(self.ratios)
        if self._known[0] != num_hidden_layers:
            found = progressive(num_hidden_layers, self.high, self.low, self.factor, self.period, self.shape)
            self._known = (num_hidden_layers, found)
        return self._known[1]

    def make(self, hidden_size: int, num_hidden_layers: int) -> nn.Module:
        self._check_ratios(num_hidden_layers)
        return Routers(hidden_size, [i for i, r in enumerate(self.layers(num_hidden_layers)) if r is not None])

    def check(self, num_hidden_layers: int) -> None:
        self._check_ratios(num_hidden_layers)
        super().check(num_hidden_layers)

    def _check_ratios(self, num_hidden_layers: int) -> None:
        if self.ratios is not None and len(self.ratios) != num_hidden_layers:
            raise ValueError(
                f"ratios has {len(self.ratios)} entries, the model {num_hidden_layers} decoder layers: give a ratio "
                "for each, or None"
            )

    @staticmethod
    def count(ratio: float, total: int) -> int:
        """How many of ``total`` vision tokens pass a layer: cut off, as in the official code, but at least one."""
        return keep_count(float(ratio), total, slack=0.0)

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        """How many vision tokens pass each layer (the others go around it, and are there again)."""
        return [total if r is None else self.count(r, total) for r in self.layers(num_hidden_layers)]

    def weights(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """w of vision tokens [n, hidden_size] that enter ``layer``: [n], in their dtype."""
        return self._scale * ACTIVATIONS[self._act](self.at(hidden)(layer, hidden)) + self._bias

    def route(self, layer: int, tokens: Tokens) -> Route | None:
        return self.route_all(layer, [tokens])[0]

    def route_all(self, layer: int, tokens: Sequence[Tokens]) -> Sequence[Route | None]:
        ratio = self.layers(tokens[0].num_hidden_layers)[layer]
        if ratio is None:
            return [None] * len(tokens)
        hidden = torch.cat([one.hidden for one in tokens])
        weights = self.weights(layer, hidden).split([len(one) for one in tokens])
        for one in tokens:
            one.flops += 2 * len(one) * hidden.shape[1]
        return [Route(self._passing(ratio, one, mine), mine) for one, mine in zip(tokens, weights, strict=True)]

    def _passing(self, ratio: float, tokens: Tokens, weights: torch.Tensor) -> Best | torch.Tensor:
        count, score = min(self.count(ratio, tokens.total), len(tokens)), weights.detach()
        if self.ties == "lower":
            return Best(score, count)
        place = tokens.place
        row = score.new_full((tokens.row_length,), -torch.inf).index_copy(0, place, score)
        return torch.searchsorted(place, row.topk(count).indices.sort().values)


def _parsed(norm: str) -> tuple[str, float, float]:
    """(activation, scale, bias) of "tanh_0.2_1"; without numbers scale and bias are 1."""
    act, *numbers = norm.split("_") if isinstance(norm, str) else ("",)
    try:
        scale, bias = (check_number(float(number), "norm") for number in numbers or (1, 1))
    except ValueError:
        act, scale, bias = "", 1.0, 1.0
    if act not in ACTIVATIONS or not math.isfinite(scale) or not math.isfinite(bias):
        raise ValueError(f"norm={norm!r}: write activation_scale_bias, e.g. tanh_0.2_1, with {', '.join(ACTIVATIONS)}")
    return act, scale, bias
