"""Before the decoder: of every tile, the tokens that the vision tower's CLS token looks at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtr.base import Policy
from vtr.image import Image, Layout, cell
from vtr.keep import Keep, check_keep, keep_count, top
from vtr.settings import register_policy


@register_policy("cls")
@dataclass
class ClsTop(Policy):
    """Of every tile, the tokens the vision tower's CLS token looks at most, before the decoder.

    GlobalCom²'s score (Liu et al., AAAI 2026, arXiv 2501.05179) with one budget a tile: a tile's tokens are ranked by
    :meth:`Image.cls_attention`, the CLS row of the tower's last layer before the softmax; the best stay at their places
    (towers without a CLS token: GlobalCom²'s stand-in). FasterVLM averages probabilities of another layer:
    ``fastervlm``. This score is what vLLM's towers can give as well.
    Every tile gets the same share: no crop is worth more than another. Newline tokens all stay. The question plays no
    part, and how many stay is known from the picture's size (:meth:`kept_of`).

    Args:
        keep: tokens of each tile that stay: a ratio (float) of those that are there (above 0 at least
            one of each tile), or a count (int).

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.25

    wants: ClassVar[tuple[str, ...]] = ("cls",)

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included."""
        patches = layout.newline == 0
        sizes = layout.tile[patches].bincount(minlength=layout.tiles).tolist()
        return sum(keep_count(self.keep, n) for n in sizes) + int(layout.newline.sum())

    def compress(self, image: Image) -> torch.Tensor:
        layout = image.layout
        scores = image.cls_attention().cpu().flatten()
        kept = [layout.newline.nonzero().squeeze(1)]
        for tile in range(layout.tiles):
            mine = ((layout.tile == tile) & (layout.newline == 0)).nonzero().squeeze(1)
            best = top(scores[cell(layout)[mine]], keep_count(self.keep, len(mine)))
            kept.append(mine[best])
        return torch.cat(kept)
