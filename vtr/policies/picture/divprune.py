"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): tokens that are as far from each other as can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vtr.image import Image, Layout
from vtr.policies.picture._greedy import farthest, unit
from vtr.policies.picture._poolwise import Poolwise, features_of
from vtr.settings import register_policy


@register_policy("divprune")
@dataclass
class DivPrune(Poolwise):
    """Keep the image's tokens that differ most from each other (max-min distance), before the decoder.

    Alvar et al., CVPR 2025, arXiv 2503.02175 (Eqs. 3 and 4, Algorithm 1): the token whose nearest neighbour is farthest
    comes first, then always the one farthest from all that were chosen; the distance is 1 − cosine of the features that
    enter the decoder. The question plays no part. The official code lets newline tokens compete (they are copies of
    each other, so hardly one of them stays) and takes one image alone; here they all stay, and patches are chosen among
    themselves. No token is chosen twice, however many are equal.

    Args:
        keep: tokens that stay: a ratio (float; the paper's is 0.098), or a count (int).
        pool: "image", each image keeps its own share; "row", all images of a row share one budget.
        newline: "all" newline tokens stay, and ``keep`` is of the patches. "official": they compete as the patches do,
            and a ratio is rounded to the nearest count, half to even, at least one.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    newline: Literal["all", "official"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.newline not in ("all", "official"):
            raise ValueError(f"newline={self.newline!r}: choose 'all' or 'official'")

    def candidates(self, layout: Layout) -> torch.Tensor:
        return torch.arange(len(layout)) if self.newline == "official" else super().candidates(layout)

    def count(self, n: int) -> int:
        if self.newline == "official" and isinstance(self.keep, float):
            return min(max(round(self.keep * n), int(self.keep > 0)), n)
        return super().count(n)

    @torch.no_grad()
    def choose(self, images: Sequence[Image], candidates: list[torch.Tensor], count: int) -> torch.Tensor:
        picks, flops = farthest(unit(features_of(images, candidates))[None], count)
        images[0].flops += flops
        return picks[0]
