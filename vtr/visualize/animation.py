"""The image layer by layer, as an animated GIF."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vtr.picture import crop_lines, points
from vtr.visualize.look import COLORS, SIDE, frame, shortened
from vtr.visualize.shots import Shot

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Animation:
    """Frames, a decoder layer each; a notebook shows them moving.

    Attributes:
        frames: PIL images of one size. seconds: how long each is shown (the last one three times as long).
    """

    frames: list[Image.Image]
    seconds: float

    def save(self, path: str | Path) -> Path:
        """Write an animated GIF that repeats.

        Raises:
            ValueError: ``path`` does not end in .gif.
        """
        path = Path(path)
        if path.suffix.lower() != ".gif":
            raise ValueError(f"{path}: an animation is written as a GIF, e.g. {path.with_suffix('.gif').name}")
        path.write_bytes(self.gif())
        return path

    def gif(self) -> bytes:
        """The bytes of the GIF."""
        from PIL.Image import Dither, Quantize

        buffer, each = io.BytesIO(), round(self.seconds * 1000)
        colors = [frame.quantize(128, Quantize.MAXCOVERAGE, dither=Dither.NONE) for frame in self.frames]
        times = [each] * (len(colors) - 1) + [3 * each]
        colors[0].save(buffer, "GIF", save_all=True, append_images=colors[1:], duration=times, loop=0)
        return buffer.getvalue()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        # as HTML: what shows saved notebooks (GitHub, nbconvert) leaves outputs of type image/gif out
        source = f"data:image/gif;base64,{base64.b64encode(self.gif()).decode()}"
        text = f"{len(self.frames)} frames"
        return {"text/html": f'<img src="{source}" alt="{text}">', "text/plain": text}


def animate(shot: Shot, path: str | Path | None = None, seconds: float = 0.7) -> Animation:
    """The image layer by layer: what enters each decoder layer, and where on the staircase that is.

    Args:
        path: write a GIF there. seconds: how long a layer is shown.

    Raises:
        ValueError: seconds not above 0; a path that is no GIF's.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds!r}: how long a layer is shown, more than 0")
    frames = [_frame_of(shot, layer) for layer in range(len(shot.row.vision_tokens))]
    made = Animation(frames, seconds)
    if path is not None:
        made.save(path)
    return made


def _frame_of(shot: Shot, layer: int) -> Image.Image:
    """One layer's frame: thumbnail, crops, staircase with this layer's step colored."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    counts, kinds = shot.row.vision_tokens, shot.tiles
    width = SIDE * len(kinds) + 3.2
    size = points(width)
    figure = Figure(figsize=(width, SIDE + (8 if shot.question else 4) * size / 72), dpi=90, layout="constrained")
    axes = figure.subplots(1, len(kinds) + 1, width_ratios=[1] * len(kinds) + [1.15])
    for axis, kind in zip(axes, kinds, strict=False):
        axis.imshow(shot.pixels(layer, kind))
        axis.set_title(kind, fontsize=size)
        frame(axis, "0.4")
        if kind == "crops":
            crop_lines(axis, shot.layout, shot.picture)
    stairs = axes[-1]
    bars = ["0.8" if n != layer else COLORS[1] for n in range(len(counts))]
    stairs.bar(range(len(counts)), counts, width=0.9, color=bars)
    stairs.set_ylim(0, max(shot.row.total, 1) * 1.08)
    stairs.set_xticks([0, len(counts) - 1] if len(counts) > 1 else [0])
    stairs.set_xlabel("decoder layer", fontsize=size)
    stairs.set_title(f"into layer {layer}: {counts[layer]} of {shot.row.total}", fontsize=size, color=COLORS[1])
    stairs.spines[["top", "right"]].set_visible(False)
    stairs.tick_params(labelsize=size)
    asked = f"\n{shortened(shot.question, 60)}\n{shortened(shot.verdict[0], 70)}" if shot.question else ""
    figure.suptitle(shortened(shot.label, 70) + asked, fontsize=size, color=shot.verdict[1] if asked else "black")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
