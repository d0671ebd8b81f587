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


def _shares(layout: Layout, kept: set[int], tiles: str) -> np.ndarray:
    """Which patches of the thumbnail or of the crops' canvas are kept: [height, width] of 0 and 1."""
    height, width = layout.grid
    y, x, tile = layout.y.numpy(), layout.x.numpy(), layout.tile.numpy()
    mine = (layout.newline.numpy() == 0) & ((tile == 0) if tiles == "thumbnail" else (tile > 0))
    if tiles == "crops":
        columns = layout.crops[1]
        y, x = y + (tile - 1) // columns * height, x + (tile - 1) % columns * width
    y, x, index = y[mine], x[mine], np.nonzero(mine)[0]
    if not len(index):  # a sliver of a picture has no crop patches
        return np.zeros((1, 1))
    y, x = y - y.min(), x - x.min()  # the canvas is cut back to the picture
    grid = np.zeros((y.max() + 1, x.max() + 1))
    grid[y, x] = [i in kept for i in index]
    return grid


def _faded(picture: Image.Image, grid: np.ndarray) -> np.ndarray:
    """The picture with dropped patches faded; every pixel follows the patch it lies in."""
    pixels = np.asarray(picture.convert("RGB"), float) / 255
    rows = np.arange(pixels.shape[0]) * grid.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * grid.shape[1] // pixels.shape[1]
    stays = grid[rows[:, None], columns[None, :], None]
    away = DIM if pixels.mean() < 0.5 else 0.0
    return pixels * stays + (1 - stays) * (pixels * (1 - DIM) + away)


def kept_pixels(
    picture: Image.Image, layout: Layout, first_slot: int, row: RowReport, layer: int, tiles: str = "crops"
) -> np.ndarray:
    """The picture with what does not enter ``layer`` faded: [height, width, 3], floats in [0, 1].

    Args:
        picture: what the tiles show (see :func:`seen`). layout: of its tokens. first_slot: the row's slot of its first
            token. row: the report's row. tiles: "thumbnail" or "crops".
    """
    kept = {slot - first_slot for made_of in row.sources(layer) for slot in made_of}
    return _faded(picture, _shares(layout, kept, tiles))


def seen(picture: Image.Image, layout: Layout) -> Image.Image:
    """What the model sees of a picture: of one square tile only the middle, as CLIP's processor cuts it."""
    if layout.crops != (0, 0):
        return picture
    side = min(picture.size)
    left, upper = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, upper, left + side, upper + side))


def show_kept(
    picture: Image.Image,
    layout: Layout,
    first_slot: int,
    row: RowReport,
    layers: list[int] | None = None,
    title: str = "",
) -> Figure:
    """Draw what is kept of one image: the picture, then thumbnail and crops on entering some layers.

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
    picture = seen(picture, layout)
    height = 2.6 * len(kinds) + 0.5
    figure = Figure(figsize=(2.6 * (len(layers) + 1), height), layout="constrained")
    axes = figure.subplots(len(kinds), len(layers) + 1, squeeze=False)
    for line, kind in enumerate(kinds):
        axes[line][0].imshow(np.asarray(picture.convert("RGB")))
        axes[line][0].set_ylabel(kind, fontsize=9)
        axes[line][0].set_title("picture" if line == 0 else "", fontsize=9)
        for column, layer in enumerate(layers, 1):
            axes[line][column].imshow(kept_pixels(picture, layout, first_slot, row, layer, kind))
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
