"""Ours beside the paper's: a column of a row, its share of the unreduced row, and a word for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from vtr.eval.published.cells import Cells
from vtr.eval.published.choose import NONE, Chosen
from vtr.eval.published.intervals import Measured, half_digit, measured, share, verdict
from vtr.eval.published.tables import Book, Number, Row


def rows_with_whole(chosen: Chosen) -> Iterator[tuple[Row, dict[str, Number]]]:
    """The unreduced row (without numbers where the table has none), then the others, each with its numbers."""
    yield NONE, dict(chosen.table.unreduced or {})
    for row in chosen.rows:
        yield row, dict(row.numbers)


def compare(book: Book, chosen: Chosen, cells: Cells) -> dict[str, Any]:
    """All that has been run, beside the table; the body of the results file."""
    out: list[dict[str, Any]] = []
    whole: dict[str, Measured] = {}
    for row, numbers in rows_with_whole(chosen):
        assert row.policy is not None
        columns: dict[str, Any] = {}
        for column in chosen.columns:
            one = of_cell(book, chosen, cells, row.policy, column)
            if row is NONE and one is not None:
                whole[column] = one
            paper, unreduced = numbers.get(column), (chosen.table.unreduced or {}).get(column)
            columns[column] = entry(one, whole.get(column), paper, None if row is NONE else unreduced, row is NONE)
        certain = chosen.table.certain and row.certain
        about = {"name": row.name, "label": row.label, "tokens": row.tokens, "policy": row.policy, "certain": certain}
        out.append({**about, "note": row.note, "columns": columns})
    table = chosen.table
    return {
        "table": table.name, "source": table.source, "read": table.read, "because": chosen.because,
        "notes": list(table.notes), "columns": {c: column_facts(book, chosen, c) for c in chosen.columns},
        "left_out": chosen.left_out, "limit": cells.fixed.limit, "model": cells.fixed.model, "rows": out,
    }  # fmt: skip


def column_facts(book: Book, chosen: Chosen, column: str) -> dict[str, Any]:
    one = book.benchmark(chosen.table, column)
    return {
        "title": one.title,
        "task": one.task,
        "metrics": list(one.metrics),
        "interval": one.interval,
        "note": one.note,
    }


def of_cell(book: Book, chosen: Chosen, cells: Cells, policy: str, column: str) -> Measured | None:
    """A column as it came out; None where it has not been run."""
    one = book.benchmark(chosen.table, column)
    assert one.task is not None
    cell = cells.read(policy, one.task)
    if cell is None:
        return None
    return measured(one.interval, one.metrics, one.scale, cell["results"], cell["samples"])


def entry(
    one: Measured | None, whole: Measured | None, paper: Number | None, unreduced: Number | None, is_whole: bool
) -> dict[str, Any]:
    """Level and share of one column, as the results file has them."""
    out: dict[str, Any] = {"ours": None if one is None else one.value, "paper": paper, "share": None}
    if one is None:
        return {**out, "verdict": "not run"}
    out |= compared(one, paper, 0.0 if paper is None else half_digit(paper))
    if whole is not None and not is_whole:
        ours = share(one, whole)
        theirs = None if paper is None or not unreduced else 100 * paper / unreduced
        rounding = 0.0
        if paper is not None and unreduced:
            rounding = 100 * (half_digit(paper) / unreduced + paper * half_digit(unreduced) / unreduced**2)
        value = None if math.isnan(ours.value) else ours.value
        out["share"] = {"ours": value, "paper": theirs, **compared(ours, theirs, rounding)}
    return out


def compared(ours: Measured, paper: float | None, rounding: float) -> dict[str, Any]:
    low, high = ours.interval or (None, None)
    found = {"low": low, "high": high, "why": ours.why}
    if paper is None:
        return {**found, "difference": None, "verdict": "not in the table"}
    return {**found, "difference": ours.value - paper, "verdict": verdict(ours, paper, rounding)}


def tally(body: dict[str, Any]) -> dict[str, dict[str, int]]:
    """How often each word was said of levels and of shares of the unreduced row."""
    said: dict[str, dict[str, int]] = {"levels": {}, "shares": {}}
    for row in body["rows"]:
        for one in row["columns"].values():
            for kind, part in (("levels", one), ("shares", one["share"])):
                if part is not None and part.get("verdict") not in (None, "not in the table", "not run"):
                    said[kind][part["verdict"]] = said[kind].get(part["verdict"], 0) + 1
    return said
