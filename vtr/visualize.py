"""Pictures of policies: kept tokens on the image, tokens per layer, rankings, an animation, several side by side.

>>> shots = vtr.visualize.ask(model, processor, picture, "what color is the star", ["fastv:keep=0.1", "pool:grid=6"])
>>> vtr.visualize.kept(shots[0])                      # a matplotlib Figure; .savefig("kept.png")
>>> vtr.visualize.animate(shots[0]).save("kept.gif")

After a call of your own: ``shot = vtr.visualize.last(model, inputs, picture)``.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vtr.accounting import RowReport, report
from vtr.base import SCORES, Layout, Policy, Scores, Tokens
from vtr.picture import crop_lines, image_spans, kept_pixels, ranked_pixels, seen, show_kept

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

COLORS = ("#3b6fb6", "#d95f43", "#3f9b6b", "#8a5fb0", "#c9922b", "#4aa5b8", "#b0577f", "#6b6b6b")
SIDE = 2.6
"""Inches of one picture in a figure."""


@dataclass(frozen=True)
class Shot:
    """One image of one prompt, and what a policy kept of it.

    Attributes:
        picture: as given to the processor. layout: of its tokens. first_slot: the prompt's slot of its first token.
        row: the report's row. answer: what the model said, where that is known. flops: of the call.
    """

    picture: Image.Image
    layout: Layout
    first_slot: int
    row: RowReport
    answer: str = ""
    flops: int = 0

    @property
    def label(self) -> str:
        """The policy's spec string."""
        return self.row.policy or "none"

    @property
    def tiles(self) -> list[str]:
        """What there is to see: the thumbnail, and the crops where there are any."""
        return ["thumbnail", "crops"] if self.layout.crops != (0, 0) else ["thumbnail"]

    def pixels(self, layer: int, tiles: str | None = None) -> np.ndarray:
        """The picture with what does not enter ``layer`` faded: float [height, width, 3] in [0, 1].

        Args:
            tiles: "thumbnail" or "crops"; None for the finest there is.

        Raises:
            ValueError: no such layer, or tiles that this image does not have.
        """
        tiles = self.tiles[-1] if tiles is None else tiles
        if tiles not in self.tiles:
            raise ValueError(f"tiles={tiles!r}: this image has {' and '.join(self.tiles)}")
        picture = seen(self.picture, self.layout)
        return kept_pixels(picture, self.layout, self.first_slot, self.row, self.layer(layer), tiles)

    def layer(self, layer: int) -> int:
        """``layer`` counted from 0 (negative ones count from the end).

        Raises:
            ValueError: the decoder has no such layer.
        """
        depth = len(self.row.vision_tokens)
        if not -depth <= layer < depth:
            raise ValueError(f"layer={layer}, but the model has {depth} decoder layers: choose 0…{depth - 1}")
        return layer % depth


def last(model: Any, inputs: Any, picture: Image.Image, row: int = 0, image: int = 0) -> Shot:
    """What the last call of a patched model kept of one image.

    Args:
        inputs: what the call was given (``input_ids``, sizes). picture: the image, as given to the processor.
        row: which prompt of the batch. image: which of its images.

    Raises:
        ValueError: nothing was called yet, or the row has no such image, or it is a video.
    """
    done, depth = report(model), inputs["input_ids"].shape[0]
    if not 0 <= row < depth:
        raise ValueError(f"row={row}, but the call had {depth} row(s)")
    first_slot, layout = _span(model, inputs, row, image)
    return Shot(picture, layout, first_slot, done.rows[row], flops=done.flops if depth == 1 else 0)


def _span(model: Any, inputs: Any, row: int, image: int) -> tuple[int, Layout]:
    """(first slot, layout) of one image of one row."""
    mine = [(slot, layout) for b, slot, layout in image_spans(model, inputs) if b == row]
    if not 0 <= image < len(mine):
        have = f"{len(mine)} image(s), counted from 0" if mine else "no image: choose a row with one"
        raise ValueError(f"image={image} of row {row}: it has {have}")
    slot, layout = mine[image]
    if layout.crops == (0, 0) and layout.tiles > 1:
        raise ValueError("videos cannot be drawn: ask about one frame as an image")
    return slot, layout


def ask(
    model: Any,
    processor: Any,
    picture: Image.Image,
    question: str,
    policies: Sequence[Policy | str | None],
    max_new_tokens: int = 8,
) -> list[Shot]:
    """Ask one question under each of several policies, ``None`` among them for no reduction.

    Returns:
        A shot a policy, with the answer; the vision tower has run once.
    """
    import vtr
    from vtr.chat import decode, encode

    inputs = encode(processor, [question], [picture]).to(model.device)
    first_slot, layout = _span(vtr.patch(model), inputs, 0, 0)
    shots = []
    with torch.inference_mode(), vtr.shared_features(model):
        for policy in policies:
            out = model.generate(**inputs, policy=policy, max_new_tokens=max_new_tokens, do_sample=False)
            done, said = report(model), decode(processor, out, inputs["input_ids"].shape[1])[0]
            shots.append(Shot(picture, layout, first_slot, done.rows[0], said, done.flops))
    return shots


