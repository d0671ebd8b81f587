"""How good a found schedule is: held-out questions, beside no reduction and other policies of equal FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from vtr.eval.accuracy.answers import Bench, costs
from vtr.eval.accuracy.contenders import Contender
from vtr.eval.accuracy.data import Sample
from vtr.eval.accuracy.metrics import metric
from vtr.eval.accuracy.run import prefill_times
from vtr.eval.accuracy.stats import mcnemar, paired
from vtr.eval.report import results

import vtr
from vtr.data.choices import Choices
from vtr.search import Example

BATCH = 8


@dataclass
class Line:
    """One policy on all held-out questions.

    Attributes:
        scores: of each question. mean_keep, flops, kv_bytes: means of a question. prefill_ms: None if not timed.
    """

    name: str
    spec: str
    scores: list[float] = field(default_factory=list)
    mean_keep: float = 0.0
    flops: float = 0.0
    kv_bytes: float = 0.0
    prefill_ms: dict[str, float] | None = None

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.scores))


def measure(
    model: Any, processor: Any, policies: Mapping[str, vtr.Policy | None], held_out: Sequence[Example],
    latency: int = 0, max_new_tokens: int = 32, score: str = "auto",
) -> list[Line]:  # fmt: skip
    """Answer every question under every policy (by name), pictures encoded once; time the prefill of some in turns.

    Args:
        held_out: examples with answers. latency: so many of them are timed at batch 1. score: a metric of
            :mod:`vtr.eval.accuracy.metrics`.

    Raises:
        ValueError: an example without an answer.
    """
    samples = [_sample(index, one) for index, one in enumerate(held_out)]  # questions have their choices in them
    choices = [one.choices for one in held_out]
    chosen = {name: Contender("none" if p is None else p.spec, name, p) for name, p in policies.items()}
    bench = Bench(model, processor, list(chosen.values()), metric(score), max_new_tokens=max_new_tokens)
    lines = [Line(one.name, one.spec) for one in bench.contenders]
    with tqdm(total=len(samples) * len(lines), desc="held-out questions × policies", unit="") as bar:
        bench.tick = bar.update
        for start in range(0, len(samples), BATCH):
            batch = bench.prepare(samples[start : start + BATCH])
            if batch.bad:
                raise ValueError(f"a held-out question cannot be used: {batch.bad[0].reason}")
            with torch.inference_mode(), vtr.shared_features(model):
                for one, line in zip(bench.contenders, lines, strict=True):
                    _answer(bench, batch, one, line, choices)
    for line in lines:
        line.mean_keep /= len(samples)
        line.flops /= len(samples)
        line.kv_bytes /= len(samples)
    if latency:
        times = prefill_times(bench, samples, latency)  # type: ignore[arg-type]
        for line in lines:
            line.prefill_ms = times[line.spec]
    return lines


def _answer(bench: Bench, batch: Any, one: Contender, line: Line, choices: Sequence[Choices]) -> None:
    said = bench.say(batch.inputs, one.policy)
    for text, sample, cost in zip(said, batch.samples, costs(bench.model), strict=True):
        line.scores.append(bench.metric.score(text, sample.answers, choices[sample.index]))
        line.mean_keep += sum(cost["tokens"]) / (len(cost["tokens"]) * cost["total"])
        line.flops += cost["flops"]
        line.kv_bytes += cost["kv_bytes"]


def _sample(index: int, one: Example) -> Sample:
    if one.answer is None:
        raise ValueError(f"{one.question!r} has no answer to measure by")
    return Sample(index, str(index), one.question, (one.answer,), None, "all", one.picture, lambda: one.image)


def groups_of(held_out: Sequence[Example]) -> list[int]:
    """The picture each question belongs to, numbered; the bootstrap draws whole pictures."""
    known: dict[str, int] = {}
    return [known.setdefault(one.picture, len(known)) for one in held_out]


def compare(a: Line, b: Line, groups: Sequence[int]) -> dict[str, Any]:
    """a − b on the same questions: difference, 95 % bootstrap interval over pictures, wins, losses, McNemar's p."""
    found = paired(a.scores, b.scores, groups)
    return {
        "a": a.name, "b": b.name, "difference": found.difference, "low": found.low, "high": found.high,
        "wins": found.wins, "losses": found.losses, "p": mcnemar(found.wins, found.losses),
    }  # fmt: skip


