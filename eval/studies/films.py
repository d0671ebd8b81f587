"""Films under policies that look at time and under others: ``python -m vtr.eval.studies.films --rows runs/films``.

Three parts, each written as soon as it is there. ``results.json`` in the folder of the rows is that of ``vtr eval
--task video`` with every contender at 50, 25 and 12.5 % of the tokens. ``one-frame.json`` says what a single frame
gives away. ``long-film.json`` has prefill CPU time, FLOPs and bytes of the KV cache of a film of 128 frames (longer
than any the model was trained on: only what it costs counts there). ``films.png`` shows them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from vtr.eval.accuracy import run
from vtr.eval.accuracy.answers import Bench
from vtr.eval.accuracy.contenders import NONE, contender
from vtr.eval.accuracy.data import Sample, Video
from vtr.eval.accuracy.processes import Rank
from vtr.eval.cost.interleave import in_turns, keep_freed_memory, median_ratio
from vtr.eval.report import results

import vtr
from vtr import models
from vtr.budget import at_budget

MODEL = "pocket-video"
BUDGETS = (0.5, 0.25, 0.125)
DIRECT = ("evs:keep={}", "vidcom2:keep={}", "frames:keep={}", "uniform:keep={},layer=0", "random:keep={},layer=0")
RANKED = ("fastv", "gsearch")
"""They see the question and cut inside the decoder: set so that the mean over its layers is the budget."""
SINGLE = {"first": 0.0, "middle": 0.5, "last": 1.0}
SHOWN = {
    "evs": "EVS", "vidcom2": "VidCom²", "frames": "uniform frames", "uniform": "uniform tokens", "random": "random",
    "fastv": "FastV", "gsearch": "G-Search", "pool": "pool",
}  # fmt: skip


def specs(model: Any, budgets: Sequence[float] = BUDGETS) -> list[str]:
    """Every contender at every budget; ``pool`` where it can be had."""
    found = []
    for budget in budgets:
        found += [contender(spec.format(budget)).spec for spec in DIRECT]
        found += [at_budget(name, model, budget).spec for name in RANKED]
    return [*found, "pool:grid=3"]


# -- what one frame gives away -----------------------------------------------------------------------------------------
def single(video: Video, place: float) -> Video:
    """One frame of a video, at a place from 0 (the first) to 1 (the last)."""
    at = round(place * (len(video.frames) - 1))
    return replace(video, frames=[video.frames[at]], indices=[video.indices[at]], times=None)


def one_frame(bench: Bench, samples: Sequence[Sample], batch: int) -> dict[str, dict[str, float]]:
    """Accuracy by kind with a single frame and no reduction."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in SINGLE}
    for start in tqdm(range(0, len(samples), batch), desc="one frame"):
        part = samples[start : start + batch]
        for name, place in SINGLE.items():
            with torch.inference_mode():
                said = bench.say(bench.encode(part, [single(one.seen(), place) for one in part]), None)
            for sample, text in zip(part, said, strict=True):
                score = bench.metric.score(text, sample.answers, sample.choices)
                for kind in ("all", sample.kind):
                    found[name].setdefault(kind, []).append(score)
    return {name: {kind: sum(s) / len(s) for kind, s in sorted(kinds.items())} for name, kinds in found.items()}


