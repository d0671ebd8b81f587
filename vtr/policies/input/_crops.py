"""How image processors lay crops over a picture of a size: what several input policies ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtr.inputs import Size


def tile_side(image_processor: Any, settings: Mapping[str, Any]) -> int:
    """The side of a tile in pixels."""
    size = settings.get("size") or image_processor.size
    size = size if isinstance(size, Mapping) else vars(size)
    side: Any = size.get("height") or size.get("shortest_edge")
    return int(side)


def grids(least: int, most: int) -> list[tuple[int, int]]:
    """(columns, rows) of all grids of so many tiles, from the fewest tiles to the most, then by columns."""
    found = [(w, h) for w in range(1, most + 1) for h in range(1, most // w + 1) if w * h >= least]
    return sorted(found, key=lambda grid: (grid[0] * grid[1], grid[0]))


@dataclass(frozen=True)
class AnyRes:
    """LLaVA-NeXT, LLaVA-OneVision: of listed canvases the one that shows most of the picture and has least room left.

    Attributes:
        canvases: (width, height) in pixels.
    """

    canvases: tuple[Size, ...]

    def count(self, size: Size) -> int:
        """Pixels of the canvas that the processor lays over a picture of ``size``: as many crops, times a tile's."""
        from transformers.image_processing_utils import select_best_resolution

        best = select_best_resolution(size[::-1], [canvas[::-1] for canvas in self.canvases])
        return 0 if best is None else int(best[0] * best[1])

    def fit(self, size: Size, canvas: Size) -> Size:
        """The largest size of these proportions that lies on the canvas, but no larger than it is."""
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        return size if scale >= 1 else (max(1, int(size[0] * scale)), max(1, int(size[1] * scale)))


@dataclass(frozen=True)
class ByProportion:
    """InternVL: the grid whose proportions are nearest to the picture's, which is stretched over it.

    Attributes:
        canvases: (width, height) in pixels.
    """

    canvases: tuple[Size, ...]
    image_processor: Any
    settings: dict[str, Any]

    def count(self, size: Size) -> int:
        """Tiles that the processor makes of a picture of ``size``, the thumbnail counted."""
        return int(self.image_processor.get_number_of_image_patches(size[1], size[0], self.settings))

    def fit(self, size: Size, canvas: Size) -> Size:
        """The canvas itself: the processor would stretch the picture over it all the same."""
        return canvas


def crops_of(image_processor: Any, settings: Mapping[str, Any]) -> AnyRes | ByProportion | None:
    """How an image processor, called with ``settings``, lays crops; None: it lays none by a picture's size."""
    pins = settings.get("image_grid_pinpoints") or getattr(image_processor, "image_grid_pinpoints", None)
    if pins:
        return AnyRes(tuple((int(width), int(height)) for height, width in pins))
    if not hasattr(image_processor, "crop_to_patches"):
        return None
    names = ("crop_to_patches", "min_patches", "max_patches")
    told = {
        name: settings[name] if settings.get(name) is not None else getattr(image_processor, name) for name in names
    }
    side = tile_side(image_processor, settings)
    found = tuple((w * side, h * side) for w, h in grids(told["min_patches"], told["max_patches"]))
    return ByProportion(found, image_processor, {**told, "patch_size": {"height": side, "width": side}})
