"""From answered queries to the table and the picture of many shots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from vtr.eval.accuracy.contenders import NONE
from vtr.eval.accuracy.stats import interval, paired
from vtr.eval.accuracy.summary import markdown_table
from vtr.eval.accuracy.summary import table_csv as table_csv

from vtr.pocket.shots.prompts import CHANCE

Row = Mapping[str, Any]
COLUMNS = (
    "shots", "policy", "accuracy", "interval", "− none", "p", "tokens each", "GFLOPs", "of none", "KV MiB",
    "longest",
)  # fmt: skip


def summarize(rows: Sequence[Row], lines: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """A line for each contender and number of shots: accuracy with a bootstrap interval over queries, cost, the paired
    difference to no reduction with as many demonstrations.

    Args:
        rows: of the journal, one a query. lines: contender and shots, and why it is refused, if it is.
    """
    return [_line(rows, line, seed) for line in lines]


def _cells(rows: Sequence[Row], spec: str, shots: int) -> list[Mapping[str, Any]]:
    return [row["shots"][str(shots)][spec] for row in rows if spec in row["shots"][str(shots)]]


def _line(rows: Sequence[Row], line: Mapping[str, Any], seed: int) -> dict[str, Any]:
    spec, shots = line["policy"], line["shots"]
    mine, reference = _cells(rows, spec, shots), _cells(rows, NONE, shots)
    if not mine:
        return dict(line)
    scores = [cell["score"] for cell in mine]
    low, high = interval(scores, seed=seed)
    by_kind = {
        kind: float(np.mean([s for s, row in zip(scores, rows, strict=True) if row["kind"] == kind]))
        for kind in sorted({row["kind"] for row in rows})
    }
    made = {
        **line, "accuracy": float(np.mean(scores)), "low": low, "high": high, "by_kind": by_kind,
        "vision_tokens": np.mean([cell["tokens"] for cell in mine], axis=0).tolist(),
        "gflops": float(np.mean([cell["flops"] for cell in mine]) / 1e9),
        "kv_mib": float(np.mean([cell["kv_bytes"] for cell in mine]) / 2**20),
        "tokens_each": None, "of_none": None, "versus_none": None,
    }  # fmt: skip
    alone = _cells(rows, spec if _cells(rows, spec, 0) else NONE, 0)
    shown = line.get("demonstrations", shots)
    if shown:
        query = float(np.mean([cell["tokens"][0] for cell in alone]))
        made["tokens_each"] = (made["vision_tokens"][0] - query) / shown
    if reference and spec != NONE:
        versus = paired(scores, [cell["score"] for cell in reference], seed=seed)
        made["of_none"] = made["gflops"] * 1e9 / float(np.mean([cell["flops"] for cell in reference]))
        made["versus_none"] = versus.figures()
    return made


def cells(body: Mapping[str, Any]) -> list[list[str]]:
    """The lines of the table, as :data:`COLUMNS`."""
    found = []
    for row in body["policies"]:
        name = row["policy"] + (f" ({row['demonstrations']})" if "demonstrations" in row else "")
        longest = "" if row["longest"] is None else str(row["longest"])
        if "accuracy" not in row:
            found.append([str(row["shots"]), name, "does not fit", *[""] * (len(COLUMNS) - 4), longest])
            continue
        versus = row["versus_none"]
        found.append(
            [
                str(row["shots"]),
                name,
                f"{row['accuracy']:.1%}",
                f"{100 * row['low']:.1f}–{100 * row['high']:.1f}",
                ""
                if versus is None
                else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * versus[k] for k in ("difference", "low", "high"))),
                "" if versus is None else f"{versus['p_mcnemar']:.2g}",
                "" if row["tokens_each"] is None else f"{row['tokens_each']:.0f}",
                f"{row['gflops']:.3g}",
                "" if row["of_none"] is None else f"{row['of_none']:.1%}",
                f"{row['kv_mib']:.3g}",
                longest,
            ]
        )
    return found


def caption(body: Mapping[str, Any]) -> str:
    """What was measured, in a few sentences."""
    positions = "" if body["positions"] is None else f" The model has {body['positions']:,} positions."
    refused = [f" {r['policy']}: {r['refused']}." for r in body["policies"] if r["refused"]]
    return (
        f"{body['model']}: {body['queries']} queries whose labels are permuted from prompt to prompt; by chance "
        f"{CHANCE:.1%} are right. Tokens each: vision tokens of a demonstration that enter the decoder. Longest: the "
        f"most demonstrations that fit.{positions}{''.join(refused)}"
    )


def markdown(body: Mapping[str, Any]) -> str:
    """The caption and the table in Markdown."""
    return "\n".join([caption(body), "", *markdown_table(COLUMNS, cells(body), words=1)]) + "\n"


def plot(body: Mapping[str, Any]) -> Any:
    """Accuracy over shots, and over FLOPs; a line for each contender, bars are the intervals."""
    from vtr.eval.report.plots import figure

    made, (over_shots, over_flops) = figure(2, width=5.0, height=4.2)
    names = list(dict.fromkeys(row["policy"] for row in body["policies"]))
    for number, name in enumerate(names):
        mine = [row for row in body["policies"] if row["policy"] == name and "accuracy" in row]
        if not mine:
            continue
        middle = np.array([100 * row["accuracy"] for row in mine])
        bars = [
            [100 * (row["accuracy"] - row["low"]) for row in mine],
            [100 * (row["high"] - row["accuracy"]) for row in mine],
        ]
        how = {"fmt": "o-", "ms": 4, "lw": 1.2, "capsize": 2, "color": f"C{number}"}
        over_shots.errorbar([row["shots"] for row in mine], middle, bars, label=name, **how)
        over_flops.errorbar([row["gflops"] for row in mine], middle, bars, **how)
    for panel in (over_shots, over_flops):
        panel.axhline(100 * CHANCE, color="0.5", lw=0.8, ls="--")
        panel.set(ylim=(0, 102), ylabel="accuracy (%)")
    over_shots.set_xscale("symlog", base=2, linthresh=1)
    over_shots.set_xticks(sorted({row["shots"] for row in body["policies"]}))
    over_shots.xaxis.set_major_formatter("{x:.0f}")
    over_shots.set(title="labels read from demonstrations", xlabel="demonstrations")
    over_flops.set(title="what it costs", xlabel="GFLOPs a prompt", xscale="log")
    made.legend(*over_shots.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return made
