"""InternVL as transformers has it: crops in rows, the thumbnail last, pixel-shuffled patches, no newline tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d
from vtr.integrations.llava import tile_layout

from vtr.engine.adapters import Adapter
from vtr.image import CROP_GRIDS, Layout, framed

MOST_LABEL = 16
"""Tokens that may lie between two frames of a video: a line break and "Frame12: ", with <img> and </img>."""
SMALL = (48, 48)
"""Pixels that are enough to tell arrangements of crops apart."""


def crops_of(tiles: torch.Tensor) -> tuple[int, int]:
    """(rows, columns) of an image's crops, found by laying them out in every way and comparing with the thumbnail.

    The processor does not say how it arranged them. A featureless picture fits every arrangement; the first is taken.

    Args:
        tiles: [n + 1, channels, height, width] pixels, n crops and the thumbnail.
    """
    n = len(tiles) - 1
    ways = [(rows, n // rows) for rows in range(1, n + 1) if n % rows == 0]
    small = adaptive_avg_pool2d(tiles.float(), SMALL)
    errors = []
    for rows, columns in ways:
        canvas = small[:-1].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        errors.append((adaptive_avg_pool2d(canvas, SMALL) - small[-1]).square().mean())
    return ways[int(torch.stack(errors).argmin())]


@lru_cache(maxsize=256)
def tiles_layout(count: int, grid: tuple[int, int], crops: tuple[int, int]) -> Layout:
    """``count`` tiles of ``grid`` tokens one behind the other; of several the last is the thumbnail, tile 0."""
    tile = tile_layout(*grid)
    number = torch.arange(1, count + 1) % count
    return Layout(
        number.repeat_interleave(len(tile)),
        tile.y.repeat(count),
        tile.x.repeat(count),
        tile.newline.repeat(count),
        grid,
        crops,
        thumbnail_last=count > 1,
        shrunk=lambda k: tiles_layout(count, (grid[0] // k, grid[1] // k), crops),
    )


@lru_cache(maxsize=256)
def grids_layout(grids: Sequence[tuple[int, int]], grid: tuple[int, int]) -> Layout:
    """Crops in several grids of (rows, columns), then the thumbnail; tiles of ``grid`` tokens."""
    counts = [rows * columns for rows, columns in grids]
    if len(grids) == 1:
        return tiles_layout(1 + counts[0], grid, grids[0])
    groups = tuple((1 + sum(counts[:i]), *one) for i, one in enumerate(grids))
    return replace(
        tiles_layout(1 + sum(counts), grid, (0, 0)),
        groups=groups,
        shrunk=lambda k: grids_layout(grids, (grid[0] // k, grid[1] // k)),
    )


def told_grids(inputs: Mapping[str, Any]) -> Iterator[tuple[tuple[int, int], ...]] | None:
    """Of each image of several tiles, in order, the grids that its crops lie in; None where the call does not say."""
    told = inputs.get(CROP_GRIDS)
    if told is None:
        return None
    return iter([tuple((rows, columns) for rows, columns in image if rows) for image in told.tolist()])


class InternVL(Adapter):
    """``InternVLForConditionalGeneration`` (the ``-hf`` checkpoints). A video's frames are images of one tile each
    (:func:`with_frames`)."""

    family = "InternVL"
    classes = ("InternVLForConditionalGeneration",)
    lacks = MappingProxyType(
        {
            "projector": "it merges states in front of the projector, which here takes 2 × 2 patches at once (pixel "
            "shuffle)"
        }
    )

    def grid(self, model: nn.Module, pixels: torch.Tensor) -> tuple[int, int]:
        """(height, width) of a tile in tokens, after the pixel shuffle."""
        config: Any = model.config
        patch = config.vision_config.patch_size
        patch = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        ratio = self.downsample_ratio(model)
        height, width = (int(n // p * ratio) for n, p in zip(pixels.shape[-2:], patch, strict=True))
        return height, width

    def downsample_ratio(self, model: nn.Module) -> float:
        return model.config.downsample_ratio  # type: ignore[union-attr,return-value]

    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """One image per run of placeholders: the processor puts text (``<img>``, ``</img>``) between images.

        ``crop_grids`` (:data:`vtr.image.CROP_GRIDS`) says how crops lie, where it is given; else the pixels do.

        Raises:
            ValueError: a run of placeholders that is no whole number of tiles, or of exactly two; grids that are not
                those of the images.
        """
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return {}
        grid = self.grid(model, pixels)
        layouts, first, (placeholder,), told = [], 0, self.placeholders(model), told_grids(inputs)
        runs = runs_of(inputs["input_ids"] == placeholder)
        for _, start, end in runs:
            run = end - start
            count, left = divmod(run, grid[0] * grid[1])
            if left or count == 2:
                raise ValueError(
                    f"{run} image placeholders in a row are not the tiles of one image ({grid[0] * grid[1]} tokens a "
                    "tile; one tile, or at least two crops and a thumbnail): pass what the processor returned, with "
                    "text or <img> </img> between images"
                )
            if told is not None and count > 1:
                layouts.append(_as_told(next(told, ()), grid, count))
            else:
                guessable = count > 1 and first + count <= len(pixels)
                layouts.append(
                    tiles_layout(count, grid, crops_of(pixels[first : first + count]) if guessable else (0, 0))
                )
            first += count
        if first != len(pixels):
            raise ValueError(
                f"{len(pixels)} image tiles in pixel_values for the {first} that input_ids have placeholders for: "
                "tokenize text and images in one processor call, and do not truncate"
            )
        if told is not None and (left := len(list(told))):
            raise ValueError(f"{CROP_GRIDS} has grids of {left} more images than input_ids: {ONE_CALL}")
        return {placeholder: with_frames(layouts, runs, range(1, MOST_LABEL + 1))}


ONE_CALL = "pass all that one call of the processor returned"


def _as_told(grids: tuple[tuple[int, int], ...], grid: tuple[int, int], count: int) -> Layout:
    """The layout of an image of ``count`` tiles whose crops lie in ``grids``.

    Raises:
        ValueError: these grids do not have so many tiles.
    """
    said = 1 + sum(rows * columns for rows, columns in grids)
    if said != count:
        raise ValueError(f"{CROP_GRIDS} says {grids} and a thumbnail of an image of {count} tiles: {ONE_CALL}")
    return grids_layout(grids, grid)


def runs_of(marks: torch.Tensor) -> list[tuple[int, int, int]]:
    """(row, first, one past the last) of each run of True in the rows of ``marks``, bool [rows, L] on the CPU."""
    edges = torch.nn.functional.pad(marks.int(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    return [(row, start, end) for (row, start), (_, end) in zip(starts.tolist(), ends.tolist(), strict=True)]


def with_frames(layouts: list[Layout], runs: list[tuple[int, int, int]], label: range) -> list[Layout]:
    """The images of a call, those marked that are frames of a video, where nothing but the prompt's shape tells.

    Frames are images of one tile with a label before each ("Frame2: "), so that only so many tokens lie between two.
    Several small pictures that stand so close together look the same.

    Args:
        runs: (row, first, one past the last) of each image's placeholders.
        label: how many tokens may lie between two frames.
    """
    numbers: list[int | None] = [None] * len(runs)
    for i in range(1, len(runs)):
        (row, _, end), (here, start, _) = runs[i - 1 : i + 1]
        if row == here and layouts[i - 1].tiles == layouts[i].tiles == 1 and start - end in label:
            before = numbers[i - 1] or 0
            numbers[i - 1], numbers[i] = before, before + 1
    return [one if number is None else framed(one, number) for one, number in zip(layouts, numbers, strict=True)]
