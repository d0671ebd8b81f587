"""HiPrune (Liu et al., arXiv 2508.00553): objects from a middle layer of the tower, the rest from a deep one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vtr.checks import check_number, check_tower_layer
from vtr.image import Image
from vtr.keep import keep_count
from vtr.policies.picture._tiles import Placement, Tilewise, best_of
from vtr.settings import register_policy


def beside(anchors: torch.Tensor, grid: tuple[int, int], placement: Placement = "true") -> torch.Tensor:
    """bool [tiles, h * w]: the patches left, right, above and below of ``anchors`` (bool [tiles, h * w]).

    "official": by numbers. Beyond the end of a row is the next row, above the first one the first patch, below the last
    one the last patch.
    """
    h, w = grid
    if placement == "official":
        at = torch.arange(h * w, device=anchors.device)
        near = torch.zeros(anchors.shape, device=anchors.device)
        for step in (-1, 1, -w, w):
            near = near.index_add(1, (at + step).clamp(0, h * w - 1), anchors.to(near))
        return near > 0
    here = anchors.unflatten(1, grid)
    around = torch.zeros_like(here)
    around[:, 1:] |= here[:, :-1]
    around[:, :-1] |= here[:, 1:]
    around[:, :, 1:] |= here[:, :, :-1]
    around[:, :, :-1] |= here[:, :, 1:]
    return around.flatten(1)


@register_policy("hiprune")
@dataclass
class HiPrune(Tilewise):
    """Keep of every tile the objects that a middle layer of the vision tower sees, and what a deep layer looks at.

    HiPrune (Liu et al., ACL Findings 2026, arXiv 2508.00553): patches are ranked by the attention that they get from
    all, mean over heads. A share of the budget goes to the first of a middle layer and the patches beside them, the
    rest to the first of the layer whose output the model uses. No CLS token is needed. The published code divides its
    budget by the tiles of the whole batch, drops newline tokens, keeps patches of padding, and lets neighbours wrap
    around at the picture's edges; if a small budget cannot hold the neighbours, it fails, where here the best stay.

    Args:
        keep: patches of each tile that stay: a ratio (float) of those that are there (above 0 at least one of each
            tile), or a count (int).
        placement: "true" leaves every token where it was. "official" repeats the published code: neighbours wrap
            around, and, of pictures with crops, every crop is whole (patches that show padding take part), and no
            newline token stays.
        alpha: share of the budget, in [0, 1], for objects and what is beside them (one object takes five patches).
        object_layer: the middle layer: an int counts as transformers counts ``attentions``, a float in (0, 1] is a
            share of the tower's depth (0.375 of 24 layers: ``attentions[8]``, as published).
        budget: "tile" takes ``keep`` of every tile, "total" of an image, whose tiles get equal parts, rounded down.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    alpha: float = 0.1
    object_layer: int | float = 0.375
    budget: Literal["tile", "total"] = "tile"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= check_number(self.alpha, "alpha") <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]")
        check_tower_layer(self.object_layer, "object_layer")
        if self.budget not in ("tile", "total"):
            raise ValueError(f"budget={self.budget!r}: choose 'tile' or 'total'")

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        wished = ("attentions", f"attentions[{self.object_layer}]")
        return (*wished, "tiles") if self.placement == "official" else wished

    def counts(self, there: torch.Tensor) -> list[int]:
        if self.budget == "tile":
            return super().counts(there)
        each = keep_count(self.keep, int(there.sum())) // len(there)
        if isinstance(self.keep, float) and self.keep > 0:
            each = max(each, 1)
        return [min(each, n) for n in there.sum(1).tolist()]

    def choose(self, image: Image, counts: list[int], there: torch.Tensor) -> torch.Tensor:
        assert image.tower is not None
        objects, deep = image.tower.attention_received(self.object_layer), image.tower.attention_received()
        anchors = best_of(objects, [round(count * self.alpha / 5) for count in counts], there)
        near = beside(anchors, image.layout.grid, self.placement)
        return best_of(deep + 2 * near + 4 * anchors, counts, there)  # (attention is at most 1)
