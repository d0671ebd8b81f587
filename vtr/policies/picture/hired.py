"""HiRED (Arif et al., AAAI 2025, arXiv 2408.10945): an early layer says which crops matter, a late one what in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtr.base import Policy
from vtr.checks import check_number, check_placement
from vtr.image import Image, Layout, remembered, tokens_at
from vtr.keep import Keep, check_keep
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import Placement, available, best_of, check_official, image_count
from vtr.settings import register_policy
from vtr.shares import apportion


@remembered(1024)
def crop_of(layout: Layout, stripes: bool) -> torch.Tensor:
    """int64 [h * w]: the crop, from 0, that each patch of the thumbnail speaks for.

    The one that shows what the patch shows; ``stripes``: the patches are divided evenly, row by row.
    """
    (rows, columns), (h, w) = layout.crops, layout.grid
    if stripes:
        return torch.arange(h * w) * (rows * columns) // (h * w)
    top, left, height, width = layout.window or (0, 0, rows * h, columns * w)
    y = (top + (torch.arange(h) + 0.5) * height / h) // h
    x = (left + (torch.arange(w) + 0.5) * width / w) // w
    return (y.long()[:, None] * columns + x.long()).flatten()


@register_policy("hired")
@dataclass
class HiRED(Policy):
    """Keep the patches at which a late layer of the vision tower looks, more of crops at which an early layer looks.

    HiRED (Arif et al., AAAI 2025, arXiv 2408.10945): of an image's budget the thumbnail gets a share, the crops the
    rest, by how the CLS token looks at the thumbnail in the tower's first layer. Every tile keeps the best by its own
    CLS token in the layer whose output the model uses (attention after the softmax). The published code divides the
    thumbnail into stripes where the paper takes the crops' rectangles, lets patches of padding be chosen and then drops
    them, loses what roundings leave over, and drops newline tokens. An image of one tile keeps its best; the frames of
    a video share evenly. Towers without CLS token: the attention that a patch gets from all.

    Args:
        keep: patches of each image that stay: a ratio (float), above 0 at least one, or a count (int).
        alpha: the thumbnail's share of them, in [0, 1].
        budget: what of the thumbnail speaks for a crop: "rectangles": what shows the same; "stripes": the published
            code.
        score: what of it counts: "count": how many of the first 1 − alpha of the thumbnail's patches (the published
            code); "sum": all attention (the paper).
        placement: "true" leaves every token where it was, and the budget is kept to. "official" repeats the published
            code: patches of padding compete and are gone, budgets are rounded down, no newline token stays. (Grids that
            are not square it arranges wrongly; that is not repeated.)

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.25
    alpha: float = 0.5
    budget: Literal["rectangles", "stripes"] = "rectangles"
    score: Literal["count", "sum"] = "count"
    placement: Placement = "true"

    wants: ClassVar[tuple[str, ...]] = ("attentions", "attentions[0]")

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_placement(self.placement)
        if not 0 <= check_number(self.alpha, "alpha") <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]")
        if self.budget not in ("rectangles", "stripes"):
            raise ValueError(f"budget={self.budget!r}: choose 'rectangles' or 'stripes'")
        if self.score not in ("count", "sum"):
            raise ValueError(f"score={self.score!r}: choose 'count' or 'sum'")

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included.

        Raises:
            ValueError: the image has crops, and the published code lets the picture decide how many stay.
        """
        official = self.placement == "official"
        if official and layout.crops != (0, 0):
            return super().kept_of(layout)
        total = image_count(self.keep, int(available(layout, self.placement).sum()), self.placement)
        return total + (0 if official else int(layout.newline.sum()))

    def compress(self, image: Image) -> torch.Tensor:
        layout = image.layout
        check_official(layout, self.placement)
        there = available(layout, self.placement)
        chosen = best_of(saliency(image.tower), self.counts(image, there), there).cpu()
        if self.placement == "official":
            return tokens_at(layout)[(chosen & available(layout)).flatten()]
        return torch.cat([tokens_at(layout)[chosen.flatten()], layout.newline.nonzero().squeeze(1)])

    def counts(self, image: Image, there: torch.Tensor) -> list[int]:
        """How many patches of each tile stay, of those that are ``there``: bool [tiles, h * w]."""
        sizes = there.sum(1).tolist()
        total, in_crops = image_count(self.keep, sum(sizes), self.placement), sum(sizes[1:])
        if image.layout.crops == (0, 0):
            return apportion([float(n) for n in sizes], sizes, total)
        full = min(int(total * self.alpha), sizes[0])
        if self.placement == "official":
            rest = min(total - full, in_crops)
            shares = self.shares(image)
            return [full, *(shares * rest).int().clamp(max=there.shape[1]).tolist()]
        full = max(full, total - in_crops)
        some = (self.shares(image) + 1e-6).tolist()  # (crops of no share take what the others cannot)
        return [full, *apportion(some, sizes[1:], total - full)]

    def shares(self, image: Image) -> torch.Tensor:
        """float32 [crops] on the CPU, together 1: what part each crop has of what the crops keep."""
        values = saliency(image.tower, 0, 0)[:1].cpu()
        if self.score == "count":
            first = int(values.shape[1] * (1 - self.alpha))
            values = best_of(values, [first], torch.ones_like(values, dtype=torch.bool)).float()
        crops = image.layout.crops[0] * image.layout.crops[1]
        shares = torch.zeros(crops).index_add(0, crop_of(image.layout, self.budget == "stripes"), values[0])
        return shares / shares.sum() if bool(shares.any()) else torch.full((crops,), 1 / crops)
