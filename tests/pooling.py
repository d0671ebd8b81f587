"""A slow reference of average pooling: where each family's tokens lie, cells as lists, means by hand.

Where tokens lie is told by transformers' own packing, to which coordinates are given as if they were features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tests import oracle, tiny

Place = tuple[int, int, int]
"""(tile or canvas, row, column) of a token, patches counted over a whole canvas; a newline has column NEWLINE."""
NEWLINE, MARK = 10_000, -9.0
SIDE = tiny.SIDE // tiny.PATCH
"""Patches per side of a tile (a thumbnail, a crop)."""


def tile(side: int, number: int = 0) -> list[Place]:
    return [(number, y, x) for y in range(side) for x in range(side)]


def anyres(model: Any, size: list[int]) -> list[Place]:
    """A thumbnail (0), then what is left of the canvas (1), row by row, with newlines."""
    pinpoints = model.config.image_grid_pinpoints
    rows, columns = get_anyres_image_grid_shape(size, pinpoints, tiny.SIDE)
    y, x = torch.meshgrid(torch.arange(rows * SIDE), torch.arange(columns * SIDE), indexing="ij")
    canvas = torch.stack([y, x], -1).view(rows, SIDE, columns, SIDE, 2).transpose(1, 2).reshape(-1, SIDE**2, 2)
    tiles = torch.cat([torch.zeros(1, SIDE**2, 2), canvas.float()])
    newline, sizes = torch.full((2,), MARK), torch.tensor([size])
    if model.config.model_type == "llava_next":
        packed = model.model.pack_image_features([tiles], sizes, "default", image_newline=newline)[0][0]
    else:
        packed = model.model.pack_image_features([tiles], sizes, newline, model.config.vision_aspect_ratio)[0][0]
    places = tile(SIDE)
    for y, x in packed[SIDE**2 :].tolist():
        if y == MARK:
            places.append((1, places[-1][1], NEWLINE))
        else:  # a canvas that was scaled down has its tokens between patches
            places.append((1, int(y + 0.501), int(x + 0.501)))
    return places


def images(model: Any, inputs: dict[str, Tensor]) -> list[tuple[list[Place], int]]:
    """Of every image of a batch-1 input, in order: its tokens' places, and the patches per side of its tiles."""
    kind = model.config.model_type
    if kind == "internvl":  # crops and thumbnail are tiles one behind the other
        marks = (inputs["input_ids"][0] == tiny.IMAGE_ID).tolist()
        runs = "".join("x" if mark else " " for mark in marks).split()
        return [([place for t in range(len(run) // 9) for place in tile(3, t)], 3) for run in runs]
    if kind == "llava":
        return [(tile(SIDE), SIDE)] * len(inputs.get("pixel_values", []))
    return [(anyres(model, size), SIDE) for size in inputs.get("image_sizes", torch.zeros(0, 2)).tolist()]


def video() -> tuple[list[Place], int]:
    """LLaVA-OneVision's video: frames of 3 × 3 tokens and one newline."""
    frames = [place for frame in range(tiny.FRAMES) for place in tile(3, frame)]
    return [*frames, (tiny.FRAMES, 0, NEWLINE)], 3


def cells(places: list[Place], side: int, grid: tuple[int, int]) -> list[list[int]]:
    """The tokens in each cell, cells row by row, each row's newlines behind it."""
    found: dict[Place, list[int]] = {}
    for i, (canvas, y, x) in enumerate(places):
        column = x if x == NEWLINE else x // side * grid[1] + x % side * grid[1] // side
        found.setdefault((canvas, y // side * grid[0] + y % side * grid[0] // side, column), []).append(i)
    return [found[place] for place in sorted(found)]


def pooled(
    row: oracle.Row, shapes: list[tuple[list[Place], int]], grid: tuple[int, int]
) -> tuple[oracle.Row, list[list[int]]]:
    """The shorter row, and the slots that each of its vision tokens was made from."""
    slots, made_of, parts, at = row.slots, [], [], 0
    marks: list[bool] = []
    for places, side in shapes:
        own, slots = slots[: len(places)], slots[len(places) :]
        parts.append(row.embeds[at : own[0]])
        marks += [False] * (own[0] - at)
        at = own[-1] + 1
        for cell in cells(places, side, grid):
            made_of.append([own[i] for i in cell])
            parts.append(row.embeds[made_of[-1]].mean(0, keepdim=True))
            marks.append(True)
    assert not slots
    parts.append(row.embeds[at:])
    marks += [False] * (len(row.embeds) - at)
    return oracle.Row(torch.cat(parts), torch.tensor(marks)), made_of
