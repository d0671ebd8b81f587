"""Reroute (Yang et al., arXiv 2606.12412): tokens not chosen go around a stage's layers, and may be chosen later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch

from vtr.base import Route, Scores, Tokens
from vtr.checks import check_on_continue
from vtr.keep import Keep, check_keep, keep_count, top
from vtr.policies.decoder._stages import Staged, spread
from vtr.settings import register_policy
from vtr.shares import ratio

Rank = Literal["ahead", "last", "text", "last-max", "text-max"]
MEMO = "reroute"
SHAPE = (1.0, 1.0, 0.5, 0.25)
"""The stages of the default, in shares of the first."""


@register_policy("reroute")
@dataclass
class Reroute(Staged):
    """Stages: the vision tokens looked at most pass the layers, the others go around and may come back at the next.

    Reroute (arXiv 2606.12412): a token that is not chosen keeps its hidden state, and is not in the caches of the
    layers it goes around; at the next stage all tokens are ranked again. Ranking, counts and positions are those of the
    official code (``int(V · keep)`` of the row's V tokens, at least one; positions stay). The default stages are the
    paper's against PyramidDrop at a mean of 128 of 576 tokens: layers 2, 7, 15, 23 of 32, elsewhere as deep. Differs
    from the official code: each row of a batch has its own choice, and all images of a row are ranked together.

    Args:
        keeps: what passes in each stage, a ratio of the row's tokens (float) or a count (int). The paper's against
            FastV at a mean of 192 of 576: ``[0.2644, 0.2644, 0.2644, 0.2644]`` with ``layers=[3, 7, 15, 23]``.
        layers: the decoder layer each stage begins with; None for the paper's four.
        rank: "ahead": the attention the last text token is about to pay in the stage's first layer, from the layer's
            own projections. "last", "text", "last-max", "text-max": attention paid in the layer before, as in G-Search;
            a token that went around that layer counts with what it had when it was last ranked while passing.
        recover: False: who was not chosen stays out in all later stages (the official ``monotonic``).
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keeps: Sequence[Keep] = (0.2655, 0.2655, 0.1328, 0.0664)
    layers: Sequence[int] | None = None
    rank: Rank = "ahead"
    recover: bool = True
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True
    published: ClassVar[tuple[tuple[int, ...], int]] = ((2, 7, 15, 23), 32)

    def __post_init__(self) -> None:
        if isinstance(self.keeps, str) or not isinstance(self.keeps, Sequence) or not self.keeps:
            raise TypeError(f"keeps must be a list with one keep per stage, e.g. [0.5, 0.25], got {self.keeps!r}")
        self.keeps = [check_keep(keep, f"keeps[{i}]") for i, keep in enumerate(self.keeps)]
        self.check_layers(len(self.keeps))
        if self.layers is None and len(self.keeps) != len(self.published[0]):
            raise ValueError(
                f"keeps has {len(self.keeps)} stages, not the paper's four: name the layers they begin with"
            )
        if self.rank not in get_args(Rank):
            raise ValueError(f"rank={self.rank!r}: choose one of {', '.join(map(repr, get_args(Rank)))}")
        if not isinstance(self.recover, bool):
            raise TypeError(f"recover must be true or false, got {self.recover!r}")
        check_on_continue(self.on_continue)

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """Four stages of the default's shape, from ``layer`` on, or the paper's; as much earlier as the budget asks."""
        depth, layers = num_hidden_layers, spread(*cls.published, num_hidden_layers)
        cls().check(depth)
        begins = [layer] if layer is not None else range(layers[0], 0, -1)
        for first in begins:
            at = [first, *(max(later, first + i) for i, later in enumerate(layers[1:], 1))]
            spans = [b - a for a, b in pairwise([*at, depth])]
            left = share * depth - first
            if min(spans) > 0 and left >= 0.02 * (depth - first):
                return {"keeps": _shaped(spans, left), "layers": at}
        raise ValueError(f"four stages from layer {begins[-1]} of {depth} on keep the mean above {share:.3g}")

    def count(self, stage: int, total: int) -> int:
        """How many of a row's ``total`` vision tokens pass the layers of a stage."""
        return keep_count(self.keeps[stage], total, slack=0.0)

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        """How many vision tokens pass each layer (the others go around it, and are there again)."""
        cuts, counts, here = self.cuts(num_hidden_layers), list[int](), total
        for layer in range(num_hidden_layers):
            if layer in cuts:
                count = self.count(cuts.index(layer), total)
                here = count if self.recover else min(here, count)
            counts.append(here)
        return counts

    def needs(self, layer: int) -> Scores | None:
        return None if self.rank == "ahead" or not self.acts(layer) else self.rank

    def prune(self, layer: int, tokens: Tokens) -> None:
        """Notes who passes from here on, and lets all tokens stay."""
        cuts = self.cuts(tokens.num_hidden_layers)
        if layer not in cuts:
            return
        was: tuple[torch.Tensor, torch.Tensor] | None = tokens.memo.get(MEMO)
        scores = tokens.ahead() if self.rank == "ahead" else tokens.scores
        if scores is None:
            return
        count = self.count(cuts.index(layer), tokens.total)
        if was is not None:
            passed = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, was[0], True)
            if self.rank != "ahead":
                scores = torch.where(passed, scores, was[1])
            if not self.recover:
                scores, count = scores.masked_fill(~passed, -torch.inf), min(count, len(was[0]))
        tokens.memo[MEMO] = top(scores, count), scores

    def route(self, layer: int, tokens: Tokens) -> Route | None:
        chosen = tokens.memo.get(MEMO)
        return None if chosen is None or len(chosen[0]) == len(tokens) else Route(chosen[0])


def _shaped(spans: Sequence[int], left: float) -> list[float]:
    """Ratios for stages of so many layers that sum to ``left`` layers' worth of tokens, in :data:`SHAPE` up to 1."""
    low, high = 0.0, 1 / min(SHAPE)
    for _ in range(60):
        size = (low + high) / 2
        found = sum(span * min(size * part, 1.0) for span, part in zip(spans, SHAPE, strict=True))
        low, high = (size, high) if found < left else (low, size)
    return [ratio(min(low * part, 1.0)) for part in SHAPE]
