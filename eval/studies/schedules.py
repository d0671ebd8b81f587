"""What the schedule searches find on the pocket model, what they cost, and how good it is on held-out questions.

``python -m vtr.eval.studies.schedules --out docs/results`` writes schedules.md, schedules.json and schedules.png.
Searches see questions about pictures of the "val" split; they are measured on those of "test" (other pictures, other
handwriting).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from vtr.eval.report import results
from vtr.eval.report.plots import figure
from vtr.eval.studies import equal_flops
from vtr.eval.studies import schedule_report as report

import vtr
from vtr.base import SCORES
from vtr.search import Cost, Example, Found, Prepared, gsearch, psigmoid
from vtr.search.curve import project
from vtr.search.data import refuse_overlap
from vtr.search.prefix import REUSES, Scorer

BUDGETS = (0.3, 0.2, 0.16, 0.14, 0.125)
"""Decoder prefill FLOPs as ratios to no reduction."""
STARTS = (2, 1)
"""The first layer that may cut: the paper's, and as early as the ranking allows."""
FEWER_LAYERS, FEWER_LEVELS = 6, (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85)
RANKED = (0.2, 0.15, 0.13)
"""Budgets at which rankings are compared on the calibration questions."""
RANKED_ON = 0.14
"""The budget whose schedule is also run under the other rankings on held-out questions."""


@dataclass
class Setup:
    """What all parts measure on."""

    model: Any
    processor: Any
    calibration: list[Example]
    held_out: list[Example]
    tolerance: float
    objective: str
    queries: Any
    seed: int
    trials: int

    @property
    def depth(self) -> int:
        return len(self.model.get_decoder().layers)


def pocket(n: int, split: str, seed: int) -> list[Example]:
    """Questions about pocket pictures; those about one picture stand together."""
    made = vtr.pocket.samples(n, split=split, seed=seed)
    return [Example(one["image"], one["question"], one["answer"]) for one in made]


# -- parts -------------------------------------------------------------------------------------------------------------
def rankings(on: Setup) -> list[dict[str, Any]]:
    """The same schedules (one sigmoid shape at several budgets) under every ranking, on the calibration questions."""
    rows = []
    ready = {name: Prepared(on.model, on.processor, on.calibration, name) for name in ("accuracy", "kl")}
    for queries in tqdm(SCORES, desc="rankings"):
        row: dict[str, Any] = {"queries": queries}
        for name, prepared in ready.items():
            scorer = Scorer(prepared, queries)
            cost = Cost.from_model(on.model, scorer.sizes)
            shapes = [
                project(0.8, 4.0, budget, lambda keeps, c=cost: c.ratio(keeps, "flops"), on.depth, 1)  # type: ignore[misc]
                for budget in RANKED
            ]
            row[name] = scorer.means([1.0], [shape.keeps(on.depth, 1) for shape in shapes])
        rows.append(row)
    return rows


def search_costs(on: Setup, questions: int) -> list[dict[str, Any]]:
    """One G-Search on some calibration questions, run in every way of reuse; they must find the same schedule."""
    rows: list[dict[str, Any]] = []
    prepared = Prepared(on.model, on.processor, on.calibration[:questions], on.objective)
    for reuse in REUSES[::-1]:
        begun = time.perf_counter()
        found = _gsearch(on, "bisect", 2, prepared, reuse=reuse, check_ranks=False)
        rows.append(
            {"reuse": reuse, "seconds": time.perf_counter() - begun, "schedule": list(found), **found.record["spent"]}
        )
    if any(row["schedule"] != rows[0]["schedule"] for row in rows):
        raise RuntimeError(f"the ways of searching found different schedules: {rows}")
    return rows


