"""The grid of each image's tokens, where the sizes that a processor gives beside the pixels say it.

Sizes come in units of their own (patches, pixels), and models merge patches before they become tokens: the merge that
makes the sizes fill the placeholders is the right one. Where none does, nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vtr.integrations.llava import tile_layout
from vtr.integrations.qwen_vl import frames_layout

from vtr.image import Layout, framed

MERGES = range(1, 9)
"""How many patches, in each direction, may become one token."""
PATCHES = {
    "image": ("image_grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes"),
    "video": ("video_grid_thw", "target_sizes_videos"),
}
"""Inputs that give rows and columns of patches, [images, 2], or frames before them, [images, 3]."""
PIXELS = {"image": ("image_sizes",), "video": ()}
"""Inputs that give height and width in pixels, [images, 2]."""
POSITIONS = {"image": ("image_position_ids",), "video": ()}
"""Inputs that give every patch's (column, row), [images, patches, 2], −1 for padding."""
TILES = {"image": ("pixel_values",), "video": ("pixel_values_videos",)}
"""Inputs that hold tiles of one size, [tiles, channels, height, width] or with images (or frames) before them."""
Run = tuple[int, int, int]
Shape = tuple[int, int, int]
"""Frames, rows and columns."""


def layouts_of(config: Any, inputs: Mapping[str, Any], runs: Sequence[Run], kind: str) -> list[Layout] | None:
    """One layout an image or video, in the order of the placeholders; None where the inputs do not tell.

    Args:
        config: the model's. runs: (row, first, one past the last) of each run of this kind's placeholders.
        kind: "image" or "video".
    """
    for shapes in _said(config, inputs, kind):
        for merge in MERGES:
            merged = [(t, -(-h // merge), -(-w // merge)) for t, h, w in shapes]
            if _fill(merged, runs):
                return _frames(merged, runs) if kind == "video" else [_picture(*shape) for shape in merged]
    tile = _tile(config, inputs, runs, kind)
    if tile is None:
        return None
    count = sum(end - start for _, start, end in runs) // len(tile)
    return [framed(tile, i) for i in range(count)] if kind == "video" and len(runs) == 1 else [tile] * count


def rows_of_tokens(runs: Sequence[Run]) -> list[Layout]:
    """What is taken where nothing is known: every run of placeholders is an image of one row."""
    return [replace(tile_layout(1, end - start), known=False) for _, start, end in runs]


def _said(config: Any, inputs: Mapping[str, Any], kind: str) -> Iterator[list[Shape]]:
    """What the inputs say of all images, in patches."""
    for name in PATCHES[kind]:
        if (given := inputs.get(name)) is not None:
            yield [_shape(size) for size in _numbers(given)]
    for name in POSITIONS[kind]:
        if (given := inputs.get(name)) is not None:
            far = torch.as_tensor(given).flatten(0, -3).amax(-2) + 1
            yield [(1, h, w) for w, h in far.tolist()]
    patch = _patch(config)
    for name in PIXELS[kind]:
        if (given := inputs.get(name)) is not None and patch is not None:
            yield [(1, h // patch, w // patch) for _, h, w in map(_shape, _numbers(given))]


def _numbers(given: Any) -> list[Sequence[int]]:
    """Sizes as a processor gives them: a tensor, or lists, per row or not."""
    if isinstance(given, torch.Tensor):
        return given.flatten(0, -2).tolist()  # type: ignore[no-any-return]
    flat: list[Sequence[int]] = []
    for one in given:
        one = one.tolist() if isinstance(one, torch.Tensor) else one
        flat += one if len(one) and isinstance(one[0], (list, tuple, torch.Tensor)) else [one]
    return [tuple(map(int, size)) for size in flat]


def _shape(size: Sequence[int]) -> Shape:
    *frames, height, width = map(int, size)
    return (frames[0] if frames else 1, height, width)


def _patch(config: Any) -> int | None:
    """Pixels along a patch's side; None where it is not square, or not said."""
    size = getattr(getattr(config, "vision_config", None), "patch_size", None)
    size = size[0] if isinstance(size, (list, tuple)) and len(set(size)) == 1 else size
    return size if isinstance(size, int) and size > 0 else None


def _fill(shapes: Sequence[Shape], runs: Sequence[Run]) -> bool:
    """Whether images of these shapes fill the placeholders, none of them reaching from one row into the next."""
    per_row: dict[int, int] = {}
    for row, start, end in runs:
        per_row[row] = per_row.get(row, 0) + end - start
    sizes = iter(t * h * w for t, h, w in shapes)
    for room in per_row.values():
        while room > 0:
            room -= next(sizes, room + 1)
        if room:
            return False
    return next(sizes, None) is None


def _picture(frames: int, height: int, width: int) -> Layout:
    return tile_layout(height, width) if frames == 1 else frames_layout(frames, height, width)


def _frames(shapes: Sequence[Shape], runs: Sequence[Run]) -> list[Layout]:
    """Videos: an image each, or an image a frame where something stands between the frames."""
    if len(runs) > len(shapes):
        return [framed(tile_layout(h, w), i) for t, h, w in shapes for i in range(t)]
    return [framed(_picture(*shape), 0) for shape in shapes]


def _tile(config: Any, inputs: Mapping[str, Any], runs: Sequence[Run], kind: str) -> Layout | None:
    """The grid of tiles of one size: so many patches of theirs are merged that whole tiles fill every run."""
    pixels = next((inputs[name] for name in TILES[kind] if inputs.get(name) is not None), None)
    patch = _patch(config)
    if patch is None or not isinstance(pixels, torch.Tensor) or pixels.dim() < 4 or not runs:
        return None
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    lengths, total = [end - start for _, start, end in runs], sum(end - start for _, start, end in runs)
    for merge in MERGES:
        if rows % merge or columns % merge:
            continue
        height, width = rows // merge, columns // merge
        every = pixels.dim() > 4 or total == height * width * len(pixels)  # of more axes some may be padding
        if every and not any(n % (height * width) for n in lengths):
            return tile_layout(height, width)
    return None
