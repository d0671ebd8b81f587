"""Accuracy by type of question, several budgets side by side: ``python -m vtr.eval.accuracy.kinds RESULT …``.

RESULT is a ``results.json`` of ``vtr eval``; of several files each needs a name (``before=FILE after=FILE``), so that
one policy can be compared on two models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from vtr.eval.report import results

ALL = "all"


def label(spec: str) -> str:
    """A policy without its first setting, which says how much it keeps: lines of one label are one curve."""
    name, _, settings = spec.partition(":")
    rest = settings.split(",")[1:]
    return " ".join([name, *rest])


def lines(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One per policy of every result: label, spec, mean keep and the accuracy of every type.

    Raises:
        ValueError: results of other kinds than "eval", or on other data than the first.
    """
    out: list[dict[str, Any]] = []
    data: Any = None
    for name, result in found.items():
        if result.get("kind") != "eval":
            raise ValueError(f"{name or 'this file'} is a result of kind {result.get('kind')!r}, not of vtr eval")
        mine = (result["data"]["name"], result["data"]["samples"], result["data"]["kinds"])
        data = data or mine
        if mine != data:
            raise ValueError(f"{name} is on {mine[1]} samples of {mine[0]}, the first on {data[1]} of {data[0]}")
        for row in result["policies"]:
            out.append(
                {
                    "label": f"{label(row['policy'])} ({name})" if name else label(row["policy"]),
                    "spec": row["policy"] + (f" ({name})" if name else ""),
                    "keep": row["mean_keep"],
                    "accuracy": {ALL: row["accuracy"], **row["by_kind"]},
                }
            )
    return out


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per policy, a column per type of question."""
    kinds = list(rows[0]["accuracy"])
    out = ["| policy | kept | " + " | ".join(kinds) + " |", "|---|" + "--:|" * (1 + len(kinds))]
    for row in rows:
        cells = [f"{100 * row['accuracy'][kind]:.1f}" for kind in kinds]
        out.append(f"| {row['spec']} | {row['keep']:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def plot(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A panel per type of question: accuracy against the mean share of tokens kept, a curve per label."""
    from vtr.eval.report.plots import figure

    kinds = list(rows[0]["accuracy"])
    columns = min(len(kinds), 3)
    made, panels = figure(columns, -(-len(kinds) // columns), width=3.9, height=3.0)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for panel, kind in zip(panels, kinds, strict=False):
        for number, name in enumerate(labels):
            mine = sorted((row["keep"], 100 * row["accuracy"][kind]) for row in rows if row["label"] == name)
            style = "*" if name.startswith("none") else "o-"
            panel.plot(*zip(*mine, strict=True), style, ms=4, lw=1.2, color=f"C{number % 10}", label=name)
        panel.set(title=kind, xscale="log", xlabel="mean share of vision tokens kept", ylabel="accuracy (%)")
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    made.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return made


def main(
    files: Annotated[
        list[str], typer.Argument(help="results.json of vtr eval; NAME=FILE to name it", metavar="RESULT")
    ],
    out: Annotated[Path | None, typer.Option(help="write OUT.md and OUT.png")] = None,
) -> None:
    """Show accuracy by type of question, as a table and a plot."""
    named = [file.rpartition("=") for file in files]
    try:
        if len({name for name, _, _ in named}) < len(named):
            raise ValueError("of several files each needs a name: before=FILE after=FILE")
        rows = lines({name: results.load(Path(path)) for name, _, path in named})
    except (ValueError, OSError, KeyError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    print(markdown(rows))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(markdown(rows))
        plot(rows).savefig(out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    typer.run(main)