def said(one: Mapping[str, Any]) -> str:
    """A comparison in words: points with interval, discordant pairs, p."""
    return (
        f"{one['a']} − {one['b']}: {100 * one['difference']:+.2f} points "
        f"[{100 * one['low']:+.2f}, {100 * one['high']:+.2f}], {one['wins']} won, {one['losses']} lost, "
        f"McNemar p {one['p']:.2g}"
    )


def table(lines: Sequence[Line], groups: Sequence[int]) -> str:
    """Markdown: the first line is what the others are compared with."""
    base = lines[0]
    head = "| policy | accuracy | − none (points) | mean keep | GFLOPs | ÷ none | KV MiB | prefill ms | speed-up |"
    out = [head, "|---" + "|--:" * 8 + "|"]
    for line in lines:
        away = "–" if line is base else str(paired(line.scores, base.scores, groups))
        ms, faster = "–", "–"
        if line.prefill_ms and base.prefill_ms:
            ms = f"{line.prefill_ms['median']:.1f}"
            faster = f"{base.prefill_ms['median'] / line.prefill_ms['median']:.2f}×"
        out.append(
            f"| {line.name} | {line.accuracy:.1%} | {away} | {line.mean_keep:.1%} | {line.flops / 1e9:.3g} | "
            f"{base.flops / line.flops:.2f}× | {line.kv_bytes / 2**20:.2f} | {ms} | {faster} |"
        )
    return "\n".join(out)


def to_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Plain data, without the single scores."""
    return [
        {
            "policy": line.spec, "name": line.name, "accuracy": line.accuracy, "right": sum(line.scores),
            "mean_keep": line.mean_keep, "flops": line.flops, "kv_bytes": line.kv_bytes, "prefill_ms": line.prefill_ms,
        }
        for line in lines
    ]  # fmt: skip


def write(
    folder: Path, found: vtr.Schedule, record: Mapping[str, Any], lines: Sequence[Line], held_out: Sequence[Example]
) -> str:
    """Write ``report.md`` and ``report.json``; returns the Markdown.

    Args:
        lines: no reduction first, then the found schedule, then the others.
    """
    groups = groups_of(held_out)
    compared = [compare(lines[1], other, groups) for other in [lines[0], *lines[2:]]]
    spent = vtr.search.prefix.Spent(**record["spent"])
    ratios = ", ".join(f"{name} {value:.1%}" for name, value in record["ratios"].items())
    text = "\n".join(
        [
            f"# Schedule found by {record['method']}", "",
            f"`{[round(float(keep), 4) for keep in found]}`", "",
            f"Searched on {record['questions']} questions about {len(record['pictures'])} pictures, objective "
            f"{record['objective']}: {record['score']:.4g} (unreduced {record['base']:.4g}). Cost to no reduction: "
            f"{ratios}.",
            "", *spent.table().split("\n"), "",
            f"Measured on {len(held_out)} other questions about {len(set(groups))} other pictures, 95 % intervals by "
            "paired bootstrap over pictures; the others cost as many decoder prefill FLOPs:", "",
            table(lines, groups), "", *[f"- {said(one)}" for one in compared],
            *[f"\nWarning: {told}" for told in record["warnings"]], "",
        ]
    )  # fmt: skip
    (folder / "report.md").write_text(text)
    body = {"schedule": list(found), "lines": to_json(lines), "compared": compared, "questions": len(held_out)}
    results.save(folder / "report.json", "quality", body, seed=record["seed"])
    return text