def kept(shot: Shot, layers: Sequence[int] | None = None, title: str | None = None) -> Figure:
    """What enters some layers, on thumbnail and crops: dropped patches faded, pooled ones cells of one color.

    Args:
        layers: by default those at which the number of tokens changes (at most four).
        title: above it; None for the policy and the answer.
    """
    if title is None:
        title = shot.label + (f"  →  {shot.answer}" if shot.answer else "")
    chosen = None if layers is None else [shot.layer(layer) for layer in layers]
    return show_kept(shot.picture, shot.layout, shot.first_slot, shot.row, chosen, title)


def side_by_side(shots: Sequence[Shot], layer: int = -1) -> Figure:
    """The same picture under several policies: what is left on entering ``layer``, with tokens, FLOPs and answer.

    Raises:
        ValueError: no shots, or of different pictures.
    """
    from matplotlib.figure import Figure

    _same_picture(shots)
    kinds = shots[0].tiles
    figure = Figure(figsize=(SIDE * len(shots) + 0.3, SIDE * len(kinds) + 0.7), layout="constrained", dpi=110)
    axes = figure.subplots(len(kinds), len(shots), squeeze=False)
    for column, shot in enumerate(shots):
        color = COLORS[column % len(COLORS)]
        for line, kind in enumerate(kinds):
            axis = axes[line][column]
            axis.imshow(shot.pixels(layer, kind))
            _frame(axis, color)
            if kind == "crops":
                crop_lines(axis, shot.layout, shot.picture)
            if column == 0:
                axis.set_ylabel(kind, fontsize=9)
        entered = shot.row.vision_tokens[shot.layer(layer)]
        cost = f" · {shot.flops / 1e9:.3g} GFLOPs" if shot.flops else ""
        axes[0][column].set_title(
            f"{_wrapped(shot.label)}\n{entered} of {shot.row.total} tokens\nmean {shot.row.mean_keep:.0%}{cost}",
            fontsize=8, color=color,
        )  # fmt: skip
        if shot.answer:
            axes[-1][column].set_xlabel(f"→ {shot.answer}", fontsize=10)
    return figure


