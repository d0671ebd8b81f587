"""What the figures have in common: colors, sizes, frames, labels."""

from __future__ import annotations

from typing import Any

from vtr.limits import folded

COLORS = ("#3b6fb6", "#d95f43", "#3f9b6b", "#8a5fb0", "#c9922b", "#4aa5b8", "#b0577f", "#6b6b6b")
SIDE = 2.6
"""Inches of one picture in a figure."""


def frame(axis: Any, color: str) -> None:
    """A thin frame of this color in place of the axis's ticks."""
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(color)
        spine.set_linewidth(1.4)


def shortened(label: str, width: int = 30) -> str:
    """A spec string, shortened where it would not fit."""
    return label if len(label) <= width else label[: width - 1] + "…"


def wrapped(label: str, width: int) -> str:
    """A spec string in lines of about ``width`` letters, broken behind commas and at a plus; three lines at most."""
    lines = [shortened(line, max(width, 8)) for line in folded(label, width).split("\n")]
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], shortened(lines[2], len(lines[2])) + "…"])
