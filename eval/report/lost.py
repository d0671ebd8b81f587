"""What policies lose over several evaluations, side by side: a table, and a picture.

``python -m vtr.eval.report.lost RESULT … --out lost.png``. Markdown files have the table between the marks of
``pocket+pocket-11+pocket-6`` (:mod:`vtr.eval.report.readme`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from vtr.eval.report.page import groups
from vtr.eval.report.page.cells import Cell, Column, Row, Table, points, policy, versus
from vtr.eval.report.page.data import Result, read

WORST = 40
"""So many points lost have the darkest colour."""
ABOVE = "†"
"""Marks a policy that keeps more than twice its budget: it takes none, or cannot meet it."""


def rows_of(result: Result) -> dict[str, dict[str, Any]]:
    """Name of a policy → its row; of several settings the one that came first. Without no reduction."""
    found: dict[str, dict[str, Any]] = {}
    for row in result.rows:
        if row["policy"] != "none":
            found.setdefault(row["name"], row)
    return found


def looks_of(results: Sequence[Result]) -> dict[str, str]:
    """Name of a policy → the title of its group."""
    return {name: group for result in results for name, group in groups.of(result).items()}


def labels(results: Sequence[Result]) -> list[str]:
    """What tells the evaluations apart: the budget, the model, or both."""
    models = [result.model for result in results]
    budgets = [result.data["settings"]["budget"] for result in results]
    shares = [f"{100 * budget:g} %" if budget < 1 else f"{budget:g} tokens" for budget in budgets]
    if len(set(models)) == 1:
        return shares
    return models if len(set(shares)) == 1 else [", ".join(pair) for pair in zip(models, shares, strict=True)]


def ranked(results: Sequence[Result]) -> list[str]:
    """The policies: those that hold every budget, then those that keep more, then those that some evaluation left out;
    among them those that lose least first."""
    found = [rows_of(result) for result in results]
    names = list(dict.fromkeys(name for rows in found for name in rows))

    def place(name: str) -> tuple[int, bool, float]:
        mine = [(rows[name], result) for rows, result in zip(found, results, strict=True) if name in rows]
        lost = [row["versus_none"]["difference"] for row, _ in mine]
        return len(found) - len(mine), any(mark(row, result) for row, result in mine), -sum(lost) / len(lost)

    return sorted(names, key=place)


def table(results: Sequence[Result]) -> Table:
    """Points lost against no reduction, with their intervals: a row per policy, a column per evaluation."""
    found, looks = [rows_of(result) for result in results], looks_of(results)
    columns = [Column("policy", numeric=False), Column("group", numeric=False), *map(Column, labels(results))]
    rows = [
        Row(
            [
                policy(name),
                Cell(looks[name].lower()),
                *(_cell(one.get(name), result) for one, result in zip(found, results, strict=True)),
            ],
            name,
        )
        for name in ranked(results)
    ]
    return Table("lost", "What policies lose", columns, rows, caption(results))


def _cell(row: dict[str, Any] | None, result: Result) -> Cell:
    if row is None:
        return Cell("–")
    made = versus(row["versus_none"], -1.0, 1.0)
    return replace(made, detail=f"{made.detail} {mark(row, result)}".rstrip())


def mark(row: dict[str, Any], result: Result) -> str:
    """:data:`ABOVE` or nothing."""
    budget = result.data["settings"]["budget"]  # 1 and more: tokens of a tile
    return ABOVE if budget < 1 and row["mean_keep"] > 2 * budget else ""


def caption(results: Sequence[Result]) -> str:
    """What the numbers are, of how many questions, and what no reduction has."""
    parts = [
        f"{label}: {result.shown:,} questions, {100 * result.data['reference']['none']:.1f}% without reduction"
        for label, result in zip(labels(results), results, strict=True)
    ]
    return (
        f"Points against no reduction, with 95% intervals. {'; '.join(parts)}. "
        f"–: left out, the file says why. {ABOVE}: keeps more than twice as much."
    )


def plot(results: Sequence[Result]) -> Any:
    """The same as colours: policies by group, ranked as in the table; evaluations side by side."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    found, looks = [rows_of(result) for result in results], looks_of(results)
    names = ranked(results)
    lines: list[str | None] = []  # None is the title of a group
    for group in (titles := list(dict.fromkeys(looks.values()))):
        lines += [None, *(name for name in names if looks[name] == group)]
    lost = np.full((len(lines), len(results)), np.nan)
    made = Figure(figsize=(2.2 + 0.66 * len(results), 1.3 + 0.2 * len(lines)), layout="constrained")
    axis = made.subplots()
    for (i, j), _ in np.ndenumerate(lost):
        if (name := lines[i]) is not None and (row := found[j].get(name)) is not None:
            lost[i, j] = -100 * row["versus_none"]["difference"]
            color = "white" if lost[i, j] > WORST / 2 else "black"
            text = points(-lost[i, j] / 100) + mark(row, results[j])
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    shades = PowerNorm(0.5, 0, WORST)
    shown = axis.imshow(np.clip(lost, 0, WORST), aspect="auto", cmap="YlOrRd", norm=shades, interpolation="none")
    axis.set_xticks(
        range(len(results)), [label.replace(", ", "\n").replace("-", "-\n") for label in labels(results)], fontsize=8
    )
    axis.set_yticks(range(len(lines)), [name or "" for name in lines], fontsize=8)
    for i, group in zip((i for i, name in enumerate(lines) if name is None), titles, strict=True):
        axis.text(-0.45, i, group.lower(), va="center", fontsize=8, style="italic")
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    for i in range(1, len(results)):
        axis.axvline(i - 0.5, color="white", lw=5 if results[i].model != results[i - 1].model else 1)
    ticks = [0, 1, 5, 10, 20, WORST]
    bar = made.colorbar(shown, ax=axis, orientation="horizontal", shrink=0.7, aspect=40, pad=0.01, ticks=ticks)
    bar.set_label("points lost against no reduction", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return made


def main(
    files: Annotated[list[Path], typer.Argument(help="results.json of vtr eval, in the order of the columns")],
    out: Annotated[Path | None, typer.Option(help="write the picture there, e.g. lost.png")] = None,
) -> None:
    """Show what policies lose over several evaluations (budgets, models), as a table and a picture."""
    from vtr.eval.report.page import markdown

    try:
        results = [read(file) for file in files]
        if wrong := next((result for result in results if result.kind != "eval"), None):
            raise ValueError(f"{wrong.path} is no result of vtr eval, but of kind {wrong.kind!r}")
        print(markdown.table(table(results)))
    except (ValueError, OSError, KeyError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        plot(results).savefig(out, dpi=120)


if __name__ == "__main__":
    typer.run(main)