def staircase(shots: Sequence[Shot] | Shot | dict[str, RowReport]) -> Figure:
    """Vision tokens that enter each decoder layer, a line a policy; the legend says the mean over layers.

    Args:
        shots: shots, or rows of reports by name.

    Raises:
        ValueError: nothing to draw.
    """
    from matplotlib.figure import Figure

    named = (
        shots if isinstance(shots, dict) else {s.label: s.row for s in ([shots] if isinstance(shots, Shot) else shots)}
    )
    if not named:
        raise ValueError("nothing to draw: give at least one shot, e.g. of vtr.visualize.ask(…)")
    figure = Figure(figsize=(7.2, 3.2 + 0.19 * len(named)), layout="constrained", dpi=110)
    axis = figure.subplots()
    lines: list[Any] = []
    for n, (name, row) in enumerate(named.items()):
        color, counts = COLORS[n % len(COLORS)], row.vision_tokens
        edges = np.arange(len(counts) + 1) - 0.5
        label = f"{_wrapped(name, 80)} · mean {row.mean_keep:.0%}"
        lines.append(axis.stairs(counts, edges, baseline=None, color=color, lw=2.4, label=label))
        axis.stairs(counts, edges, color=color, alpha=0.15 if len(named) == 1 else 0.0, fill=True)
    depth = max(len(row.vision_tokens) for row in named.values())
    axis.set_xticks(range(0, depth, max(1, depth // 12)))
    axis.set_xlim(-0.5, depth - 0.5)
    axis.set_ylim(0, 1.05 * max(row.total for row in named.values()) or 1)
    axis.set_xlabel("decoder layer")
    axis.set_ylabel("vision tokens that enter")
    axis.grid(axis="y", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=lines, frameon=False, fontsize=8, loc="outside lower center", ncols=1)
    return figure


@dataclass
class Watch(Policy):
    """Keeps everything and notes the attention every layer's vision tokens got in the layer before."""

    queries: Scores = "text"
    seen: list[np.ndarray] = field(default_factory=list)

    def needs(self, layer: int) -> Scores | None:
        return self.queries if layer else None

    def prune(self, layer: int, tokens: Tokens) -> None:
        if tokens.scores is not None:
            self.seen.append(tokens.scores.float().cpu().numpy())


def rankings(model: Any, inputs: Any, row: int = 0, queries: Scores = "text") -> np.ndarray:
    """How the text ranks the vision tokens in every layer, without reduction: float [num_hidden_layers - 1, n].

    1 is the token that got most attention, 0 the one that got least; line l is of layer l, which ranks a cut on
    entering layer l + 1. No layer's whole attention matrix is made.

    Args:
        row: which prompt of the batch. queries: whose attention: "text", "last", "text-max", "last-max".

    Raises:
        ValueError: unknown queries; no text behind the image.
    """
    if queries not in SCORES:
        raise ValueError(f"queries={queries!r}: choose one of {', '.join(map(repr, SCORES))}")
    watch = Watch(queries)
    policies: list[Policy | None] = [None] * inputs["input_ids"].shape[0]
    policies[row] = watch
    with torch.inference_mode():
        model(**inputs, policy=policies)
    scores = np.stack(watch.seen)
    return scores.argsort(1, kind="stable").argsort(1, kind="stable") / max(scores.shape[1] - 1, 1)


def ranking(
    model: Any,
    inputs: Any,
    picture: Image.Image,
    layers: Sequence[int] | None = None,
    row: int = 0,
    image: int = 0,
    queries: Scores = "text",
) -> Figure:
    """Heat map of the attention ranking: bright patches get most of the text's attention in a layer, dark ones least.

    Args:
        model: patched. inputs: of a prompt. picture: as given to the processor. layers: which layers' attention; by
            default four spread over the decoder. row, image: which. queries: see :func:`rankings`.

    Raises:
        ValueError: no such layer, row or image; unknown queries.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    first_slot, layout = _span(model, inputs, row, image)
    ranks = rankings(model, inputs, row, queries)
    depth = len(ranks)
    chosen = list(layers) if layers is not None else sorted({round(f * (depth - 1)) for f in (0, 0.33, 0.67, 1)})
    if bad := [layer for layer in chosen if not 0 <= layer < depth]:
        raise ValueError(f"layers={bad}: the attention of layers 0…{depth - 1} ranks what enters the next one")
    vision = [slot for b, slot, lay in image_spans(model, inputs) if b == row for slot in range(slot, slot + len(lay))]
    mine = slice(vision.index(first_slot), vision.index(first_slot) + len(layout))
    kinds = ["thumbnail", "crops"] if layout.crops != (0, 0) else ["thumbnail"]
    shown = seen(picture, layout)
    figure = Figure(figsize=(SIDE * (len(chosen) + 1) + 0.6, SIDE * len(kinds) + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots(len(kinds), len(chosen) + 1, squeeze=False)
    for line, kind in enumerate(kinds):
        axes[line][0].imshow(np.asarray(shown.convert("RGB")))
        axes[line][0].set_ylabel(kind, fontsize=9)
        for column, layer in enumerate(chosen, 1):
            axes[line][column].imshow(ranked_pixels(shown, layout, ranks[layer][mine], kind))
            if line == 0:
                axes[line][column].set_title(f"attention of layer {layer}", fontsize=9)
    for axis in axes.flat:
        _frame(axis, "0.4")
    bar = figure.colorbar(ScalarMappable(cmap="inferno"), ax=axes, shrink=0.7, pad=0.01, ticks=[0, 0.5, 1])
    bar.set_label(f"rank by attention from the text (queries={queries!r})", fontsize=8)
    bar.ax.set_yticklabels(["last", "middle", "first"], fontsize=8)
    return figure


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
        return {"image/gif": base64.b64encode(self.gif()).decode(), "text/plain": f"{len(self.frames)} frames"}


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
    figure = Figure(figsize=(SIDE * len(kinds) + 3.2, SIDE + 0.6), dpi=90, layout="constrained")
    axes = figure.subplots(1, len(kinds) + 1, width_ratios=[1] * len(kinds) + [1.15])
    for axis, kind in zip(axes, kinds, strict=False):
        axis.imshow(shot.pixels(layer, kind))
        axis.set_title(kind, fontsize=9)
        _frame(axis, "0.4")
        if kind == "crops":
            crop_lines(axis, shot.layout, shot.picture)
    stairs = axes[-1]
    bars = ["0.8" if n != layer else COLORS[1] for n in range(len(counts))]
    stairs.bar(range(len(counts)), counts, width=0.9, color=bars)
    stairs.set_ylim(0, max(shot.row.total, 1) * 1.08)
    stairs.set_xticks([0, len(counts) - 1] if len(counts) > 1 else [0])
    stairs.set_xlabel("decoder layer", fontsize=8)
    stairs.set_title(f"into layer {layer}: {counts[layer]} of {shot.row.total}", fontsize=9, color=COLORS[1])
    stairs.spines[["top", "right"]].set_visible(False)
    stairs.tick_params(labelsize=8)
    figure.suptitle(_wrapped(shot.label, 70), fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _same_picture(shots: Sequence[Shot]) -> None:
    if not shots:
        raise ValueError("nothing to draw: give at least one shot, e.g. of vtr.visualize.ask(…)")
    if any(shot.layout.tiles != shots[0].layout.tiles or shot.picture.size != shots[0].picture.size for shot in shots):
        raise ValueError("these shots are of different pictures: put shots of one picture side by side")


def _frame(axis: Any, color: str) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(color)
        spine.set_linewidth(1.4)


def _wrapped(label: str, width: int = 30) -> str:
    """A spec string, shortened where it would not fit."""
    return label if len(label) <= width else label[: width - 1] + "…"
