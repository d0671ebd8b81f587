"""M3, Matryoshka Multimodal Models (Cai et al., ICLR 2025, arXiv 2405.17430): tiles in 1, 9, 36, 144 or 576 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch.nn.functional import avg_pool2d

from vtr.base import Policy, UnsupportedError
from vtr.image import Image, Layout, Pooled, arrange, scales
from vtr.settings import register_policy
from vtr.shares import NEAR


def pool(tiles: torch.Tensor, grid: tuple[int, int], k: int) -> torch.Tensor:
    """The mean of every k × k cell: [tiles, h * w, D] → [tiles, (h // k) * (w // k), D]; a remainder is left out."""
    maps = tiles.unflatten(1, grid).permute(0, 3, 1, 2)
    return avg_pool2d(maps, k).flatten(2).transpose(1, 2)


@lru_cache(maxsize=1024)
def made_of(layout: Layout, small: Layout, k: int) -> list[list[int]]:
    """Which of ``layout``'s tokens each of ``small``'s is made from, where cells are k × k.

    A newline token stands for those of the rows it replaces. What unpadding cut away has no token: a pooled token of
    such patches alone is made from none.
    """
    (h, w), n = small.grid, len(small)
    owner = {key: i for i, key in enumerate(_keys(small, h, w, small.y, small.x))}
    groups: list[list[int]] = [[] for _ in range(n)]
    for i, key in enumerate(_keys(layout, h, w, layout.y // k, layout.x // k)):
        if key in owner:
            groups[owner[key]].append(i)
    return groups


def _keys(layout: Layout, h: int, w: int, y: torch.Tensor, x: torch.Tensor) -> list[int]:
    """One number per token: its (tile, y, x) cell of h × w ones; negative for newline tokens, one per canvas row."""
    columns = max(layout.crops[1], 1)
    line = torch.div(layout.tile - 1, columns, rounding_mode="floor") * h + y
    return torch.where(layout.newline.bool(), -1 - h - line, (layout.tile * h + y) * w + x).tolist()


def _cell(tokens: int, layout: Layout) -> int:
    """The side of the cells that leave ``tokens`` of a tile."""
    known = scales(layout.grid)
    if tokens not in known:
        height, width = layout.grid
        raise ValueError(
            f"tokens={tokens} is no scale of tiles of {height} × {width} tokens{layout.doubt}: choose "
            f"{', '.join(map(str, known))}"
        )
    return known[tokens]


def _shrunk(layout: Layout, k: int) -> Layout:
    if layout.shrunk is None:
        raise UnsupportedError(
            "this model family's adapter does not say how tiles of fewer tokens are laid out: use pool:grid=…, which "
            "needs no such layout"
        )
    return layout if k == 1 else layout.shrunk(k)


@register_policy("m3")
@dataclass
class Matryoshka(Policy):
    """Every image at a coarser scale: the projected tokens of each tile are averaged over square cells.

    The official code's order (the paper draws pooling before the projector): project, pool every tile (thumbnail and
    crops alike), put the crops together, cut the canvas back to the picture's aspect ratio, a newline token behind
    every row that is left. Works on any weights (the paper's training-free baseline); made for weights trained with it.

    Args:
        tokens: per tile, one of the grid's :func:`~vtr.image.scales` (576, 144, 36, 9, 1 for 24 × 24); a list gives
            every image of the row its own.

    Raises:
        TypeError, ValueError: not a positive count; later, when the grid is known, not one of its scales, or a list
            that is not as long as the row has images.
    """

    tokens: int | Sequence[int] = 36

    wants: ClassVar[tuple[str, ...]] = ("tiles",)

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """The nested scale whose number of tokens is nearest, if one is near."""
        known = scales((side, side))
        nearest = min(known, key=lambda tokens: abs(tokens / side**2 - share))
        if not NEAR < nearest / side**2 / share < 1 / NEAR:
            raise ValueError(f"none of the nested scales {', '.join(map(str, known))} is near this share of {side**2}")
        return {"tokens": nearest}

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int):
            if isinstance(self.tokens, str) or not isinstance(self.tokens, Sequence) or not self.tokens:
                raise TypeError(f"tokens must be a count per tile, or a list of one per image, got {self.tokens!r}")
            self.tokens = list(self.tokens)
        for count in self.tokens if isinstance(self.tokens, list) else [self.tokens]:
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"tokens must be a count per tile (an int), got {count!r}")
            if count < 1:
                raise ValueError(f"tokens={count}: a tile has at least 1 token")

    def cell_side(self, image: Image) -> int:
        """How many tokens a pooled cell of ``image`` is high and wide."""
        return _cell(self.of_image(image.index, image.count).tokens, image.layout)  # type: ignore[arg-type]

    def of_image(self, index: int, count: int) -> Matryoshka:
        """This policy for image ``index`` of a row of ``count``: one scale where ``tokens`` is a list."""
        if isinstance(self.tokens, int):
            return self
        if len(self.tokens) != count:
            raise ValueError(
                f"tokens={list(self.tokens)} names {len(self.tokens)} scales, but the row has {count} images: name one "
                "for each, or one for all"
            )
        return Matryoshka(self.tokens[index])

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included: from its size alone, before any encoding.

        Raises:
            ValueError: not a scale of its grid; a list of scales (see :meth:`of_image`).
        """
        if not isinstance(self.tokens, int):
            raise ValueError(f"tokens={list(self.tokens)} says a scale for each image: ask of_image(index, count)")
        return len(_shrunk(layout, _cell(self.tokens, layout)))

    def compress(self, image: Image) -> Pooled | None:
        k, layout = self.cell_side(image), image.layout
        if k == 1:
            return None
        small = _shrunk(layout, k)
        assert image.tiles is not None
        return Pooled(
            arrange(small, pool(image.tiles, layout.grid, k), image.newline), made_of(layout, small, k), small
        )