def brute_force(on: Setup, questions: int) -> dict[str, Any]:
    """All monotone schedules of the pocket model's first layers against G-Search over the same levels."""
    model, processor = vtr.pocket.load()
    text = model.model.language_model
    text.layers = text.layers[:FEWER_LAYERS]
    model.config.text_config.num_hidden_layers = FEWER_LAYERS
    vtr.patch(model)
    data = on.calibration[:questions]
    begun = time.perf_counter()
    prepared = Prepared(model, processor, data)
    scorer = Scorer(prepared, on.queries)
    levels = sorted((*FEWER_LEVELS, 1.0), reverse=True)
    every = [[1.0, 1.0, *rest] for rest in combinations_with_replacement(levels, FEWER_LAYERS - 2)]
    scores = scorer.means([1.0, 1.0], every)
    seconds, cost, rows = time.perf_counter() - begun, Cost.from_model(model, scorer.sizes), []
    for tolerance in (0.01, 0.03, 0.1, 0.3):
        found = gsearch(
            model, processor, prepared, tolerance=tolerance, levels=FEWER_LEVELS, queries=on.queries, check_ranks=False,
            progress=False,
        )  # fmt: skip
        holding = [
            keeps for keeps, score in zip(every, scores, strict=True) if score is not None and score >= -tolerance
        ]
        best = min(holding, key=cost.flops)
        gap = cost.flops(list(found)) / cost.flops(best) - 1
        rows.append({"tolerance": tolerance, "gsearch": list(found), "best": best, "gap": gap})
    return {"schedules": len(every), "seconds": seconds, "rows": rows}


def _gsearch(on: Setup, method: Any, start: int, data: Any, **more: Any) -> Found:
    return gsearch(
        on.model, on.processor, data, tolerance=on.tolerance,
        objective=on.objective, method=method, start=start, queries=on.queries, seed=on.seed, **more,
    )  # fmt: skip


def searches(on: Setup, folder: Path) -> tuple[dict[str, Found], float]:
    """G-Search by both methods and from both layers; P-Sigmoid at every budget (the better start); and the seconds."""
    begun, found = time.perf_counter(), dict[str, Found]()
    prepared = Prepared(on.model, on.processor, on.calibration, on.objective)
    for start in STARTS:
        for method in ("bisect", "bayes") if start == STARTS[0] else ("bisect",):
            name = f"gsearch-{method}-from-{start}"
            found[name] = _gsearch(
                on, method, start, prepared, state=folder / f"{name}.json", check_ranks=start == STARTS[0]
            )
    curve = list(found["gsearch-bisect-from-1"])
    for budget in BUDGETS:
        tries = []
        for start in STARTS:
            state = folder / f"psigmoid-{budget}-from-{start}.json"
            try:
                tries.append(
                    psigmoid(
                        on.model, on.processor, prepared, budget=budget, measure="flops", objective=on.objective,
                        curve=curve, start=start, queries=on.queries, trials=on.trials, seed=on.seed, state=state,
                        check_ranks=False,
                    )
                )  # fmt: skip
            except ValueError as error:
                if "schedules cost between" not in str(error):
                    raise
        found[f"psigmoid-{budget}"] = max(tries, key=lambda one: one.record["score"])
    return found, time.perf_counter() - begun


def held_out(on: Setup, found: Mapping[str, Found], latency: int) -> tuple[list[report.Line], dict[str, str]]:
    """No reduction, the found schedules, and at each budget the others at equal FLOPs; line → its budget."""
    policies: dict[str, vtr.Policy | None] = {"none": None}
    budgets: dict[str, str] = {}
    for name, one in found.items():
        policies[name] = one.policy()
        if one.record["method"] != "psigmoid":
            continue
        budgets[name] = str(one.record["budget"])
        cost = Cost.from_model(on.model, one.record["sizes"])
        for other, policy in equal_flops.baselines(one.record["ratios"]["flops"], cost).items():
            policies[f"{other}-{one.record['budget']}"] = policy
            budgets[f"{other}-{one.record['budget']}"] = str(one.record["budget"])
    ranked = found[f"psigmoid-{RANKED_ON}"]
    for queries in SCORES:
        if queries != on.queries:
            policies[f"{queries}-{RANKED_ON}"] = vtr.GSearch(ranked.schedule, queries=queries)
            budgets[f"{queries}-{RANKED_ON}"] = str(RANKED_ON)
    return report.measure(on.model, on.processor, policies, on.held_out, latency, 2), budgets


