"""Every policy at its best setting: which of several settings a policy should stand for itself with in a comparison.

``python -m vtr.eval.studies.best RESULT.json --most 0.265`` prints the specs, joined as ``vtr eval -p`` takes them. The
settings are compared on questions that the comparison does not report (``eval/measure.sh best``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from vtr.eval.report.results import load


def best(rows: list[dict[str, Any]], most: float, tie: float = 0.01) -> list[str]:
    """Of each policy the best spec among those whose mean keep is at most ``most``.

    That is the one with the fewest FLOPs of those whose accuracy is within ``tie`` of the highest: a hundred questions
    tell no smaller differences apart. In the order in which the policies come; no reduction is left out.

    Args:
        rows: of a ``vtr eval`` result. most: a share of the vision tokens. tie: a share of the questions.

    Raises:
        ValueError: a policy of which no setting is within the budget.
    """
    chosen = []
    for name in dict.fromkeys(row["name"] for row in rows if row["policy"] != "none"):
        mine = [row for row in rows if row["name"] == name]
        within = [row for row in mine if row["mean_keep"] <= most]
        if not within:
            least = min(row["mean_keep"] for row in mine)
            raise ValueError(f"no setting of {name} keeps at most {most:.1%}: the least is {least:.1%}")
        highest = max(row["accuracy"] for row in within)
        good = [row for row in within if row["accuracy"] >= highest - tie]
        chosen.append(min(good, key=lambda row: (row["gflops"], -row["accuracy"]))["policy"])
    return chosen


def main(
    result: Annotated[Path, typer.Argument(help="what vtr eval wrote about the settings")],
    most: Annotated[float, typer.Option(help="the largest mean keep that counts as within the budget")] = 0.265,
    tie: Annotated[
        float, typer.Option(help="differences of accuracy up to this are none; the cheaper one is taken")
    ] = 0.01,
) -> None:
    """Print the best setting of every policy of a result file."""
    try:
        print(";".join(best(load(result)["policies"], most, tie)))
    except (ValueError, OSError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
