"""AVTP (Zhang et al., EMNLP Findings 2026, arXiv 2608.26806): tokens that change most stay; budgets across images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import cosine_similarity

from vtr.base import Tokens
from vtr.checks import check_number
from vtr.keep import top
from vtr.policies.decoder._stages import Staged, spread
from vtr.policies.picture._tiles import first_of_groups
from vtr.settings import register_policy
from vtr.shares import LEAST, STAGE, equal_steps

MEMO = "avtp"


def alike(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """float32 [n]: cosines of states [n, hidden_size] with those of the same tokens after the cut before."""
    return cosine_similarity(now.float(), before.float(), dim=-1)


def budgets(importance: torch.Tensor, sizes: torch.Tensor, base: float, alpha: float) -> torch.Tensor:
    """int64 [m]: how many tokens each image keeps, at least one.

    Args:
        importance: float32 [m]. sizes: int64 [m], the tokens each has. base: the share of an image of mean importance.
    """
    shares = (base + alpha * (importance - importance.mean())).clamp(0, 1)
    return (shares.double() * sizes).long().clamp(min=1)


@dataclass
class _Before:
    """States after the cut before: of the tokens still there, and of the text in front of each image."""

    states: torch.Tensor
    markers: torch.Tensor | None = None
    where: torch.Tensor | None = None


@register_policy("avtp")
@dataclass
class AVTP(Staged):
    """A few cuts: vision tokens whose states change most from cut to cut stay; images that change more keep more.

    AVTP (EMNLP Findings 2026, arXiv 2608.26806). A token's change is 1 − cosine of its state with what it was behind
    the cut before (at first: its embedding). An image keeps ``keep + alpha · (its importance − the mean over the row's
    images)`` of the tokens it has left, at least one; tiles of one picture are one image. No attention is needed, and
    positions stay. Images in front of the question do not see it, so the question plays no part there. The default
    layers are the paper's for Qwen3-VL-8B (1, 14, 19 of 36; the published code: 1, 19, 22), elsewhere as deep. The
    published files for InternVL and LLaVA-OneVision shift the images' borders at every cut; here they stay right.

    Args:
        keeps: for each cut, the share of its tokens that an image of mean importance keeps, in (0, 1].
        layers: the decoder layers before which the cuts happen, from 1 on; None for the paper's three.
        alpha: how much budgets follow importance; 0: every image keeps the same share.
        importance: "mean", the mean change of the image's tokens (paper); "marker", the change of the text token right
            in front of it (published code), or the mean where another image stands there.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keeps: Sequence[float] = (0.8, 0.8, 0.78)
    layers: Sequence[int] | None = None
    alpha: float = 1.0
    importance: Literal["mean", "marker"] = "mean"

    published: ClassVar[tuple[tuple[int, ...], int]] = ((1, 14, 19), 36)

    def __post_init__(self) -> None:
        if isinstance(self.keeps, str) or not isinstance(self.keeps, Sequence) or not self.keeps:
            raise TypeError(f"keeps must be a list with one share per cut, e.g. [0.8, 0.8, 0.78], got {self.keeps!r}")
        self.keeps = [check_number(keep, f"keeps[{i}]") for i, keep in enumerate(self.keeps)]
        if not all(0 < keep <= 1 for keep in self.keeps):
            raise ValueError(f"keeps={self.keeps}: shares of an image's tokens, above 0 and at most 1.0")
        self.check_layers(len(self.keeps))
        if self.layers is None and len(self.keeps) != len(self.published[0]):
            raise ValueError(f"keeps has {len(self.keeps)} cuts, not the paper's three: name the layers they belong to")
        if check_number(self.alpha, "alpha") < 0:
            raise ValueError(f"alpha={self.alpha} must be at least 0 (0: every image keeps the same share)")
        if self.importance not in ("mean", "marker"):
            raise ValueError(f"importance={self.importance!r}: choose 'mean' or 'marker'")

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """Three cuts, each to the same share of what is there; the earlier, the smaller the budget."""
        depth, step, layers = num_hidden_layers, 0.0, list[int]()
        for last in ((1, 14, 19), (1, 7, 13), (1, 4, 8), (1, 2, 3)):
            at = spread(last, cls.published[1], depth)
            if at[-1] < depth:
                step, layers = equal_steps([b - a for a, b in pairwise([0, *at, depth])], share), at
            if step >= STAGE:
                break
        if step**3 < LEAST**1.5:
            raise ValueError(f"no three cuts in {depth} layers have a mean of {share:.3g}")
        return {"keeps": [round(step, 4)] * 3, "layers": layers}

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        """How many vision tokens enter each layer, of a row with one image (of several: it depends on them)."""
        cuts, counts, here = self.cuts(num_hidden_layers), list[int](), total
        for layer in range(num_hidden_layers):
            if layer in cuts:
                here = self._of_one(cuts.index(layer), here)
            counts.append(here)
        return counts

    def _of_one(self, cut: int, n: int) -> int:
        return int(budgets(torch.zeros(1), torch.tensor([n]), self.keeps[cut], self.alpha)) if n else 0

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        """Which tokens stay; with several images it waits for the device: their budgets depend on what they show."""
        if layer == 0:
            tokens.memo[MEMO] = self._noted(tokens)
        before: _Before | None = tokens.memo.get(MEMO)
        cuts = self.cuts(tokens.num_hidden_layers)
        if layer not in cuts or before is None:
            return None
        cut, now = cuts.index(layer), tokens.hidden
        same = alike(now, before.states)
        if len(tokens.per_image) <= 1:
            kept = top(-same, self._of_one(cut, len(tokens)))
            markers = before.markers
        else:
            _, image, sizes = tokens.image.unique(return_inverse=True, return_counts=True)
            worth = torch.zeros(len(sizes), device=same.device).index_add(0, image, 1 - same) / sizes
            markers = None
            if before.markers is not None and before.where is not None:
                there = before.where >= 0
                markers = tokens.text.index_select(0, before.where.clamp(min=0))
                worth = torch.where(there, 1 - alike(markers, before.markers), worth)
            counts = budgets(worth, sizes, self.keeps[cut], self.alpha)
            kept = first_of_groups(same.argsort(stable=True), image, counts).sort().values
        tokens.memo[MEMO] = _Before(now.index_select(0, kept), markers, before.where)
        return kept

    def _noted(self, tokens: Tokens) -> _Before:
        """The embeddings; and where the tokens right in front of the images are among the text, -1 for none."""
        if self.importance == "mean" or len(tokens.per_image) <= 1:
            return _Before(tokens.hidden)
        _, image = tokens.image.unique(return_inverse=True)
        place, length = tokens.place, tokens.row_length
        first = torch.full((int(image.max()) + 1,), length, device=place.device).scatter_reduce(0, image, place, "amin")
        at = tokens.text_place[None] == first[:, None] - 1
        where = torch.where(at.any(1), at.long().argmax(1), -1)
        return _Before(tokens.hidden, tokens.text.index_select(0, where.clamp(min=0)), where)
