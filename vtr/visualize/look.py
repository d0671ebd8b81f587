"""What the figures have in common: colors, sizes, frames, labels."""

from __future__ import annotations

from typing import Any

COLORS = ("#3b6fb6", "#d95f43", "#3f9b6b", "#8a5fb0", "#c9922b", "#4aa5b8", "#b0577f", "#6b6b6b")
SIDE = 2.6
"""Inches of one picture in a figure."""
RIGHT, WRONG, UNKNOWN = "#1a7f37", "#c62828", "#222222"
"""Colors of answers."""


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


def verdict(answer: str, expected: str | None) -> tuple[str, str]:
    """An answer with a sign, and its color: ✓ if it is the expected one, ✗ if not, → where none is known."""
    if expected is None:
        return f"→ {answer}", UNKNOWN
    right = answer.strip().lower() == expected.strip().lower()
    return (f"✓ {answer}", RIGHT) if right else (f"✗ {answer}", WRONG)


def asked(question: str, expected: str | None) -> str:
    """The question, and the right answer where it is known, as a figure's title; empty without a question."""
    if not question:
        return ""
    return f"“{question}”" + (f"   right answer: {expected}" if expected is not None else "")
