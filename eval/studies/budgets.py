"""Policies at equal budgets on the pocket model: accuracy, paired differences, prefill latency, FLOPs.

``python -m vtr.eval.studies.budgets --out docs/results`` writes the table (Markdown), the figures (JSON) and a plot
(PNG). Every selector of one budget lets the same number of vision tokens into the same decoder layers (a staircase
schedule is compared with single cuts of equal mean), so that only the choice of tokens differs.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm import tqdm
from vtr.eval.accuracy import blind  # noqa: F401  (registers the question-blind selector)
from vtr.eval.accuracy.stats import paired
from vtr.eval.cost.timing import time_call

import vtr
from vtr.chat import decode, encode

KEEPS = (0.25, 0.1, 0.05)
LAYERS = (0, 1, 2)
SELECTORS = ("fastv", "diverse", "uniform", "random")
COLORS = {"fastv": "C0", "diverse": "C1", "uniform": "C2", "random": "C3", "gsearch": "C4"}
STAIRS = [1.0, 1.0, 0.5, 0.25, 0.1, 0.05]
"""The hand-set G-Search schedule: these keeps, the last one for all deeper layers."""


@dataclass
class Result:
    """One policy on all questions."""

    spec: str
    group: str
    """Results of one group have equal budgets."""
    correct: list[bool] = field(default_factory=list)
    mean_keep: float = 0.0
    gflops: float = 0.0
    prefill_ms: float = 0.0

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.correct))


def contenders(depth: int, keeps: Sequence[float] = KEEPS) -> list[Result]:
    """No reduction, every selector at every cut layer and budget, the staircase and single cuts of equal mean."""
    out = [Result("none", "none")]
    for layer in LAYERS:
        for keep in keeps:
            names = SELECTORS if layer else SELECTORS[1:]  # nothing has attended to anything before layer 0
            out += [Result(f"{name}:keep={keep},layer={layer}", f"{keep:.0%} at {layer}") for name in names]
    stairs = (STAIRS + [STAIRS[-1]] * depth)[:depth]
    first = next(i for i, keep in enumerate(stairs) if keep != 1.0)
    mean = round(sum(stairs[first:]) / (depth - first), 4)
    group = f"stairs, mean {mean:.1%} from {first}"
    out.append(Result("gsearch:schedule=" + json.dumps(stairs, separators=(",", ":")), group))
    out += [Result(f"{name}:keep={mean},layer={first}", group) for name in SELECTORS]
    return out


def batches(n: int, seed: int, size: int) -> Iterator[list[dict[str, Any]]]:
    """Held-out questions; those of one picture stand together."""
    batch: list[dict[str, Any]] = []
    for sample in vtr.pocket.samples(n, split="test", seed=seed):
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def tokenize(processor: Any, batch: list[dict[str, Any]]) -> Any:
    """A left-padded batch of chat prompts, one picture each."""
    return encode(processor, [s["question"] for s in batch], [s["image"] for s in batch])


@torch.inference_mode()
def measure(model: Any, processor: Any, results: list[Result], n: int, seed: int, size: int) -> list[dict[str, Any]]:
    """Answer every question under every policy (answers are one word: one decoded token)."""
    samples: list[dict[str, Any]] = []
    flops = {r.spec: 0 for r in results}
    means = {r.spec: 0.0 for r in results}
    with tqdm(total=n * len(results), desc="questions × policies", unit="q") as bar:
        for batch in batches(n, seed, size):
            inputs = tokenize(processor, batch)
            for result in results:
                given = None if result.spec == "none" else result.spec
                out = model.generate(**inputs, policy=given, max_new_tokens=1, do_sample=False)
                words = decode(processor, out, inputs["input_ids"].shape[1])
                result.correct += [word == s["answer"] for word, s in zip(words, batch, strict=True)]
                report = vtr.report(model)
                flops[result.spec] += report.flops
                means[result.spec] += sum(row.mean_keep for row in report.rows)
                bar.update(len(batch))
            samples += batch
    for result in results:
        result.gflops = flops[result.spec] / len(samples) / 1e9
        result.mean_keep = means[result.spec] / len(samples)
    return samples


def time_all(model: Any, processor: Any, results: list[Result], seed: int, prompts: int, repeats: int) -> None:
    """Median prefill latency at batch 1; policies take turns so that a slow moment hits all of them."""
    inputs = [tokenize(processor, batch) for batch in batches(prompts, seed + 1, 1)]
    for one in tqdm(inputs, desc="latency"):
        for result in results:
            given = None if result.spec == "none" else result.spec
            timing = time_call(model, one, given, repeats=repeats)
            result.prefill_ms += timing.prefill_ms / len(inputs)


def markdown(results: list[Result], samples: list[dict[str, Any]], groups: list[int]) -> str:
    """The table: a block per budget, differences against random and uniform with 95 % intervals (points)."""
    base = results[0]
    lines = [
        f"{len(samples)} held-out questions about {len(set(groups))} pictures; CPU ({platform.machine()}), "
        f"{torch.get_num_threads()} threads, float32, sdpa. Difference in points with a 95 % paired bootstrap interval "
        "over pictures.",
        "",
        "| budget | policy | accuracy | − random | − uniform | mean keep | GFLOPs | prefill ms | speed-up |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    by_group: dict[str, dict[str, Result]] = {}
    for r in results:
        by_group.setdefault(r.group, {})[r.spec.split(":")[0]] = r
    for group, members in by_group.items():
        for name, r in members.items():
            cells = []
            for other in ("random", "uniform"):
                rival = members.get(other)
                show = rival is not None and rival is not r
                cells.append(str(paired(r.correct, rival.correct, groups)) if show and rival is not None else "")
            lines.append(
                f"| {group} | {name} | {r.accuracy:.1%} | {cells[0]} | {cells[1]} | {r.mean_keep:.1%} | "
                f"{r.gflops:.2f} | {r.prefill_ms:.1f} | {base.prefill_ms / r.prefill_ms:.2f}× |"
            )
    return "\n".join(lines) + "\n"


def plot(results: list[Result], path: Path, keeps: Sequence[float] = KEEPS) -> None:
    """Accuracy against the share kept, per cut layer, and accuracy against prefill latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6), layout="constrained")
    axes = figure.subplots(1, len(LAYERS) + 1, sharey=True)
    base = results[0]
    for axis, layer in zip(axes, LAYERS, strict=False):
        for name in SELECTORS:
            mine = [r for r in results if r.spec.startswith(name + ":") and r.group.endswith(f" at {layer}")]
            if mine:
                axis.plot(keeps, [r.accuracy for r in mine], "o-", color=COLORS[name], label=name, ms=4)
        axis.axhline(base.accuracy, color="k", lw=0.8, ls="--", label="no reduction")
        axis.set(xscale="log", xlabel="vision tokens kept", title=f"cut on entering layer {layer}")
        axis.set_xticks(keeps, [f"{k:.0%}" for k in keeps])
        axis.minorticks_off()
    axes[0].set_ylabel("accuracy")
    axes[1].legend(fontsize=8)
    for name in (*SELECTORS, "gsearch"):
        mine = [r for r in results if r.spec.startswith(name + ":")]
        axes[-1].plot(
            [r.prefill_ms for r in mine], [r.accuracy for r in mine], "o", color=COLORS[name], label=name, ms=4
        )
    axes[-1].plot([base.prefill_ms], [base.accuracy], "k*", label="no reduction")
    axes[-1].set(xlabel="prefill latency (ms)", title="accuracy against latency")
    axes[-1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main(
    out: Annotated[Path, typer.Option(help="folder for budgets.md, budgets.json, budgets.png")] = Path("docs/results"),
    n: Annotated[int, typer.Option(help="questions")] = 320,
    keep: Annotated[list[float] | None, typer.Option(help="a ratio to compare at; may be given again")] = None,
    seed: Annotated[int, typer.Option(help="which questions")] = 0,
    batch_size: Annotated[int, typer.Option(help="questions per call")] = 8,
    timed_prompts: Annotated[int, typer.Option(help="prompts timed at batch 1")] = 4,
    repeats: Annotated[int, typer.Option(help="timed runs of each")] = 7,
) -> None:
    """Measure accuracy, latency and FLOPs of the policies at equal budgets on the pocket model."""
    model, processor = vtr.pocket.load()
    vtr.patch(model)
    keeps = sorted(keep or KEEPS, reverse=True)
    results = contenders(model.config.text_config.num_hidden_layers, keeps)
    samples = measure(model, processor, results, n, seed, batch_size)
    seen: dict[int, int] = {}
    groups = [seen.setdefault(id(s["image"]), len(seen)) for s in samples]
    time_all(model, processor, results, seed, timed_prompts, repeats)
    out.mkdir(parents=True, exist_ok=True)
    table = markdown(results, samples, groups)
    (out / "budgets.md").write_text(table)
    (out / "budgets.json").write_text(json.dumps([{**asdict(r), "correct": sum(r.correct)} for r in results], indent=1))
    plot(results, out / "budgets.png", keeps)
    print(table)


if __name__ == "__main__":
    typer.run(main)
