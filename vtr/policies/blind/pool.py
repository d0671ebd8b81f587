"""Average pooling of every tile before the decoder: the training-free baseline of policies that compress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtr.base import Policy
from vtr.image import Image, Layout, Pooled, remembered
from vtr.settings import register_policy
from vtr.shares import nearest_side


@dataclass(frozen=True, eq=False)
class Cells:
    """Which pooled token each token of an image goes into; pooled tokens stand in the order of their first token.

    Attributes:
        cell: int64 [n], the pooled token of each of the image's n tokens. sizes: int64 [m], tokens in each.
        sources: m lists: the tokens in each, ascending.
    """

    cell: torch.Tensor
    sizes: torch.Tensor
    sources: list[list[int]]


@remembered(256)
def cells_of(layout: Layout, height: int, width: int) -> Cells:
    """Cut every tile of ``layout`` into height × width cells, and take the newline tokens of a row of cells together.

    Row y of a tile of H rows goes into row ``y * height // H`` of its cells, columns likewise: no cell overlaps
    another, and where a side is no multiple of the grid, cells differ by one patch. A canvas keeps its order, since
    its first row of patches in a row of cells already meets all of them, and the newline token last.
    """
    down = layout.y * height // layout.grid[0]
    across = torch.where(layout.newline.bool(), width, layout.x * width // layout.grid[1])
    key = (layout.tile * height + down) * (width + 1) + across
    _, cell, sizes = key.unique(return_inverse=True, return_counts=True)
    n, m = len(key), len(sizes)
    first = torch.full((m,), n).scatter_reduce_(0, cell, torch.arange(n), "amin")
    order = first.argsort()
    cell, sizes = order.argsort()[cell], sizes[order]
    members = cell.argsort(stable=True).tolist()
    ends = sizes.cumsum(0).tolist()
    sources = [members[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return Cells(cell, sizes, sources)


@register_policy("pool")
@dataclass
class Pool(Policy):
    """Average pooling: every tile (thumbnail, crop, video frame) becomes grid × grid tokens, before the decoder.

    A token is the mean of the patches in its cell: of those that are there, where a canvas of crops is cut back to the
    picture. Rows of a canvas keep one newline token each (the mean of those of the rows pooled). Nothing is learned
    and the question plays no part; the prompt is really shorter, in every layer and in the cache.
    Average pooling of a tile's grid is also how M3 makes its coarser scales (Cai et al., arXiv 2405.17430), whose model
    is trained for it.

    Args:
        grid: cells per side of a tile, or (rows, columns); at most the tile's own grid.

    Raises:
        TypeError, ValueError: not one or two ints of at least 1; when called, a tile with fewer patches than cells.
    """

    grid: int | Sequence[int] = 4

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """The grid whose number of cells is nearest."""
        return {"grid": nearest_side(share, side)}

    def __post_init__(self) -> None:
        sides = (self.grid, self.grid) if isinstance(self.grid, int) else self.grid
        if isinstance(sides, str) or not isinstance(sides, Sequence) or len(sides) != 2:
            raise TypeError(f"grid must be an int or two, (rows, columns), e.g. 4 or [4, 6], got {self.grid!r}")
        for side in sides:
            if isinstance(side, bool) or not isinstance(side, int):
                raise TypeError(f"grid must be an int or two, (rows, columns), e.g. 4 or [4, 6], got {self.grid!r}")
            if side < 1:
                raise ValueError(f"grid={self.grid!r}: a tile is pooled to at least 1 × 1 token")
        self._sides: tuple[int, int] = (sides[0], sides[1])
        if not isinstance(self.grid, int):
            self.grid = self._sides

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout becomes, newlines included: from its size alone.

        Raises:
            ValueError: a tile with fewer patches than cells.
        """
        return len(self._cells(layout, "an image").sizes)

    def _cells(self, layout: Layout, whose: str) -> Cells:
        (height, width), (rows, columns) = self._sides, layout.grid
        if height > rows or width > columns:
            raise ValueError(
                f"grid={self.grid!r} is finer than a tile of {whose}, which has {rows} × {columns} tokens"
                f"{layout.doubt}: choose at most ({rows}, {columns})"
            )
        return cells_of(layout, height, width)

    def compress(self, image: Image) -> Pooled | None:
        cells = self._cells(image.layout, f"image {image.index}")
        if len(cells.sizes) == len(image):
            return None
        features = image.features
        exact = features.to(torch.promote_types(features.dtype, torch.float32))
        cell, sizes = (t.to(features.device, non_blocking=True) for t in (cells.cell, cells.sizes))
        sums = exact.new_zeros(len(sizes), exact.shape[1]).index_add(0, cell, exact)
        return Pooled((sums / sizes[:, None]).to(features.dtype), cells.sources)
