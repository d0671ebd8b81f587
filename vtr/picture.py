"""The kept tokens laid over the picture they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vtr.accounting import RowReport
from vtr.base import Layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

DIM = 0.8
"""How far dropped patches fade (light pictures to black, dark ones to white)."""


def _tokens(layout: Layout, made_of: list[list[int]], tiles: str) -> np.ndarray:
    """Which token each patch of the thumbnail or of the crops' canvas went into: [height, width], -1 for none.

    made_of: the patches (indices into the layout) each token was made from.
    """
    token = np.full(len(layout), -1)
    for number, patches in enumerate(made_of):
        token[patches] = number
    height, width = layout.grid
    y, x, tile = layout.y.numpy(), layout.x.numpy(), layout.tile.numpy()
    mine = (layout.newline.numpy() == 0) & ((tile == 0) if tiles == "thumbnail" else (tile > 0))
    if tiles == "crops":
        columns = layout.crops[1]
        y, x = y + (tile - 1) // columns * height, x + (tile - 1) % columns * width
    y, x, index = y[mine], x[mine], np.nonzero(mine)[0]
    if not len(index):  # a sliver of a picture has no crop patches
        return np.full((1, 1), -1)
    y, x = y - y.min(), x - x.min()  # the canvas is cut back to the picture
    grid = np.full((y.max() + 1, x.max() + 1), -1)
    grid[y, x] = token[index]
    return grid


def _drawn(picture: Image.Image, grid: np.ndarray) -> np.ndarray:
    """The picture with dropped patches faded and pooled ones in their mean colour; a pixel follows its patch.

    grid: which token each patch went into, -1 for none.
    """
    pixels = np.asarray(picture.convert("RGB"), float) / 255
    rows = np.arange(pixels.shape[0]) * grid.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * grid.shape[1] // pixels.shape[1]
    token = grid[rows[:, None], columns[None, :]]
    away = DIM if pixels.mean() < 0.5 else 0.0
    faded = pixels * (1 - DIM) + away
    patches = np.bincount(grid.ravel() + 1)  # of the dropped first, then of every token
    here = np.bincount(token.ravel() + 1, minlength=len(patches)).clip(1)
    colours = np.stack([np.bincount(token.ravel() + 1, c.ravel(), len(patches)) for c in np.moveaxis(pixels, 2, 0)], 1)
    pooled = (patches[token + 1] > 1)[..., None]
    alive = np.where(pooled, (colours / here[:, None])[token + 1], pixels)
    return np.where(token[..., None] >= 0, alive, faded)


def show_kept(
    picture: Image.Image,
    layout: Layout,
    first_slot: int,
    row: RowReport,
    layers: list[int] | None = None,
    title: str = "",
) -> Figure:
    """Draw what is kept of one image: the picture, then thumbnail and crops on entering some layers.

    Dropped patches are faded; patches that were pooled have the mean colour of all that went into their token.

    Args:
        picture: as given to the processor. layout: of its tokens. first_slot: the row's slot of its first token.
        row: the report's row. layers: which decoder layers; by default those at which the number of tokens changes.
        title: stands above.

    Returns:
        A matplotlib figure (``figure.savefig("kept.png")``).
    """
    from matplotlib.figure import Figure

    counts = row.vision_tokens
    changes = [n for n in range(len(counts)) if n == 0 or counts[n] != counts[n - 1]]
    layers = layers or ([*changes[:3], changes[-1]] if len(changes) > 4 else changes)
    kinds = ["thumbnail", "crops"] if layout.crops != (0, 0) else ["thumbnail"]
    if layout.crops == (0, 0):  # one square tile: the middle of the picture, as CLIP's processor cuts it
        side = min(picture.size)
        left, upper = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, upper, left + side, upper + side))
    height = 2.6 * len(kinds) + 0.5
    figure = Figure(figsize=(2.6 * (len(layers) + 1), height), layout="constrained")
    axes = figure.subplots(len(kinds), len(layers) + 1, squeeze=False)
    for line, kind in enumerate(kinds):
        axes[line][0].imshow(np.asarray(picture.convert("RGB")))
        axes[line][0].set_ylabel(kind, fontsize=9)
        axes[line][0].set_title("picture" if line == 0 else "", fontsize=9)
        for column, layer in enumerate(layers, 1):
            here = range(first_slot, first_slot + len(layout))
            made_of = [[slot - first_slot for slot in slots if slot in here] for slots in row.sources(layer)]
            axes[line][column].imshow(_drawn(picture, _tokens(layout, made_of, kind)))
            if line == 0:
                axes[line][column].set_title(f"into layer {layer}: {counts[layer]} of {row.total}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def image_spans(model: Any, inputs: Any) -> list[tuple[int, int, Layout]]:
    """(row, first slot, layout) of every image of a call's inputs, in order."""
    from vtr.engine.install import patch_of
    from vtr.engine.prompt import read_prompt

    prompt = read_prompt(patch_of(model).adapter, model, inputs["input_ids"], None, inputs)
    spans = []
    for row, images in enumerate(prompt.layouts):
        slots, start = prompt.is_vision[row].nonzero().squeeze(1).tolist(), 0
        for layout in images:
            spans.append((row, slots[start], layout))
            start += len(layout)
    return spans
