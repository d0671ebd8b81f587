"""Maximal marginal relevance, as IDPruner (Tencent AngelSlim) has it, over what the vision tower looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtr.checks import check_count, check_number
from vtr.image import Image, cell
from vtr.policies.picture._greedy import marginal, unit
from vtr.policies.picture._poolwise import Poolwise, features_of
from vtr.policies.picture._saliency import saliency
from vtr.settings import register_policy


def min_max(scores: torch.Tensor) -> torch.Tensor:
    """float32 [n] scores as importance: the smallest is 0, the largest about 1 (0, if all are equal)."""
    lowest, highest = scores.aminmax()
    return (scores - lowest) / (highest - lowest + 1e-6)


@register_policy("mmr")
@dataclass
class MMR(Poolwise):
    """Keep the image's tokens that are looked at most and unlike those already kept, before the decoder.

    The selection of IDPruner (AngelSlim): always the token with the largest ``trade · importance − (1 − trade) ·
    largest cosine with a chosen one``, the first by importance alone. IDPruner learns the importance; its scorer's
    weights are of one model, so here it is what the vision tower's CLS token pays to a patch in the layer whose output
    the model uses (towers without one: the attention it receives), min-max over the pool. Cosines are of the features
    that enter the decoder. The question plays no part. Unlike IDPruner, newline tokens stay, and each image has a
    budget of its own.

    Args:
        keep: patches that stay: a ratio (float; above 0 at least one), or a count (int).
        pool: "image", each image keeps its own share; "row", all images of a row share one budget and one min-max.
        trade: in [0, 1]: 1 is importance alone; 0 is diversity alone, but for the first token.
        parallel: tokens that are taken at once, at least 1; more are faster and less diverse.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    trade: float = 0.5
    parallel: int = 1

    wants: ClassVar[tuple[str, ...]] = ("attentions",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= check_number(self.trade, "trade") <= 1:
            raise ValueError(f"trade={self.trade} must lie in [0, 1]: 1 is importance alone, 0 diversity")
        check_count(self.parallel, "parallel", 1, 2**20)

    @torch.no_grad()
    def choose(self, images: Sequence[Image], candidates: list[torch.Tensor], count: int) -> torch.Tensor:
        scores = []
        for image, some in zip(images, candidates, strict=True):
            mine = saliency(image.tower, heads="sum").flatten()
            scores.append(mine.index_select(0, cell(image.layout)[some].to(mine.device)))
        units = unit(features_of(images, candidates))
        picks, flops = marginal(units[None], min_max(torch.cat(scores))[None], count, self.trade, self.parallel)
        images[0].flops += flops
        return picks[0]
