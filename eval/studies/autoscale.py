"""Choosing the scale per question, beside fixed scales and the oracle: ``python -m vtr.eval.studies.autoscale``.

The embedded model's two shipped choosers (fitted on validation questions) on test questions: accuracy, vision tokens
with all tries counted, decoder FLOPs, and the time of a whole ``generate``; and what share of the gap between the fixed
scales and the oracle each closes: (accuracy − f) / (oracle − f), with f what fixed scales reach with as many tokens
(straight lines between them over the logarithm of tokens).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm import tqdm
from vtr.eval.accuracy.stats import paired
from vtr.eval.cost.interleave import in_turns, median_ratio
from vtr.eval.cost.timing import now
from vtr.eval.report import results

import vtr
from vtr.chat import decode, encode
from vtr.training.autoscale import THRESHOLDS, Table, ask_all, cascade_estimates, outcome

SCALES = [1, 9, 36, 144]


@dataclass(frozen=True)
class Line:
    """One policy on all questions.

    Attributes:
        tokens: mean vision tokens of a question, tries counted. gflops: of the decoder, mean a question, tries counted.
        interval: accuracy − that of no reduction, in words. gap: share of the oracle's gap closed; None for fixed ones.
        speed_up: of a whole generate at batch 1 against no reduction, with the smallest and largest of a prompt.
    """

    name: str
    accuracy: float
    tokens: float
    gflops: float
    interval: str
    gap: float | None
    speed_up: tuple[float, float, float]


@torch.inference_mode()
def run(
    model: Any, processor: Any, rows: Sequence[Mapping[str, Any]], policy: Any, batch: int = 8
) -> tuple[np.ndarray, np.ndarray, float]:
    """(Right or not [n], vision tokens with tries [n], decoder FLOPs in all) under one policy."""
    right, tokens, flops = [], [], 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        inputs = encode(processor, [r["question"] for r in part], [r["image"] for r in part]).to(model.device)
        out = model.generate(**inputs, policy=policy, do_sample=False, max_new_tokens=2)
        said, report = decode(processor, out, inputs["input_ids"].shape[1]), vtr.report(model)
        right += [text == row["answer"] for text, row in zip(said, part, strict=True)]
        tokens += [row.vision_tokens[0] + sum(count for _, count in row.tries) for row in report.rows]
        flops += report.flops
    return np.array(right), np.array(tokens), float(flops)


@torch.inference_mode()
def times(
    model: Any, processor: Any, rows: Sequence[Mapping[str, Any]], policies: Mapping[str, Any], repeats: int = 3
) -> dict[str, list[float]]:
    """Seconds of generate at batch 1, policies in turns, all questions one after the other."""
    out: dict[str, list[float]] = {name: [] for name in policies}
    for row in tqdm(rows, desc="time at batch 1", unit="question"):
        inputs = encode(processor, [row["question"]], [row["image"]]).to(model.device)

        def once(policy: Any, inputs: Any = inputs) -> float:
            start = now(model.device)
            model.generate(**inputs, policy=policy, do_sample=False, max_new_tokens=2)
            return now(model.device) - start

        for name, seconds in in_turns({n: partial(once, p) for n, p in policies.items()}, repeats).items():
            out[name].append(sorted(seconds)[repeats // 2])
    return out


def frontier(fixed: Sequence[tuple[float, float]], tokens: float) -> float:
    """What fixed scales, (tokens, accuracy) each, reach with so many tokens: the best of a line over log tokens."""
    fixed = sorted(fixed)
    best = np.maximum.accumulate([accuracy for _, accuracy in fixed])
    return float(np.interp(np.log(tokens), np.log([count for count, _ in fixed]), best))


def measure(model: Any, processor: Any, rows: list[dict[str, Any]], timed: int) -> dict[str, Any]:
    """Everything the table and the plot show."""
    data = ((r["image"], r["question"], r["answer"]) for r in rows)
    spent = [0] * len(SCALES)

    def note(step: int, report: vtr.Report) -> None:
        spent[step] += report.flops

    table = ask_all(model, processor, data, SCALES, max_new_tokens=2, total=len(rows), right=str.__eq__, note=note)
    scales = [f"m3:tokens={count}" for count in SCALES[:-1]]  # the last is the whole picture: "none"
    ran = {name: (table.right[:, i], table.tokens[:, i], float(spent[i])) for i, name in enumerate(scales)}
    policies: dict[str, Any] = {"none": None} | {m: vtr.pocket.autoscale(m) for m in ("cascade", "router")}
    ran |= {name: run(model, processor, rows, p) for name, p in tqdm(policies.items(), desc="policies")}
    fixed = [(float(ran[name][1].mean()), float(ran[name][0].mean())) for name in (*scales, "none")]
    right, cost = table.right, table.tokens
    chosen = np.where(right.any(1), right.argmax(1), 0)
    oracle = (float(cost[np.arange(len(cost)), chosen].mean()), float(right.any(1).mean()))
    seconds = times(model, processor, rows[:timed], {**{name: vtr.policy(name) for name in scales}, **policies})
    lines = []
    for name, (hits, tokens, flops) in ran.items():
        over = median_ratio(seconds["none"], seconds[name])
        line, at = float(hits.mean()), float(tokens.mean())
        below = frontier(fixed, at)
        groups = [row["picture"] for row in rows]
        lines.append(
            Line(
                name, line, at, flops / len(rows) / 1e9, str(paired(hits, ran["none"][0], groups)),
                (line - below) / (oracle[1] - below) if name in ("cascade", "router") else None,
                (over.value, over.low, over.high),
            )
        )  # fmt: skip
    return {
        "questions": len(rows), "timed": timed, "oracle": oracle, "fixed": fixed,
        "lines": [asdict(line) for line in lines], "curves": curves(table),
        "specs": {name: p.spec for name, p in policies.items() if isinstance(p, vtr.AutoScale)},
    }  # fmt: skip


def curves(table: Table) -> dict[str, list[tuple[float, float]]]:
    """(Tokens, accuracy) of both choosers at other thresholds than theirs."""
    cascade, router = vtr.pocket.autoscale("cascade"), vtr.pocket.autoscale("router")
    assert isinstance(cascade, vtr.AutoScale) and isinstance(router, vtr.AutoScale) and cascade.calibration is not None
    assert cascade.scales is not None and router.scales is not None
    few, all_ = (table.at([table.scales.index(count) for count in p.scales or ()]) for p in (cascade, router))
    estimates = {
        "cascade": (few, cascade_estimates(few, cascade.calibration), True),
        "router": (all_, router.estimates(table.inputs).numpy(), False),
    }
    return {
        name: sorted({outcome(part, found, threshold, tried)[::-1] for threshold in THRESHOLDS})
        for name, (part, found, tried) in estimates.items()
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The table."""
    out = [
        "| policy | accuracy | − none (points) | vision tokens, tries counted | GFLOPs | generate, speed-up "
        "| oracle's gap closed |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for line in found["lines"]:
        gap = "" if line["gap"] is None else f"{line['gap']:.0%}"
        value, low, high = line["speed_up"]
        out.append(
            f"| {line['name']} | {line['accuracy']:.1%} | {line['interval']} | {line['tokens']:.0f} | "
            f"{line['gflops']:.2f} | {value:.2f}× ({low:.2f}–{high:.2f}) | {gap} |"
        )
    tokens, accuracy = found["oracle"]
    out.append(f"| oracle (knows the answers) | {accuracy:.1%} | | {tokens:.0f} | | | 100% |")
    return (
        "\n".join(out) + f"\n\n{found['questions']} test questions; speed-up: median (smallest–largest) of "
        f"{found['timed']} questions at batch 1, vision tower included.\n"
    )


def plot(found: Mapping[str, Any]) -> Any:
    """Accuracy against tokens: fixed scales, the choosers at every threshold and at theirs, the oracle."""
    from vtr.eval.report.plots import figure

    made, (panel,) = figure(1, width=6)
    tokens, accuracy = zip(*sorted(found["fixed"]), strict=True)
    panel.plot(tokens, [100 * a for a in accuracy], "o-", color="k", label="fixed scales")
    own = {line["name"]: line for line in found["lines"]}
    for number, (name, curve) in enumerate(found["curves"].items()):
        panel.plot(*zip(*[(t, 100 * a) for t, a in curve], strict=True), ".-", ms=3, lw=0.8, color=f"C{number}")
        panel.plot(own[name]["tokens"], 100 * own[name]["accuracy"], "D", color=f"C{number}", label=name)
    panel.plot(found["oracle"][0], 100 * found["oracle"][1], "*", ms=14, color="C3", label="oracle")
    panel.set(xscale="log", xlabel="mean vision tokens, tries counted", ylabel="accuracy (%)")
    panel.set_title("choosing the scale without the answer")
    panel.legend()
    return made


def main(
    out: Annotated[Path | None, typer.Option(help="write autoscale.json, .md and .png into this folder")] = None,
    questions: Annotated[int, typer.Option(min=1, help="test questions")] = 960,
    timed: Annotated[int, typer.Option(min=1, help="questions timed at batch 1")] = 24,
    seed: Annotated[int, typer.Option(help="which questions")] = 0,
) -> None:
    """Compare AutoScale's choosers with fixed scales and the oracle, on the embedded model."""
    model, processor = vtr.pocket.load()
    vtr.patch(model)
    rows = list(vtr.pocket.samples(questions, split="test", seed=seed))
    for i, row in enumerate(rows):
        row["picture"] = i // 8  # eight questions a picture
    found = measure(model, processor, rows, timed)
    print(markdown(found))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        about = {"hardware": results.hardware(model.device), "versions": results.versions(), "seed": seed}
        told = {"command": results.command(), **found, **about}
        (out / "autoscale.json").write_text(json.dumps(told) + "\n")
        (out / "autoscale.md").write_text(markdown(found))
        plot(found).savefig(out / "autoscale.png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
