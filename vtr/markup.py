"""Pieces of HTML for what notebooks and the playground show. Whatever comes in as text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

WIDTH, HEIGHT, STEP = 120, 28, 24
"""Pixels of a staircase, and the widest of its steps."""
CELL = "padding:.15em .6em;vertical-align:top;text-align:"


class Raw(str):
    """HTML as it is; any other text is escaped."""


def text(value: object) -> str:
    """What stands for a value in HTML: escaped, unless it is :class:`Raw`."""
    return value if isinstance(value, Raw) else escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", note: str = "") -> str:
    """A table that scrolls where it is too wide; numbers stand to the right.

    Args:
        head: of the columns; none at all for lines of name and value. caption: above it. note: below it.
    """
    heads = "".join(f'<th style="{CELL}left">{text(one)}</th>' for one in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    above = f"<div><strong>{text(caption)}</strong></div>" if caption else ""
    below = f"<div>{text(note)}</div>" if note else ""
    first = f"<thead><tr>{heads}</tr></thead>" if head else ""
    body = f'<table style="border-collapse:collapse">{first}<tbody>{lines}</tbody></table>'
    return f'<div style="overflow-x:auto">{above}{body}{below}</div>'


def _cell(value: object) -> str:
    side = "right" if isinstance(value, (int, float)) else "left"
    return f'<td style="{CELL}{side}">{text(value)}</td>'


def stairs(counts: Sequence[float], most: float) -> Raw:
    """How many tokens enter each layer, a bar a layer: an SVG of a line's height.

    Args:
        counts: of each layer. most: what a bar of full height stands for.
    """
    if not counts or most <= 0:
        return Raw("")
    wide = min(WIDTH / len(counts), STEP)
    bars = "".join(
        f'<rect x="{n * wide:.1f}" y="{HEIGHT - (tall := HEIGHT * min(count / most, 1)):.1f}" width="{0.9 * wide:.1f}" '
        f'height="{tall:.1f}"/>'
        for n, count in enumerate(counts)
    )
    label = escape(" ".join(f"{count:g}" for count in counts), quote=True)
    return Raw(
        f'<svg width="{wide * len(counts):.0f}" height="{HEIGHT}" role="img" aria-label="{label}" fill="#3b6fb6">'
        f"<title>{label}</title>{bars}</svg>"
    )
