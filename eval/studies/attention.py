"""Policies that reduce attention itself: how many tokens take part, layer by layer, and whether the time follows.

``python -m vtr.eval.studies.attention ratio --out docs/results`` draws what ZipVL lets take part, of every layer and
question. ``… cost --out docs/results`` times EE-MLLM's prefill beside what its FLOPs say, in CPU time and in turns.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from vtr.eval.cost.interleave import in_turns, keep_freed_memory, median_ratio, text_times
from vtr.eval.cost.midsize import SMALL, Size, build, prompts
from vtr.eval.report.results import hardware, versions

import vtr
from vtr.chat import encode

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
OUT = Annotated[Path, typer.Option(help="the folder that gets the table and the picture")]
LAYERS, TEXT = 4, 256
"""Of the models that EE-MLLM is timed on; text tokens behind the picture."""
SIDES = {576: 24, 2880: 54, 10_000: 100}
"""Vision tokens → patches along a side (54² is 2,916)."""


@torch.inference_mode()
def ratios(spec: str, limit: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """float [questions, layers], the share of a row's vision tokens that asks; and the kinds of the questions."""
    model, processor = vtr.pocket.load()
    vtr.patch(model)
    found, kinds = [], []
    for sample in tqdm(vtr.pocket.samples(limit, split="test", seed=seed), total=limit, desc="questions"):
        model(**encode(processor, [sample["question"]], [sample["image"]]), policy=spec)
        (row,) = vtr.report(model).rows
        found.append([asked / row.total for asked in row.asked])
        kinds.append(sample["type"])
    return np.array(found), kinds


@app.command()
def ratio(
    out: OUT = Path("docs/results"),
    limit: Annotated[int, typer.Option(min=1, help="questions")] = 160,
    tau: Annotated[float, typer.Option(min=0.01, max=1.0, help="attention that those who take part hold")] = 0.975,
    seed: Annotated[int, typer.Option(help="which pocket questions")] = 0,
) -> None:
    """ZipVL's ratio per layer and question, as a picture and as numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    spec = f"zipvl:tau={tau}"
    shares, kinds = ratios(spec, limit, seed)
    order = sorted(range(len(kinds)), key=lambda i: (kinds[i], shares[i].mean()))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.2), width_ratios=(1, 1.3), layout="constrained")
    means = shares.mean(0)
    low, high = np.percentile(shares, (10, 90), axis=0)
    left.fill_between(range(len(means)), 100 * low, 100 * high, alpha=0.25, label="8 of 10 questions")
    left.plot(100 * means, "o-", label="mean")
    left.set(xlabel="decoder layer", ylabel="vision tokens that take part, %", ylim=(0, 102), title=f"ZipVL, τ = {tau}")
    left.legend(loc="lower left")
    drawn = right.imshow(100 * shares[order], aspect="auto", vmin=0, vmax=100, interpolation="nearest")
    starts = [i for i, at in enumerate(order) if i == 0 or kinds[at] != kinds[order[i - 1]]]
    right.set_yticks(starts, [kinds[order[i]] for i in starts])
    right.set(xlabel="decoder layer", title="question by question, by kind")
    figure.colorbar(drawn, ax=right, label="%")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "zipvl.png", dpi=110)
    pyplot.close(figure)
    by_kind = {kind: shares[[k == kind for k in kinds]].mean(0).round(4).tolist() for kind in sorted(set(kinds))}
    body = {
        "policy": spec, "model": "pocket", "questions": limit, "seed": seed, "mean": means.round(4).tolist(),
        "p10": low.round(4).tolist(), "p90": high.round(4).tolist(), "by_kind": by_kind, "versions": versions(),
    }  # fmt: skip
    (out / "zipvl.json").write_text(json.dumps(body, indent=1) + "\n")
    table = Table("kind", *(f"{layer}" for layer in range(len(means))), title="share that takes part, per layer")
    for kind, values in {"all": means.tolist(), **by_kind}.items():
        table.add_row(kind, *(f"{100 * value:.0f}" for value in values))
    Console(width=120).print(table)


@torch.inference_mode()
def timed(size: Size, repeats: int, seed: int, specs: dict[str, Any]) -> dict[str, Any]:
    """Prefills of one row in turns: CPU seconds beside no policy, and FLOPs beside no policy."""
    model = vtr.patch(build(size, "cpu", torch.float32, seed=seed))
    inputs = prompts(model, size, [(1, size.text_tokens)], seed)
    flops: dict[str, int] = {}

    def run(name: str) -> float:
        with text_times(model, time.process_time) as seconds:
            model(**inputs, policy=specs[name], logits_to_keep=1)
        report = vtr.report(model)
        flops[name] = report.prefill_flops + report.selector_flops
        return seconds[-1]

    times = in_turns({name: lambda name=name: run(name) for name in specs}, repeats)  # type: ignore[misc]
    out: dict[str, Any] = {"vision_tokens": size.vision_tokens, "text_tokens": size.text_tokens, "rows": {}}
    for name in list(specs)[1:]:
        measured = median_ratio(times[name], times["none"])
        said = flops[name] / flops["none"]
        out["rows"][name] = {
            "cpu_time": measured.value, "low": measured.low, "high": measured.high, "flops": said,
            "time_over_flops": measured.value / said,
        }  # fmt: skip
    return out


@app.command()
def cost(
    out: OUT = Path("docs/results"),
    vision: Annotated[list[int], typer.Option(help="vision tokens: 576, 2880 or 10000")] = [576, 2880, 10_000],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=3, help="rounds, each policy once")] = 9,
    seed: Annotated[int, typer.Option(help="of weights and prompts")] = 0,
) -> None:
    """EE-MLLM's prefill beside no reduction: CPU time, and what its FLOPs say."""
    if strange := sorted(set(vision) - set(SIDES)):
        raise typer.BadParameter(f"no picture of {strange[0]} tokens: choose among {', '.join(map(str, SIDES))}")
    keep_freed_memory()
    specs = {"none": None, "ee-mllm": "ee-mllm:layers=all", "ee-mllm, deeper half": "ee-mllm:layers=0.5"}
    found = []
    for tokens in tqdm(vision, desc="sizes"):
        size = replace(SMALL, layers=LAYERS, side=SIDES[tokens], text_tokens=TEXT)
        found.append(timed(size, repeats if tokens < 10_000 else max(3, repeats // 3), seed, specs))
    out.mkdir(parents=True, exist_ok=True)
    body = {
        "model": f"{LAYERS} layers of {SMALL.hidden_size}",
        "hardware": hardware(),
        "versions": versions(),
        "seed": seed,
    }
    (out / "ee-mllm.json").write_text(json.dumps({**body, "sizes": found}, indent=1) + "\n")
    table = Table("vision tokens", "policy", "FLOPs", "CPU time", "time ÷ FLOPs", title="÷ no reduction")
    for one in found:
        for name, row in one["rows"].items():
            spread = f"{row['cpu_time']:.3f} ({row['low']:.3f}–{row['high']:.3f})"
            table.add_row(
                f"{one['vision_tokens']:,}", name, f"{row['flops']:.3f}", spread, f"{row['time_over_flops']:.3f}"
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    app()