# -- what is written ---------------------------------------------------------------------------------------------------
def comparisons(
    lines: Sequence[report.Line], groups: Sequence[int], budgets: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Every G-Search against none; P-Sigmoid against the others of its budget."""
    known = {line.name: line for line in lines}
    out = [report.compare(line, lines[0], groups) for line in lines if line.name.startswith("gsearch")]
    for name, budget in budgets.items():
        if not name.startswith("psigmoid"):
            out.append(report.compare(known[f"psigmoid-{budget}"], known[name], groups))
    return out


def pareto(lines: Sequence[report.Line], path: Path) -> None:
    """Accuracy against FLOPs and against prefill latency."""
    made, panels = figure(2)
    for axis, label in zip(panels, ("decoder prefill FLOPs ÷ none", "prefill ms ÷ none"), strict=True):
        flops = axis is panels[0]
        for kind in ("none", "gsearch", "psigmoid", "FastV", "Pyramid", "uniform"):
            mine = [line for line in lines if line.name.startswith(kind) and (flops or line.prefill_ms)]
            if not mine:
                continue
            x = [_over(line, lines[0], flops) for line in mine]
            marks = "*" if kind in ("none", "gsearch") else "o-"
            axis.plot(x, [100 * line.accuracy for line in mine], marks, label=kind, ms=8 if marks == "*" else 4)
        axis.set(xlabel=label, ylabel="accuracy, %")
        axis.legend(fontsize=8)
    made.savefig(path, dpi=130)


def _over(line: report.Line, base: report.Line, flops: bool) -> float:
    if flops:
        return line.flops / base.flops
    assert line.prefill_ms is not None and base.prefill_ms is not None
    return line.prefill_ms["median"] / base.prefill_ms["median"]


def markdown(body: Mapping[str, Any], lines: Sequence[report.Line], groups: Sequence[int]) -> str:
    """Everything measured, as text."""
    out = [
        f"# Schedules found on the pocket model\n\nSearched on {body['calibration']} questions of the val split "
        f"(objective {body['objective']}, tolerance {body['tolerance']}, ranking {body['queries']!r}); measured on "
        f"{body['questions']} questions about {len(set(groups))} pictures of the test split. All searches together: "
        f"{body['search_seconds']:.0f} s, {torch.get_num_threads()} thread(s).\n",
        "## Rankings: the same schedules under each, on the calibration questions\n",
        f"| queries | accuracy at FLOPs {', '.join(map(str, RANKED))} | KL (nats) |\n|---|---|---|",
        *(
            f"| {row['queries']} | {', '.join(f'{x:.1%}' for x in row['accuracy'])} | "
            f"{', '.join(f'{-x:.4f}' for x in row['kl'])} |"
            for row in body["rankings"]
        ),
        "\n## What a search costs\n\nThe same G-Search (bisection) run in three ways, same schedule:\n",
        "| | seconds | layer-forwards (prompt × layer) | token-layer-forwards | calls of a layer |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {row['reuse']} | {row['seconds']:.1f} | {row['rows']:,} ({row['naive_rows'] / row['rows']:.1f}×) | "
            f"{row['tokens']:,} ({row['naive_tokens'] / row['tokens']:.1f}×) | {row['calls']:,} "
            f"({row['naive_calls'] / row['calls']:.1f}×) |"
            for row in body["costs"]
        ),
        f"\n## Against brute force\n\nAll {body['brute']['schedules']} monotone schedules of {FEWER_LAYERS} layers and "
        f"{len(FEWER_LEVELS)} levels (+ all tokens), first two layers whole:\n",
        "| tolerance (KL) | G-Search | the best | costs more by |\n|--:|---|---|--:|",
        *(
            f"| {row['tolerance']} | {row['gsearch'][2:]} | {row['best'][2:]} | {row['gap']:.1%} |"
            for row in body["brute"]["rows"]
        ),
        "\n## Held-out questions\n",
        report.table(lines, groups),
        "",
        *(f"- {report.said(one)}" for one in body["compared"]),
        "\n## The schedules\n",
        *(f"- {name}: `{keeps}`" for name, keeps in body["schedules"].items()),
        *(f"\nWarning of the search: {told}" for told in body["warnings"]),
    ]
    return "\n".join(out) + "\n"


def save_presets(found: Mapping[str, Found], path: Path, how: str) -> None:
    """The schedules as presets of the package, with where they come from."""
    searched = {"pocket": "gsearch-bayes-from-2", "pocket-bisect": "gsearch-bisect-from-2"}
    chosen = {**searched, **{f"pocket-sigmoid-{b}": f"psigmoid-{b}" for b in BUDGETS}}
    data = {}
    for name, key in chosen.items():
        record = found[key].record
        told = f"{record['method']} on {record['questions']} questions of the pocket val split, {how}"
        ratios = {measure: round(value, 4) for measure, value in record["ratios"].items()}
        data[name] = {
            "model": "pocket", "schedule": list(found[key]), "source": told, "queries": record["queries"],
            "ratios": ratios, "score": record["score"],
        }  # fmt: skip
    lines = [f" {json.dumps(name)}: {json.dumps(one)}" for name, one in data.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(
    out: Annotated[Path, typer.Option(help="folder for schedules.md, .json, .png")] = Path("docs/results"),
    n: Annotated[int, typer.Option(help="held-out questions")] = 500,
    calibration: Annotated[int, typer.Option(help="questions to search on")] = 64,
    tolerance: Annotated[float, typer.Option(help="of G-Search")] = 0.005,
    objective: Annotated[str, typer.Option(help="of the searches")] = "kl",
    queries: Annotated[str, typer.Option(help="the ranking")] = "text",
    trials: Annotated[int, typer.Option(help="of P-Sigmoid, at each budget and start")] = 10,
    latency: Annotated[int, typer.Option(help="prompts timed at batch 1")] = 8,
    seed: Annotated[int, typer.Option(help="of questions and searches")] = 0,
    test_seed: Annotated[int | None, typer.Option(help="of the held-out questions, if another")] = None,
    presets: Annotated[Path | None, typer.Option(help="also write the schedules as presets")] = None,
    states: Annotated[Path | None, typer.Option(help="folder for the searches' states: go on after a stop")] = None,
) -> None:
    """Search schedules for the pocket model and measure them."""
    import tempfile

    model, processor = vtr.pocket.load()
    vtr.patch(model)
    on = Setup(
        model, processor, pocket(calibration, "val", seed), pocket(n, "test", seed if test_seed is None else test_seed),
        tolerance, objective, queries, seed, trials,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        found, seconds = searches(on, states or Path(scratch))
    ranked = rankings(on)
    costs = search_costs(on, min(24, calibration))
    brute = brute_force(on, min(8, calibration))
    refuse_overlap(found["gsearch-bisect-from-2"].record["pictures"], on.held_out)
    lines, budgets = held_out(on, found, latency)
    groups = report.groups_of(on.held_out)
    body = {
        "calibration": calibration, "questions": n, "test_seed": test_seed, "tolerance": tolerance,
        "objective": objective, "queries": queries,
        "search_seconds": seconds, "rankings": ranked, "costs": costs, "brute": brute,
        "lines": report.to_json(lines), "compared": comparisons(lines, groups, budgets),
        "schedules": {name: list(one) for name, one in found.items()},
        "ranks": found["gsearch-bisect-from-2"].record["ranks"],
        "warnings": found["gsearch-bisect-from-2"].record["warnings"],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    results.save(out / "schedules.json", "quality", body, seed=seed)
    text = markdown(body, lines, groups)
    (out / "schedules.md").write_text(text)
    pareto(lines, out / "schedules.png")
    if presets is not None:
        save_presets(found, presets, f"by {results.command()}")
    print(text)


if __name__ == "__main__":
    typer.run(main)
