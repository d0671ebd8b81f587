"""What choosing the scale per sample could give: ``python -m vtr.eval.studies.oracle RUN``, after ``vtr eval``.

RUN is the folder of an evaluation at several scales (``-p "m3:tokens=1;m3:tokens=9;m3:tokens=36"``; no reduction is one
more, the finest). The oracle knows the answers: it takes the smallest scale whose answer has the sample's best score
(for right or wrong answers: the smallest that is right), so it is an upper bound. Samples that no scale gets right
are charged the smallest scale (as the paper's mean tokens imply) and, in the last column, the largest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from vtr.eval.accuracy.journal import Journal

NONE, PREFIX = "none", "m3:"


@dataclass(frozen=True)
class Oracle:
    """Scales from the coarsest to the finest, and the oracle over them.

    Attributes:
        scales: spec → (mean tokens a sample, accuracy). smallest: spec → samples for which it is the smallest that has
            their best score; those with score 0 everywhere are not in it. accuracy: of the oracle. tokens: its mean,
            unanswerable samples charged the coarsest scale. tokens_charged: the same, charged the finest.
        samples: how many. unanswerable: no scale scores.
    """

    scales: dict[str, tuple[float, float]]
    smallest: dict[str, int]
    accuracy: float
    tokens: float
    tokens_charged: float
    samples: int
    unanswerable: int


def oracle(rows: Sequence[Mapping[str, Any]], specs: Sequence[str]) -> Oracle:
    """The oracle over ``specs`` on the rows of an evaluation (bad samples left out).

    Raises:
        ValueError: fewer than two scales, one that was not run, or no usable sample.
    """
    rows = [row for row in rows if "bad" not in row]
    if len(specs) < 2 or not rows:
        raise ValueError(f"an oracle chooses between scales: {len(specs)} named, {len(rows)} samples")
    if missing := [spec for spec in specs if spec not in rows[0]["policies"]]:
        raise ValueError(f"{missing[0]} was not run: choose among {', '.join(rows[0]['policies'])}")
    tokens = {spec: np.array([row["policies"][spec]["tokens"][0] for row in rows], float) for spec in specs}
    specs = sorted(specs, key=lambda spec: tokens[spec].mean())
    score = np.array([[row["policies"][spec]["score"] for spec in specs] for row in rows])
    cost = np.stack([tokens[spec] for spec in specs], 1)
    best = score.max(1)
    first = score.argmax(1)  # the first of equals: the coarsest
    lost = best == 0
    every = np.arange(len(rows))
    return Oracle(
        {spec: (float(cost[:, i].mean()), float(score[:, i].mean())) for i, spec in enumerate(specs)},
        {spec: int(((first == i) & ~lost).sum()) for i, spec in enumerate(specs)},
        float(best.mean()),
        float(cost[every, first].mean()),
        float(np.where(lost, cost[:, -1], cost[every, first]).mean()),
        len(rows),
        int(lost.sum()),
    )


def table(found: Oracle) -> str:
    """As Markdown."""
    lines = ["| scale | vision tokens | accuracy | smallest sufficient for |", "|---|--:|--:|--:|"]
    for spec, (tokens, accuracy) in found.scales.items():
        lines.append(f"| {spec} | {tokens:.0f} | {accuracy:.1%} | {found.smallest[spec] / found.samples:.1%} |")
    lines.append(
        f"| oracle | {found.tokens:.0f} ({found.tokens_charged:.0f}) | {found.accuracy:.1%} | none suffices: "
        f"{found.unanswerable / found.samples:.1%} |"
    )
    return "\n".join(lines) + f"\n\n{found.samples} samples; in brackets: those no scale gets right at the finest.\n"


def plot(found: Oracle) -> Any:
    """Accuracy against tokens: fixed scales as a line, the oracle as a star."""
    from vtr.eval.report.plots import figure

    made, (panel,) = figure(1, width=5.5)
    tokens, accuracy = zip(*found.scales.values(), strict=True)
    panel.plot(tokens, [100 * a for a in accuracy], "o-", label="fixed scales")
    panel.plot(found.tokens, 100 * found.accuracy, "*", ms=14, color="C1", label="oracle")
    for spec, (x, y) in found.scales.items():
        panel.annotate(spec, (x, 100 * y), xytext=(4, -12), textcoords="offset points", fontsize=8)
    panel.set(xscale="log", xlabel="mean vision tokens", ylabel="accuracy (%)", title="smallest sufficient scale")
    panel.margins(x=0.15)
    panel.legend()
    return made


def main(
    run: Annotated[Path, typer.Argument(help="folder of a vtr eval run")],
    policies: Annotated[
        str | None, typer.Option("--policies", "-p", help="specs joined by ;", show_default="none and all m3 ones")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write oracle.json, oracle.md and oracle.png into this folder")
    ] = None,
) -> None:
    """Show what the smallest sufficient scale of every sample would give, beside the fixed scales."""
    try:
        journal = Journal(run)
        journal.read()
        rows = [journal.rows[index] for index in sorted(journal.rows)]
        if not rows:
            raise ValueError(f"{run} holds no rows of an evaluation: vtr eval --out {run} writes them")
        known: dict[str, Any] = next((row["policies"] for row in rows if "bad" not in row), {})
        specs = policies.split(";") if policies else [s for s in known if s == NONE or s.startswith(PREFIX)]
        found = oracle(rows, specs)
    except (ValueError, OSError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    print(table(found))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "oracle.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
        (out / "oracle.md").write_text(table(found))
        plot(found).savefig(out / "oracle.png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
