"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): words about the picture rate its tokens, some are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from vtr.base import Attention, Best, Merged, Policy, Tokens
from vtr.checks import check_count, check_depth, check_layer, check_on_continue, check_placement, check_positions
from vtr.keep import Keep, best, check_keep, keep_count
from vtr.policies.decoder._lists import LAYERS, TOKENS, between, spread
from vtr.policies.decoder._sparse import clusters, put_together, raters, taken_of
from vtr.settings import register_policy
from vtr.shares import ratio


@register_policy("sparsevlm")
@dataclass
class SparseVLM(Policy):
    """Three cuts: the vision tokens that the words about the picture look at stay, part of the others is put together.

    Raters are the text tokens behind the last image that, as the text model embeds them, are about it more than the
    mean. A token's score is the attention that raters paid to it in the layer before, mean over heads. Of those that
    go, the best third is clustered by density peaks, and each cluster's mean is a new token behind the last one that
    stays. This is v1.5, the official code's default.

    The official counts are scaled to the prompt's tokens and the model's depth; between the four lists, and beyond,
    they are interpolated (ours). A cut that would leave more than there are is none; the official code then cuts one
    token, which comes back as a new one: ``placement="official"``. Its ties in density are broken by global random
    numbers, here by ``seed``. How many raters there are, and what was put together, is read from the device.

    Args:
        retain: the official budget (192, 128, 96, 64; about the mean over layers of LLaVA's 576 tokens): an int is of
            576, whatever the prompt has; a float is a share.
        keeps: what each cut leaves beside the new tokens, ratios of the row's tokens or counts; None: by ``retain``,
            which plays no part otherwise.
        layers: the decoder layers that are cut on entering; None: 3, 7 and 16 of 32, as deep in others.
        positions: "reindex" numbers the tokens contiguously after each cut (official code); "keep" leaves them their
            own positions, and gives a new token that of the token in front of it.
        seed: of the random numbers.
        placement: "true", or "official" as above.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    retain: Keep = 192
    keeps: Sequence[Keep] | None = None
    layers: Sequence[int] | None = None
    positions: Literal["keep", "reindex"] = "reindex"
    seed: int = 0
    placement: str = "true"
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True
    lists: ClassVar[Mapping[int, tuple[int, ...]]] = {
        192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17),
    }  # fmt: skip
    """The official counts of each budget."""

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """The ``retain`` that has this mean; the cuts come earlier where the budget asks for it."""
        for parts in (1, 2, 4, 8):
            given = {} if parts == 1 else {"layers": spread(num_hidden_layers, parts)}

            def mean(retain: float, given: dict[str, Any] = given) -> float:
                counts = cls(retain, **given).entering(num_hidden_layers, side * side)
                return sum(counts) / (num_hidden_layers * side * side)

            low, high = 0.0001, 1.0
            if mean(low) > share:
                continue
            for _ in range(24):
                middle = (low + high) / 2
                low, high = (middle, high) if mean(middle) <= share else (low, middle)
            return {"retain": ratio(low), **given}
        raise ValueError(f"no three cuts in {num_hidden_layers} layers have a mean of {share:.3g}")

    def __post_init__(self) -> None:
        check_keep(self.retain, "retain")
        if not 0 < self.retain <= (1 if isinstance(self.retain, float) else TOKENS):
            raise ValueError(f"retain={self.retain!r}: a count of {TOKENS} tokens, or a share in (0, 1]")
        for name in ("keeps", "layers"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str) or not isinstance(value, Sequence) or not value):
                raise TypeError(f"{name} must be a list, one for each cut, got {value!r}")
        if self.keeps is not None:
            self.keeps = [check_keep(keep, f"keeps[{i}]") for i, keep in enumerate(self.keeps)]
            if not all(self.keeps):
                raise ValueError(f"keeps={self.keeps}: each cut leaves something")
        if self.layers is not None:
            self.layers = list(self.layers)
            for layer in self.layers:
                check_layer(layer, 1, "raters look in the layer before, so layers begin at 1")
            if sorted(set(self.layers)) != self.layers:
                raise ValueError(f"layers={self.layers} must ascend")
        cuts = len(LAYERS) if self.layers is None else len(self.layers)
        if cuts != (len(LAYERS) if self.keeps is None else len(self.keeps)):
            raise ValueError(f"layers={self.layers} and keeps={self.keeps}: give one keep for each layer")
        check_positions(self.positions)
        check_count(self.seed, "seed", 0, 2**31)
        check_placement(self.placement)
        check_on_continue(self.on_continue)

    def check(self, num_hidden_layers: int) -> None:
        for layer in self.layers or []:
            check_depth(layer, num_hidden_layers, 1)
        if self.layers is None and num_hidden_layers < 2:
            raise ValueError("raters look in the layer before the cut, so the model needs two decoder layers at least")

    # -- how many ---------------------------------------------------------------------------------------------------
    def stages(self, num_hidden_layers: int, total: int) -> dict[int, int]:
        """The layers that are cut on entering → how many of ``total`` tokens stay as they are."""
        layers = spread(num_hidden_layers) if self.layers is None else self.layers
        if self.keeps is not None:
            counts = [keep_count(keep, total) for keep in self.keeps]
        else:
            counts = [max(int(count * total / TOKENS + 0.5), 1) for count in between(self.lists, self.retain)]
        return dict(zip(layers, counts, strict=False))

    def split(self, layer: int, num_hidden_layers: int, total: int, here: int) -> int | None:
        """How many of the tokens ``here`` stay as they are on entering a layer; None: nothing is done."""
        count = self.stages(num_hidden_layers, total).get(layer)
        if count is None:
            return None
        if self.placement == "official":
            count = min(count, here - 1)
        return count if 0 < count < here else None

    def made_of(self, gone: int) -> int:
        """How many new tokens are made where so many go."""
        return taken_of(gone)[1]

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        counts, here = [], total
        for layer in range(num_hidden_layers):
            count = self.split(layer, num_hidden_layers, total, here)
            here = here if count is None else count + self.made_of(here - count)
            counts.append(here)
        return counts

    # -- which ------------------------------------------------------------------------------------------------------
    def request(self) -> Attention:
        """What is asked of the layer before a cut."""
        return Attention("raters")

    def needs(self, layer: int) -> Attention | None:
        known = self.layers
        return self.request() if layer and (known is None or layer in known) else None

    def prune(self, layer: int, tokens: Tokens) -> Best | Merged | None:
        memo, depth, total = tokens.memo, tokens.num_hidden_layers, tokens.total
        count = self.split(layer, depth, total, len(tokens))
        answer = None if count is None or tokens.scores is None else self.cut(tokens, count)
        if layer == 0:
            memo["words"] = raters(tokens.hidden, tokens.text, tokens.behind)
            tokens.flops += 2 * tokens.hidden.numel() * len(tokens.text)
        if layer + 1 in self.stages(depth, total):
            memo["raters"] = memo["words"]
        else:  # nobody is asked
            memo.pop("raters", None)
        return answer

    def cut(self, tokens: Tokens, count: int) -> Best | Merged:
        """Leave ``count`` of the tokens as they are."""
        order = best(tokens.scores, len(tokens))
        taken, made = taken_of(len(tokens) - count)
        some = order[count : count + taken]
        states = tokens.hidden.index_select(0, some)
        _, owner = clusters(states, self.noise(tokens, taken).to(states.device), made)
        tokens.flops += 2 * made * taken * states.shape[1]
        new = put_together(states, owner, made).to(states.dtype)
        places, owners = torch.stack([some, owner]).tolist()
        sources = [[p for p, o in zip(places, owners, strict=True) if o == one] for one in range(made)]
        return Merged(order[:count].sort().values, new, sources)

    def noise(self, tokens: Tokens, count: int) -> torch.Tensor:
        """float32 [count] in [0, 1): says which of two equally dense tokens is the denser one."""
        return torch.rand(count, generator=tokens.generator(self.seed))
