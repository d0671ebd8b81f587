"""What is kept of a picture, under one policy or several, and how many tokens enter each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vtr.accounting import RowReport
from vtr.picture import crop_lines, points, show_kept
from vtr.visualize.look import COLORS, SIDE, frame, shortened, wrapped
from vtr.visualize.shots import Shot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTER_WIDTH = 0.56
"""Of a letter, as a share of the font size."""
MOST_POINTS = 18.0
"""Of the labels above one picture of many: larger ones would not fit."""
LETTER = 0.077
"""Inches that a letter of an answer is wide."""


def kept(shot: Shot, layers: Sequence[int] | None = None, title: str | None = None) -> Figure:
    """What enters some layers, on thumbnail and crops: dropped patches faded, pooled ones cells of one color.

    Args:
        layers: by default those at which the number of tokens changes (at most four).
        title: above it; None for the policy and the question. The answer stands below, marked ✓ or ✗ where the right
            one is known.
    """
    if title is None:
        title = wrapped(shot.label, 60) + (f"\n{shot.question}" if shot.question else "")
    chosen = None if layers is None else [shot.layer(layer) for layer in layers]
    return show_kept(shot.picture, shot.layout, shot.first_slot, shot.row, chosen, title, shot.verdict)


def film(shots: Sequence[Shot], times: Sequence[float] | None = None, layer: int = -1, columns: int = 8) -> Figure:
    """The frames of a video, in order: what enters ``layer`` of each, and how many of its tokens that are.

    Args:
        shots: one a frame, of one call. times: the second at which each was taken. columns: so many frames in a line.

    Raises:
        ValueError: no shots, not as many times, or no columns.
    """
    from matplotlib.figure import Figure

    if not shots or columns < 1 or (times is not None and len(times) != len(shots)):
        raise ValueError(f"{len(shots)} frames, {columns} columns and {times} as times: give a shot and a time a frame")
    first, columns = shots[0], min(columns, len(shots))
    lines, at, size = -(-len(shots) // columns), first.layer(layer), 9.0
    here = set(first.row.kept(at))
    figure = Figure(figsize=(1.5 * columns + 0.2, 1.95 * lines + 1.1), layout="constrained", dpi=110)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for n, (axis, shot) in enumerate(zip(axes, shots, strict=False)):
        total = len(shot.layout) - int(shot.layout.newline.sum())
        kept_here = len(here.intersection(range(shot.first_slot, shot.first_slot + len(shot.layout))))
        axis.imshow(shot.pixels(layer))
        when = f" · {times[n]:.1f} s" if times is not None else ""
        axis.set_title(f"frame {n + 1}{when}\n{kept_here} of {total}", fontsize=size)
    figure.suptitle(wrapped(first.label, 14 * columns) + (f"\n{first.question}" if first.question else ""), fontsize=11)
    said, color = first.verdict
    deep = f"tokens that enter layer {at}: {first.row.vision_tokens[at]} of {first.row.total}"
    figure.supxlabel(f"{said}\n{deep}" if said else deep, fontsize=10, color=color)
    return figure


def side_by_side(shots: Sequence[Shot], layer: int = -1, columns: int = 3) -> Figure:
    """The same picture under several policies: what is left on entering ``layer``, with tokens, FLOPs and answer.

    Args:
        columns: so many policies in a line.

    Raises:
        ValueError: no shots, or of different pictures; no columns.
    """
    from matplotlib.figure import Figure

    _check_same_picture(shots)
    if columns < 1:
        raise ValueError(f"columns={columns}: at least one policy stands in a line")
    kinds, columns = shots[0].tiles, min(columns, len(shots))
    lines = -(-len(shots) // columns)
    width = SIDE * columns + 0.3
    size = min(points(width), MOST_POINTS)
    labels = [wrapped(shot.label, round(SIDE * 72 / size / LETTER_WIDTH)) for shot in shots]
    words = (5 + max(label.count("\n") for label in labels)) * 1.5 * size / 72
    figure = Figure(figsize=(width, lines * (SIDE * len(kinds) + words)), layout="constrained", dpi=110)
    axes = figure.subplots(lines * len(kinds), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for n, (shot, label) in enumerate(zip(shots, labels, strict=True)):
        line, column = divmod(n, columns)
        mine = [axes[line * len(kinds) + k][column] for k in range(len(kinds))]
        _one_of_several(mine, shot, layer, label, COLORS[n % len(COLORS)], size)
    if len({shot.question for shot in shots}) == 1 and shots[0].question:
        figure.suptitle(shots[0].question, fontsize=1.1 * size)
    return figure


def _one_of_several(axes: Sequence[Any], shot: Shot, layer: int, label: str, color: str, size: float) -> None:
    """One shot on its axes, one above the other."""
    for axis, kind in zip(axes, shot.tiles, strict=True):
        axis.set_axis_on()
        axis.imshow(shot.pixels(layer, kind))
        frame(axis, color)
        if kind == "crops":
            crop_lines(axis, shot.layout, shot.picture)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(kind, fontsize=size)
    entered = shot.row.vision_tokens[shot.layer(layer)]
    cost = f"\n{shot.flops / 1e9:.3g} GFLOPs" if shot.flops else ""
    axes[0].set_title(
        f"{label}\n{entered} of {shot.row.total} tokens\nmean {shot.row.mean_keep:.0%}{cost}",
        fontsize=size, color=color,
    )  # fmt: skip
    if shot.answer:
        said, mark = shot.verdict
        axes[-1].set_xlabel(said.replace("  (", "\n("), fontsize=1.1 * size, color=mark, fontweight="bold")


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
        label = f"{shortened(name, 80)} · mean {row.mean_keep:.0%}"
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
    figure.legend(handles=lines, frameon=False, fontsize=points(7.2, 11), loc="outside lower center", ncols=1)
    return figure


def words(said: Sequence[str], remembered: Sequence[bool], title: str = "", width: int = 72) -> Figure:
    """An answer in which the words that the cache forgot are faded and struck out.

    Args:
        said: the answer's words. remembered: of each, ``report.rows[0].remembered(layer)``; words past its end (the
            last one never gets into the cache) count as remembered. width: letters in a line.

    Raises:
        ValueError: no words.
    """
    from matplotlib.figure import Figure

    if not said:
        raise ValueError("nothing to draw: the answer has no words")
    lines: list[list[tuple[int, str, bool]]] = [[]]  # (column, word, remembered)
    for n, word in enumerate(said):
        start = lines[-1][-1][0] + len(lines[-1][-1][1]) + 1 if lines[-1] else 0
        if start and start + len(word) > width:
            lines.append([])
            start = 0
        lines[-1].append((start, word, n >= len(remembered) or remembered[n]))
    figure = Figure(figsize=(LETTER * width, 0.24 * len(lines) + 0.4), dpi=110)
    axis = figure.add_axes((0.01, 0.02, 0.98, 0.94))
    axis.set(xlim=(0, width), ylim=(len(lines), -1.1))
    axis.set_axis_off()
    gone = sum(not kept for line in lines for *_, kept in line)
    note = f"{gone} of {len(said)} words forgotten"
    axis.text(
        0, -0.6, f"{shortened(title, width - 32)} · {note}" if title else note, fontsize=9, color=COLORS[0], va="center"
    )
    for y, line in enumerate(lines):
        for x, word, kept in line:
            shade = "#222222" if kept else "#c9a9a2"
            axis.text(x, y + 0.4, word, family="monospace", fontsize=9, color=shade, va="center")
            if not kept:
                axis.plot((x, x + len(word)), (y + 0.4, y + 0.4), color=COLORS[1], lw=0.8)
    return figure


def _check_same_picture(shots: Sequence[Shot]) -> None:
    if not shots:
        raise ValueError("nothing to draw: give at least one shot, e.g. of vtr.visualize.ask(…)")
    if any(shot.layout.tiles != shots[0].layout.tiles or shot.picture.size != shots[0].picture.size for shot in shots):
        raise ValueError("these shots are of different pictures: put shots of one picture side by side")
