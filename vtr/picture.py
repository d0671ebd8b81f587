"""The kept and pooled tokens laid over the picture they came from."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from vtr.accounting import RowReport
from vtr.image import Layout, frames_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

DIM = 0.8
"""How far dropped patches fade (light pictures to black, dark ones to white)."""
LINE = 0.5
"""How far the lines between pooled cells fade."""
HEAT = 0.72
"""How much of a heat map covers the picture."""

RIGHT, WRONG = "#1b7f3b", "#c0392b"
"""Colors of right and wrong answers, which also have a sign."""
SHOWN_AT, LETTERS = 700, 11.5
"""Pixels across at which a figure's labels can be read, and the size of their letters there."""

LINE_OF = 75
"""Letters of that size that fit across."""


def points(width: float, letters: float = LETTERS) -> float:
    """The font size of letters ``letters`` pixels high, once a figure of ``width`` inches is shown SHOWN_AT wide."""
    return letters * 72 * width / SHOWN_AT


def is_right(said: str, expected: str | None) -> bool | None:
    """Whether an answer is the expected one, but for case, spaces and a full stop; None where none is expected."""
    return None if expected is None else _bare(said) == _bare(expected)


def _bare(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def verdict(said: str, expected: str | None) -> tuple[str, str]:
    """(what stands on a picture, its color): a right answer with ✓, a wrong one with ✗ and what is right."""
    right = is_right(said, expected)
    if right is None:
        return f"→ {said}", "black"
    return (f"✓ {said}", RIGHT) if right else (f"✗ {said}  (right: {expected})", WRONG)


def finest(layout: Layout) -> tuple[int, int]:
    """(rows, columns) of the crops that are drawn: of several grids the finest; (0, 0) where there are none."""
    return layout.groups[0][1:] if layout.groups else layout.crops


def views(layout: Layout) -> list[str]:
    """What there is to see of an image: the thumbnail, and the crops where there are any."""
    return ["thumbnail", "crops"] if finest(layout) != (0, 0) else ["thumbnail"]


def _cells(layout: Layout, made_of: list[list[int]], tiles: str) -> np.ndarray:
    """Which token shows each patch of the thumbnail or of the crops' canvas: [height, width], -1 for none."""
    height, width = layout.grid
    y, x, tile = layout.y.numpy(), layout.x.numpy(), layout.tile.numpy()
    mine = (layout.newline.numpy() == 0) & (layout.group.numpy() == (0 if tiles == "thumbnail" else 1))
    if tiles == "crops":
        columns = finest(layout)[1]
        y, x = y + (tile - 1) // columns * height, x + (tile - 1) % columns * width
    y, x, index = y[mine], x[mine], np.nonzero(mine)[0]
    if not len(index):  # a sliver of a picture has no crop patches
        return np.full((1, 1), -1)
    y, x = y - y.min(), x - x.min()  # the canvas is cut back to the picture
    shown_by = np.full(len(layout), -1)
    for token, patches in enumerate(made_of):
        shown_by[patches] = token
    grid = np.full((y.max() + 1, x.max() + 1), -1)
    grid[y, x] = shown_by[index]
    return grid


def _of_pixels(cells: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The entry of ``cells`` that each pixel of [height, width, …] lies in: [height, width]."""
    rows = np.arange(pixels.shape[0]) * cells.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * cells.shape[1] // pixels.shape[1]
    found: np.ndarray = cells[rows[:, None], columns[None, :]]
    return found


def _painted(picture: Image.Image, cells: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """The picture with dropped patches faded and pooled cells in their mean color; pixels follow the patch they lie in.

    Args:
        pooled: [tokens], whether a token was made from several.
    """
    pixels = np.asarray(picture.convert("RGB"), float) / 255
    cell = _of_pixels(cells, pixels)
    away = DIM if pixels.mean() < 0.5 else 0.0
    faded = pixels * (1 - DIM) + away
    size = np.bincount(cell[cell >= 0], minlength=len(pooled)).clip(1)
    colors = [np.bincount(cell[cell >= 0], c[cell >= 0], len(pooled)) / size for c in np.moveaxis(pixels, 2, 0)]
    means = np.stack(colors, 1)
    many = (cell >= 0) & pooled[cell]
    edge = np.zeros_like(many)
    edge[1:] |= cell[1:] != cell[:-1]
    edge[:, 1:] |= cell[:, 1:] != cell[:, :-1]
    out = np.where((cell < 0)[..., None], faded, pixels)
    out = np.where(many[..., None], means[cell], out)
    return np.where((edge & many)[..., None], out * (1 - LINE) + LINE * round(1 - pixels.mean()), out)


def crop_lines(axis: Any, layout: Layout, picture: Image.Image) -> None:
    """Draw lines on a matplotlib axis where one crop ends and the next begins."""
    (rows, columns), (h, w) = finest(layout), layout.grid
    top, left, height, width = layout.window or (0, 0, rows * h, columns * w)
    for row in range(1, rows):
        if 0 < row * h - top < height:
            axis.axhline((row * h - top) / height * picture.height, color="C3", lw=1, ls="--")
    for column in range(1, columns):
        if 0 < column * w - left < width:
            axis.axvline((column * w - left) / width * picture.width, color="C3", lw=1, ls="--")


def kept_pixels(
    picture: Image.Image, layout: Layout, first_slot: int, row: RowReport, layer: int, tiles: str = "crops"
) -> np.ndarray:
    """The picture with what does not enter ``layer`` faded and pooled cells of one color: [height, width, 3] in [0, 1].

    Args:
        picture: what the tiles show (see :func:`seen`). layout: of its tokens. first_slot: the row's slot of its first
            token. row: the report's row. tiles: "thumbnail" or "crops".
    """
    n = len(layout)
    made_of = [[s - first_slot for s in some if 0 <= s - first_slot < n] for some in row.sources(layer)]
    pooled = np.array([len(some) > 1 for some in made_of] or [False])
    return _painted(picture, _cells(layout, made_of, tiles), pooled)


def ranked_pixels(picture: Image.Image, layout: Layout, ranks: np.ndarray, tiles: str = "crops") -> np.ndarray:
    """The picture in gray under a heat map: [height, width, 3] in [0, 1].

    Args:
        ranks: [len(layout)], 1 for the hottest token, 0 for the coldest. tiles: "thumbnail" or "crops".
    """
    from matplotlib import colormaps

    cells = _cells(layout, [[i] for i in range(len(layout))], tiles)
    gray = np.asarray(picture.convert("L"), float) / 255
    cell = _of_pixels(cells, gray)
    heat = colormaps["inferno"](ranks[cell])[..., :3]
    return np.where((cell < 0)[..., None], gray[..., None], HEAT * heat + (1 - HEAT) * gray[..., None])


def seen(picture: Image.Image, layout: Layout) -> Image.Image:
    """What the model sees of a picture: of one square tile only the middle, as CLIP's processor cuts it."""
    if finest(layout) != (0, 0):
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
    note: tuple[str, str] = ("", "black"),
) -> Figure:
    """Draw what is kept of one image: the picture, then thumbnail and crops on entering some layers.

    Dropped patches are faded, pooled ones shown as cells of one color; dashed lines part the crops.

    Args:
        picture: as given to the processor. layout: of its tokens. first_slot: the row's slot of its first token.
        row: the report's row. layers: which decoder layers; by default those at which the number of tokens changes.
        title: stands above. note: stands below; the text (an answer, see :func:`verdict`) and its color.

    Returns:
        A matplotlib figure (``figure.savefig("kept.png")``).
    """
    from matplotlib.figure import Figure

    counts = row.vision_tokens
    changes = [n for n in range(len(counts)) if n == 0 or counts[n] != counts[n - 1]]
    layers = layers or ([*changes[:3], changes[-1]] if len(changes) > 4 else changes)
    kinds = views(layout)
    picture = seen(picture, layout)
    width = 2.6 * (len(layers) + 1)
    size = points(width)
    title, said = "\n".join(fill(line, LINE_OF) for line in title.split("\n")), fill(note[0], LINE_OF)
    apart = " " if len(layers) <= 3 else "\n"
    lines = 4 + title.count("\n") + said.count("\n")
    figure = Figure(figsize=(width, 2.6 * len(kinds) + lines * 1.5 * size / 72), layout="constrained")
    axes = figure.subplots(len(kinds), len(layers) + 1, squeeze=False)
    for line, kind in enumerate(kinds):
        axes[line][0].imshow(np.asarray(picture.convert("RGB")))
        axes[line][0].set_ylabel(kind, fontsize=size)
        axes[line][0].set_title("picture" if line == 0 else "", fontsize=size)
        for column, layer in enumerate(layers, 1):
            axes[line][column].imshow(kept_pixels(picture, layout, first_slot, row, layer, kind))
            if kind == "crops":
                crop_lines(axes[line][column], layout, picture)
            if line == 0:
                axes[line][column].set_title(f"into layer {layer}:{apart}{counts[layer]} of {row.total}", fontsize=size)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if title:
        figure.suptitle(title, fontsize=1.1 * size)
    if said:
        figure.supxlabel(said, fontsize=1.2 * size, color=note[1], fontweight="bold")
    return figure


def vision_tokens(model: Any, inputs: Any, row: int = 0) -> int:
    """How many vision tokens a row of a call's inputs has before any policy of the model acts."""
    import torch

    from vtr.engine.adapters import find_adapter

    ids = inputs["input_ids"]
    marks = torch.tensor(find_adapter(model).placeholders(model), device=ids.device)
    return int(torch.isin(ids[row], marks).sum())


def image_spans(model: Any, inputs: Any) -> list[tuple[int, int, Layout]]:
    """(row, first slot, layout) of every image of a call's inputs, in order."""
    from vtr.engine.install import patch_of
    from vtr.engine.prompt import read_prompt

    patch = patch_of(model)
    prompt = read_prompt(patch.adapter, patch.model, inputs["input_ids"], None, inputs)
    spans = []
    for row, images in enumerate(prompt.layouts):
        slots, start = prompt.is_vision[row].nonzero().squeeze(1).tolist(), 0
        for layout in images:
            spans.append((row, slots[start], layout))
            start += len(layout)
    return spans


def frame_spans(model: Any, inputs: Any) -> list[tuple[int, Layout]]:
    """(first slot, layout) of every frame of a call's only row: of each image, or of each tile of a video."""
    found = []
    for _, slot, layout in image_spans(model, inputs):
        if layout.first_frame is None or layout.tiles == 1:
            found.append((slot, layout))
            continue
        for at in frames_of(layout):
            one = Layout(layout.tile[at] * 0, layout.y[at], layout.x[at], layout.newline[at], layout.grid)
            found.append((slot + int(at[0]), one))
    return found