# -- a long film -------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def long_film(bench: Bench, sample: Sample, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """What one film costs under each spec: vision tokens, FLOPs and KV bytes, and CPU time ÷ that of no reduction.

    CPU time is of the whole forward: vision tower, choice of tokens and prefill. FLOPs are as reported, without the
    tower's.
    """
    rows, runs = [], {}
    bench.tick = lambda count: None
    batch = bench.prepare([sample])
    for spec in names:
        one = contender(spec)
        inputs = bench.inputs_for(one, batch)

        def forward(inputs: Any = inputs, policy: Any = one.policy) -> float:
            start = time.process_time()
            bench.model(**inputs, policy=policy, use_cache=True, logits_to_keep=1)
            return time.process_time() - start

        forward()
        report = vtr.report(bench.model)
        tokens = report.rows[0].vision_tokens
        rows.append(
            {
                "policy": spec, "name": one.name, "vision_tokens": sum(tokens) / len(tokens), "flops": report.flops,
                "kv_bytes": report.kv_bytes,
            }
        )  # fmt: skip
        runs[spec] = forward
    times = in_turns(runs, repeats, warmup=False)
    for row in rows:
        ratio = median_ratio(times[row["policy"]], times[NONE])
        seconds = sorted(times[row["policy"]])[repeats // 2]
        row |= {"cpu_s": seconds, "cpu": {"value": ratio.value, "low": ratio.low, "high": ratio.high}}
    return rows


# -- the picture -------------------------------------------------------------------------------------------------------
def plot(accuracy: Mapping[str, Any], one: Mapping[str, Any], cost: Mapping[str, Any]) -> Any:
    """Accuracy against tokens kept, over the kinds that need time; and what the long film costs."""
    from vtr.eval.report.plots import figure

    made, (left, right) = figure(2, width=6)
    rows = accuracy["policies"]
    for number, (name, label) in enumerate(SHOWN.items()):
        mine = sorted((row["mean_keep"], timed(row)) for row in rows if row["name"] == name)
        if mine:
            keep, right_answers = zip(*mine, strict=True)
            left.plot([100 * k for k in keep], [100 * a for a in right_answers], "o-", color=f"C{number}", label=label)
    whole = next(row for row in rows if row["policy"] == NONE)
    left.axhline(100 * timed(whole), color="k", lw=0.8, ls="--", label="no reduction")
    best = max(timed({"by_kind": kinds}) for kinds in one["frames"].values())
    left.axhline(100 * best, color="k", lw=0.8, ls=":", label="one frame")
    left.set(xscale="log", xlabel="vision tokens kept (%)", ylabel="accuracy (%)", title="questions that need time")
    left.set_xticks([12.5, 25, 50, 100], ["12.5", "25", "50", "100"])
    left.minorticks_off()
    left.legend(fontsize=7)
    base, names = cost["rows"][0], [SHOWN.get(row["name"], "no reduction") for row in cost["rows"]]
    parts = {
        "CPU time, tower included": [row["cpu"]["value"] for row in cost["rows"]],
        "FLOPs": [row["flops"] / base["flops"] for row in cost["rows"]],
        "KV cache": [row["kv_bytes"] / base["kv_bytes"] for row in cost["rows"]],
    }
    for i, (label, shares) in enumerate(parts.items()):
        places = [y + 0.27 * (i - 1) for y in range(len(names))]
        right.barh(places, [100 * share for share in shares], 0.25, label=label)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xlabel="% of no reduction", title=f"{cost['frames']} frames, {cost['budget']:.0%} of the tokens")
    right.legend(fontsize=7)
    return made


def timed(row: Mapping[str, Any]) -> float:
    """Mean accuracy over the kinds that need time."""
    kinds = [value for kind, value in row["by_kind"].items() if kind not in ("still", "all")]
    return float(sum(kinds) / len(kinds))


def main(
    rows: Annotated[Path, typer.Option(help="folder of the answers as they come; a run goes on there")],
    out: Annotated[Path, typer.Option(help="folder of the other results and the picture")] = Path("docs/results"),
    limit: Annotated[int, typer.Option(min=1, help="questions")] = 480,
    seed: Annotated[int, typer.Option(help="which questions")] = 0,
    frames: Annotated[int, typer.Option(min=8, help="in the long film")] = 128,
    budget: Annotated[float, typer.Option(help="of the long film: the share of tokens kept")] = 0.25,
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of the long film")] = 5,
    processes: Annotated[int, typer.Option(min=1, help="of the accuracy part")] = 1,
) -> None:
    """Accuracy over budgets on films, what single frames give away, and the cost of a long film."""
    keep_freed_memory()
    model, _ = models.load(MODEL, "cpu")
    wanted = specs(model)
    settings = run.Settings(policies=tuple(wanted), model=MODEL, data="pocket:task=video", limit=limit, seed=seed)
    run.evaluate(settings, rows, resume=True, processes=processes)
    out.mkdir(parents=True, exist_ok=True)
    bench, _, source = run.prepare(replace(settings, policies=(NONE,)), Rank())
    samples = [one for one in source if isinstance(one, Sample)]
    about = {"model": MODEL, "data": settings.data}
    single_frames = {**about, "samples": len(samples), "frames": one_frame(bench, samples, settings.batch_size)}
    single_frames = results.save(out / "one-frame.json", "films", single_frames, seed=seed)
    source = replace(settings, data=f"pocket:task=video,frames={frames}", limit=1).open()
    film = next(one for one in islice(source, 1) if isinstance(one, Sample))
    names = [NONE, *(spec for spec in specs(model, [budget]))]
    torch.set_num_threads(1)
    cost = {**about, "frames": frames, "budget": budget, "repeats": repeats}
    cost = results.save(
        out / "long-film.json", "films", {**cost, "rows": long_film(bench, film, names, repeats)}, seed=seed
    )
    plot(results.load(rows / run.RESULTS), single_frames, cost).savefig(out / "films.png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
