"""What tables are made of: columns, rows, and the cells of numbers, intervals and small drawings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from vtr.eval.report.page import plots

NOTHING = Markup()


@dataclass(frozen=True)
class Column:
    """A column's heading. ``down``: the largest value is the best one, so sorting starts with it."""

    label: str
    numeric: bool = True
    down: bool = False
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """What is shown, what it is sorted by, a smaller second part, a small drawing (HTML only)."""

    text: str
    value: float | str | None = None
    detail: str = ""
    art: Markup = NOTHING
    code: bool = False


@dataclass(frozen=True)
class Row:
    """``name`` is the policy's (for its colour); a reference row is set apart."""

    cells: list[Cell]
    name: str = ""
    reference: bool = False


@dataclass(frozen=True)
class Table:
    """``sort``: the column that the rows are ordered by."""

    name: str
    title: str
    columns: list[Column]
    rows: list[Row]
    caption: str = ""
    sort: int | None = None


# -- cells -------------------------------------------------------------------------------------------------------------
def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, never as 1e+03."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def plain(value: float | None, scale: float = 1.0) -> Cell:
    return Cell("–") if value is None else Cell(number(value / scale), value / scale)


def count(value: int | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:,}", value)


def share(value: float | None) -> Cell:
    """A ratio as a percentage."""
    return Cell("–") if value is None else Cell(f"{100 * value:.1f}%", value)


def interval(value: float, low: float, high: float) -> Cell:
    return Cell(f"{100 * value:.1f}%", value, f"{100 * low:.1f}–{100 * high:.1f}")


def spread(ms: dict[str, float] | None) -> Cell:
    """A median with its smallest and largest run."""
    if ms is None:
        return Cell("–")
    return Cell(number(ms["median"]), ms["median"], f"{number(ms['low'])}–{number(ms['high'])}")


def kept(row: dict[str, Any], full: float) -> Cell:
    """The mean keep, with the tokens that enter each layer drawn."""
    return Cell(f"{100 * row['mean_keep']:.1f}%", row["mean_keep"], art=plots.spark(row["vision_tokens"], full))


def most_tokens(rows: list[dict[str, Any]]) -> float:
    return max([1.0, *(n for row in rows for n in row["vision_tokens"])])


def policy(spec: str) -> Cell:
    return Cell(spec, spec, code=True)


def chance(p: float | None) -> Cell:
    if p is None:
        return Cell("–")
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}", p)


def points(difference: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def versus(versus: dict[str, Any] | None, least: float, most: float) -> Cell:
    """A paired difference in points, drawn on a scale from ``least`` to ``most``."""
    if versus is None:
        return Cell("–")
    difference, low, high = versus["difference"], versus["low"], versus["high"]
    art = plots.whisker(difference, low, high, least, most, zero=0.0)
    return Cell(points(difference), difference, f"[{points(low)}, {points(high)}]", art)
