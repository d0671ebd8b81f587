"""MSAC, Mini-Monkey's multi-scale adaptive crops (Huang et al., ICLR 2025, arXiv 2408.02034): two grids a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vtr.base import UnsupportedError
from vtr.image import CROP_GRIDS
from vtr.inputs import InputPolicy, Size, mapped
from vtr.policies.input._crops import grids, tile_side
from vtr.settings import register_policy

MOST = 64
"""Tiles that a grid may have."""


def closest(size: Size, among: Sequence[Size], tile: int) -> Size:
    """(columns, rows) of the grid whose proportions are nearest to a picture's: InternVL's choice.

    Of equally near ones the later is taken if the picture has more than half of its pixels. (1, 1) if there are none.

    Args:
        size: (width, height) of the picture in pixels. among: grids, by area. tile: the side of a tile in pixels.
    """
    width, height = size
    least, found = float("inf"), (1, 1)
    for columns, rows in among:
        off = abs(width / height - columns / rows)
        if off < least or (off == least and width * height > 0.5 * tile * tile * columns * rows):
            least, found = off, (columns, rows)
    return found


@register_policy("msac")
@dataclass
class MSAC(InputPolicy):
    """Cuts a picture into two grids of crops, so that what lies on a cut of one is whole in the other. Costs tokens.

    No reduction: the input that ``scm`` was made for (``msac+scm``), on InternVL. The tiles are those of the detail
    grid, those of the adaptive grid, and the thumbnail. Grids of one tile are left out, since that is the thumbnail.

    Huang et al., ICLR 2025, arXiv 2408.02034. The official settings are those of the demo; its evaluation has others
    for each data set. The demo puts the adaptive grid in front of the detail grid; the evaluation and the training,
    which ``scm`` needs, do as here.

    Args:
        detail: fewest and most tiles of the detail grid. adaptive: of the adaptive grid.
        rule: which adaptive grids may be: "or" (demo and evaluation): the detail grid's columns or rows are no multiple
            of theirs. "and" (training): neither are.

    Raises:
        TypeError, ValueError: no two numbers of tiles, 1 ≤ fewest ≤ most ≤ 64.
    """

    detail: tuple[int, int] = (4, 12)
    adaptive: tuple[int, int] = (3, 7)
    rule: Literal["or", "and"] = "or"

    def __post_init__(self) -> None:
        for name in ("detail", "adaptive"):
            setattr(self, name, _checked(name, getattr(self, name)))
        if self.rule not in ("or", "and"):
            raise ValueError(f"rule={self.rule!r}: choose 'or' or 'and'")

    def grids_for(self, size: Size, tile: int) -> tuple[Size, Size]:
        """(columns, rows) of the detail grid and of the adaptive grid.

        Args:
            size: (width, height) of the picture in pixels. tile: the side of a tile in pixels.
        """
        detail = closest(size, grids(*self.detail), tile)
        cuts = any if self.rule == "or" else all
        others = [grid for grid in grids(*self.adaptive) if cuts(d % n for d, n in zip(detail, grid, strict=True))]
        return detail, closest(size, others, tile)

    def check_processor(self, image_processor: Any) -> None:
        """Raise UnsupportedError for all but InternVL's image processors."""
        if not all(hasattr(image_processor, name) for name in ("crop_to_patches", "min_patches", "max_patches")):
            raise UnsupportedError(
                f"{self.name!r} cuts tiles as InternVL does, and {type(image_processor).__name__} does not: use it "
                "with InternVL, or leave it out"
            )

    def process(self, image_processor: Any, images: Any, settings: Mapping[str, Any]) -> Any:
        """``pixel_values`` [tiles, 3, height, width], ``num_patches``, and ``crop_grids`` of how the crops lie."""
        import torch
        from transformers import BatchFeature

        made: list[tuple[Any, list[Size]]] = []
        mapped(lambda one: made.append(self._tiles(image_processor, one, settings)), images)
        pixels = torch.cat([tiles for tiles, _ in made])
        lying = [[(rows, columns) if columns * rows > 1 else (0, 0) for columns, rows in found] for _, found in made]
        told = [one for one, (tiles, _) in zip(lying, made, strict=True) if len(tiles) > 1]
        as_type = settings.get("return_tensors")
        data = {"pixel_values": pixels if as_type else list(pixels), "num_patches": [len(tiles) for tiles, _ in made]}
        out = BatchFeature(data, tensor_type=as_type)
        out[CROP_GRIDS] = torch.tensor(told, dtype=torch.int64).view(-1, 2, 2)
        return out

    def _tiles(self, image_processor: Any, picture: Any, settings: Mapping[str, Any]) -> tuple[Any, list[Size]]:
        """One picture's tiles [n, 3, height, width], and its two grids."""
        side = tile_side(image_processor, settings)
        found = list(self.grids_for(picture.size, side))

        def cut(shown: Any, least: int, most: int) -> Any:
            given = {**settings, "crop_to_patches": True, "min_patches": least, "max_patches": most}
            return image_processor([shown], **{**given, "return_tensors": "pt"})["pixel_values"]

        (columns, rows), (across, down) = found
        tiles, count = [cut(picture, *self.detail)], columns * rows
        if len(tiles[0]) != (count + 1 if count > 1 else 1):
            raise RuntimeError(f"{type(image_processor).__name__} cuts {len(tiles[0])} tiles, not those of {found[0]}")
        if across * down > 1:
            resample = settings.get("resample") or image_processor.resample
            stretched = picture.resize((across * side, down * side), resample)
            tiles.insert(1, cut(stretched, across * down, across * down)[:-1])
        return _behind(tiles), found


def _behind(tiles: list[Any]) -> Any:
    """The crops of the first, all of the others, then the first's thumbnail."""
    import torch

    first, *others = tiles
    return torch.cat([first[:-1], *others, first[-1:]])


def _checked(name: str, given: Any) -> tuple[int, int]:
    if not isinstance(given, (list, tuple)) or any(isinstance(n, bool) or not isinstance(n, int) for n in given):
        raise TypeError(f"{name} must be the fewest and the most tiles, e.g. [4,12], got {given!r}")
    if len(given) != 2 or not 1 <= given[0] <= given[1] <= MOST:
        raise ValueError(f"{name}={list(given)}: fewest and most tiles, 1 ≤ fewest ≤ most ≤ {MOST}")
    return given[0], given[1]
