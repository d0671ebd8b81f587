"""``auto`` beside its choices and the oracle, on every pocket model: ``python -m vtr.eval.studies.auto``.

Tuned on validation questions (one a picture), measured on test questions: accuracy, vision tokens and FLOPs with all
tries counted, the time of whole answers in turns, how much of the way to the oracle is gone (which takes the cheapest
choice that is right), which kinds of questions needed what, and the same where pictures have other fonts and tints than
any the model has seen. Questions are asked once under every choice; thresholds are searched on the record.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch as stand_in

import numpy as np
import torch
import typer
from tqdm import tqdm
from vtr.eval.accuracy.metrics import metric
from vtr.eval.accuracy.stats import paired
from vtr.eval.cost.interleave import in_turns, median_ratio
from vtr.eval.report import results
from vtr.eval.studies.autoscale import frontier
from vtr.eval.studies.promise import HEAD, Kept, line, on, simulate, thresholds

import vtr
from vtr.chat import encode
from vtr.data.records import Sample
from vtr.data.sources import open_data, usable
from vtr.models import load
from vtr.training import auto
from vtr.training.asked import Asked, ask

FAMILIES = {"pocket": None, "pocket-joint": "pocket-joint", "pocket-internvl": "pocket-internvl"}
MODELS = "pocket,pocket-joint,pocket-internvl"
LONGEST = 2
"""Tokens of an answer: a word, and its end."""
LOSSES = (0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05)
"""What may be lost, of the curve."""


# -- questions ---------------------------------------------------------------------------------------------------------
@contextmanager
def other_pictures() -> Iterator[None]:
    """Scenes are painted with another font, and with colours mixed with a fifth of gray."""
    from matplotlib.font_manager import FontProperties, findfont
    from PIL import ImageFont

    from vtr.pocket import scenes

    path = findfont(FontProperties(family="DejaVu Serif", weight="bold"))  # comes with matplotlib
    tints = {name: tuple(round(0.8 * c + 0.2 * 128) for c in rgb) for name, rgb in scenes.COLORS.items()}
    with (
        stand_in.object(scenes, "_font", lambda size: ImageFont.truetype(path, size)),
        stand_in.dict(scenes.COLORS, tints),
    ):
        yield


def questions(part: str, count: int, seed: int) -> list[Sample]:
    """ "val": one a picture, to tune on; "test": as `vtr eval` draws them; "shift": likewise, of other pictures."""
    spec = "pocket:split=val,per_scene=1" if part == "val" else "pocket"
    drawn = seed + {"val": 5, "test": 0, "shift": 1}[part]
    with other_pictures() if part == "shift" else nullcontext():
        return usable(open_data(spec, limit=count, seed=drawn), spec)


def asked(
    model: Any, processor: Any, samples: Sequence[Sample], names: Sequence[str], path: Path | None, shown: str
) -> Asked:  # fmt: skip
    """What every choice says; from a file, if there is one.

    Raises:
        ValueError: the file is about other questions or choices.
    """
    if path is not None and path.is_file():
        found = Asked.load(path)
        if found.choices != list(names) or found.group.tolist() != [one.group for one in samples]:
            raise ValueError(f"{path} holds answers to other questions, or under other choices: leave it out")
        return found
    score = metric("exact").score
    choices = [(name, None if name == "none" else vtr.policy(name)) for name in names]
    made = ask(
        model, processor, samples, choices, lambda reply, one: score(reply, one.answers, one.choices),
        max_new_tokens=LONGEST, total=len(samples), shown=shown,
    )  # fmt: skip
    if path is not None:
        made.save(path)
    return made


# -- figures -----------------------------------------------------------------------------------------------------------
def oracle(found: Asked) -> np.ndarray:
    """int [n]: the cheapest choice that is right; the cheapest of all where none is."""
    right = found.score > 0.5
    return np.where(right.any(1), right.argmax(1), 0)


def figures(found: Asked, chosen: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Accuracy, tokens, the difference to the last choice, and how much of the way to the oracle.

    Args:
        chosen: int [n], which choice each got. tokens: [n], tries counted.
    """
    every = np.arange(len(found))
    score, last, best = found.score[every, chosen], found.score[:, -1], oracle(found)
    there, here, whole = found.tokens[every, best].mean(), tokens.mean(), found.tokens[:, -1].mean()
    fixed = list(zip(found.tokens.mean(0).tolist(), found.score.mean(0).tolist(), strict=True))
    below, top = frontier(fixed, float(here)), float(found.score[every, best].mean())
    return {
        "accuracy": float(score.mean()), "tokens": float(here), "interval": str(paired(score, last, found.group)),
        "difference": float(score.mean() - last.mean()), "gap_tokens": float((whole - here) / (whole - there)),
        "gap_accuracy": (float(score.mean()) - below) / max(top - below, 1e-9),
        "loss": float(np.maximum(last - score, 0).mean()),
    }  # fmt: skip


def by_kind(found: Asked, chosen: np.ndarray) -> dict[str, dict[str, Any]]:
    """Per kind of question: how many got which choice, accuracy under auto and under the last choice, and the oracle's
    shares."""
    best, out = oracle(found), {}
    for kind in sorted(set(found.kind.tolist())):
        mine = found.kind == kind
        rows = np.flatnonzero(mine)
        out[kind] = {
            "questions": int(mine.sum()),
            "got": [float((chosen[mine] == s).mean()) for s in range(len(found.choices))],
            "needed": [float((best[mine] == s).mean()) for s in range(len(found.choices))],
            "accuracy": float(found.score[rows, chosen[rows]].mean()), "last": float(found.score[rows, -1].mean()),
        }  # fmt: skip
    return out


def curve(val: Asked, test: Asked, costs: auto.Costs, confidence: float) -> list[dict[str, float]]:
    """What each promise costs: tuned on ``val``, measured on ``test``."""
    out = []
    for loss in LOSSES:
        try:
            made = auto.tune(val, costs, loss=loss, confidence=confidence, binary=True)
        except ValueError:  # too few questions for so small a loss, or no try pays
            continue
        found = on(made, test, costs)
        out.append(
            {"promised": loss, "loss": float(found.loss.mean()), "cost": float(found.cost.mean() / costs.taken[-1]),
             "tokens": float(found.tokens.mean()), "accuracy": float(found.score.mean())}
        )  # fmt: skip
    return out


@torch.inference_mode()
def times(
    model: Any, processor: Any, samples: Sequence[Sample], policies: Mapping[str, Any], batch: int, repeats: int = 3
) -> dict[str, list[float]]:
    """Seconds of this process for whole answers, policies in turns: median of the repeats, per batch of questions."""
    out: dict[str, list[float]] = {name: [] for name in policies}
    for start in tqdm(range(0, len(samples), batch), desc=f"time at batch {batch}", unit="call"):
        rows = samples[start : start + batch]
        inputs = encode(processor, [row.asked for row in rows], [row.picture() for row in rows]).to(model.device)

        def once(policy: Any, inputs: Any = inputs) -> float:
            before = time.process_time()
            model.generate(**inputs, policy=policy, do_sample=False, max_new_tokens=LONGEST)
            return time.process_time() - before

        runs = {name: partial(once, policy) for name, policy in policies.items()}
        for name, seconds in in_turns(runs, repeats).items():
            out[name].append(sorted(seconds)[repeats // 2])
    return out


def ratios(found: Mapping[str, list[float]], against: str = "none") -> dict[str, list[float]]:
    """How many times faster than ``against``: of all time together, and the smallest and largest of a call."""
    out = {}
    for name, seconds in found.items():
        span = median_ratio(found[against], seconds)
        out[name] = [sum(found[against]) / sum(seconds), span.low, span.high]
    return out


@torch.inference_mode()
def gflops(model: Any, processor: Any, samples: Sequence[Sample], policy: Any, batch: int = 8) -> float:
    """Of the decoder, mean a question, tries counted."""
    spent = 0
    for start in range(0, len(samples), batch):
        rows = samples[start : start + batch]
        inputs = encode(processor, [row.asked for row in rows], [row.picture() for row in rows]).to(model.device)
        model.generate(**inputs, policy=policy, do_sample=False, max_new_tokens=LONGEST)
        spent += vtr.report(model).flops
    return spent / len(samples) / 1e9


# -- one model ---------------------------------------------------------------------------------------------------------
def measure(
    name: str, counts: Mapping[str, int], timed: int, loss: float, confidence: float, draws: int, seed: int,
    answers: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """All figures of one model."""
    model, processor = load(FAMILIES.get(name, name), "cpu")
    vtr.patch(model)
    samples = {part: questions(part, count, seed) for part, count in counts.items()}
    names = auto.default_choices(model, processor, samples["val"][0])
    found = {
        part: asked(model, processor, rows, names, answers and answers / f"{name}-{part}.npz", f"{name}, {part}")
        for part, rows in samples.items()
    }
    choices = [(one, None if one == "none" else vtr.policy(one)) for one in names]
    costs = auto.measure(model, processor, samples["val"][:6], choices, max_new_tokens=LONGEST)
    made = auto.tune(found["val"], costs, loss=loss, confidence=confidence, binary=True, seed=seed)
    policies: dict[str, Any] = {one: policy for one, policy in choices if one != "none"} | {"none": None}
    cheapest = made.names[0]
    policies |= {"auto": made, "accepted at once": vtr.AutoPolicy([cheapest, "none"], 0.0)}
    if name == "pocket":
        policies["autoscale"] = vtr.pocket.autoscale("cascade")
    spans = {size: times(model, processor, samples["test"][: timed * size], policies, size) for size in (1, 8)}
    lines = []
    for step, one in enumerate(names):
        every = np.full(len(found["test"]), step)
        lines.append({"name": one, **figures(found["test"], every, found["test"].tokens[:, step])})
    outcomes = {part: on(made, found[part], costs) for part in counts}
    parts = {part: figures(found[part], one.chosen, one.tokens) for part, one in outcomes.items()}
    lines.append({"name": "auto", **parts["test"]})
    best = oracle(found["test"])
    every = np.arange(len(best))
    return {
        "model": name, "choices": names, "questions": counts, "lines": lines, "spec": made.spec,
        "thresholds": thresholds(made), "taken": made.names,
        "promise": dict(made.promise or {}), "shift": parts["shift"],
        "shift_last": float(found["shift"].score[:, -1].mean()),
        "oracle": [float(found["test"].tokens[every, best].mean()), float(found["test"].score[every, best].mean())],
        "speed": {str(size): ratios(one) for size, one in spans.items()},
        "accepted_at_once": {
            str(size): sum(one["accepted at once"]) / sum(one[cheapest])
            for size, one in spans.items()
        },
        "gflops": {
            label: gflops(model, processor, samples["test"][:48], policies[label]) for label in ("none", "auto")
        },
        "kinds": by_kind(found["test"], outcomes["test"].chosen),
        "mixed": mixed(found["test"], outcomes["test"]),
        "curve": curve(found["val"], found["test"], costs, confidence),
        "kept": vars(
            simulate(
                found["val"], costs, loss=loss, confidence=confidence, draws=draws, questions=len(samples["val"]) // 2
            )
        ) if draws else None,
        "costs": {"taken": list(costs.taken), "tried": list(costs.tried)},
    }  # fmt: skip


HARD = ("count", "where", "word", "letter")
"""Kinds of questions that small scales answer worst."""


def mixed(found: Asked, outcome: auto.Outcome) -> dict[str, Any]:
    """The figures where only hard kinds of questions are asked."""
    rows = np.flatnonzero(np.isin(found.kind, HARD))
    return figures(found.part(rows), outcome.chosen[rows], outcome.tokens[rows])


# -- what is shown -----------------------------------------------------------------------------------------------------
def markdown(told: Mapping[str, Any]) -> str:
    """The tables."""
    out = []
    for one in told["models"]:
        out += [f"**{one['model']}**, {one['questions']['test']} test questions", ""]
        out += [
            "| policy | accuracy | − none (points) | vision tokens, tries counted | answers faster, batch 1 | batch 8 "
            "| way to the oracle, in tokens |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in one["lines"]:
            fast = [f"{one['speed'][size][row['name']][0]:.2f}×" for size in ("1", "8")]
            way = f"{row['gap_tokens']:.0%}" if row["name"] == "auto" else ""
            out.append(
                f"| {row['name']} | {row['accuracy']:.1%} | {row['interval']} | {row['tokens']:.0f} | {fast[0]} | "
                f"{fast[1]} | {way} |"
            )
        tokens, accuracy = one["oracle"]
        out += [f"| oracle (knows the answers) | {accuracy:.1%} | | {tokens:.0f} | | | 100% |", ""]
        shift, mine = one["shift"], next(row for row in one["lines"] if row["name"] == "auto")
        out += [
            f"Promised: {auto.words(one['promise'])}. Chosen: {', '.join(one['taken'])}. Other fonts and tints "
            f"({one['questions']['shift']} questions): {shift['accuracy']:.1%} ({shift['interval']} points) with "
            f"{shift['tokens']:.0f} tokens, {shift['gap_tokens']:.0%} of the way. Hard kinds ({', '.join(HARD)}): "
            f"{one['mixed']['difference'] * 100:+.1f} points, {one['mixed']['gap_tokens']:.0%} of the way. Of the gap "
            f"in accuracy at as many tokens: {mine['gap_accuracy']:.0%}. Decoder: {one['gflops']['auto']:.2f} of "
            f"{one['gflops']['none']:.2f} GFLOPs (48 questions).{older(one)} A try that "
            f"is accepted costs {one['accepted_at_once']['1']:.2f} of its policy's own answer (batch 8: "
            f"{one['accepted_at_once']['8']:.2f}).",
            "",
            f"| kind | questions | {' | '.join(f'got {c}' for c in one['choices'])} | accuracy | none's |",
            f"|---|--:|{'--:|' * (len(one['choices']) + 2)}",
        ]
        for kind, row in one["kinds"].items():
            got = " | ".join(f"{share:.0%}" for share in row["got"])
            out.append(f"| {kind} | {row['questions']} | {got} | {row['accuracy']:.1%} | {row['last']:.1%} |")
        if one["kept"]:
            out += ["", HEAD, line(Kept(**one["kept"]))]
        out.append("")
    return "\n".join(out)


def older(one: Mapping[str, Any]) -> str:
    """How much faster `autoscale` answers, where it was timed beside."""
    if "autoscale" not in one["speed"]["1"]:
        return ""
    fast = [one["speed"][size]["autoscale"][0] for size in ("1", "8")]
    return f" `autoscale` in the same turns: {fast[0]:.2f}×, {fast[1]:.2f}×."


def plot(told: Mapping[str, Any]) -> Any:
    """Accuracy against tokens; what each promise costs; which questions went where."""
    from matplotlib.ticker import NullFormatter
    from vtr.eval.report.plots import figure

    made, panels = figure(3, len(told["models"]), width=3.9, height=3.0)
    for row, one in enumerate(told["models"]):
        where, promised, kinds = panels[3 * row : 3 * row + 3]
        fixed = [(line["tokens"], 100 * line["accuracy"]) for line in one["lines"] if line["name"] != "auto"]
        mine = next(line for line in one["lines"] if line["name"] == "auto")
        where.plot(*zip(*fixed[-3:], strict=True), "o-", color="k", label="one choice for all")
        where.plot([c["tokens"] for c in one["curve"]], [100 * c["accuracy"] for c in one["curve"]], ".-", color="C0")
        where.plot(mine["tokens"], 100 * mine["accuracy"], "D", color="C0", label="auto")
        where.plot(one["oracle"][0], 100 * one["oracle"][1], "*", ms=12, color="C3", label="oracle")
        where.set(xscale="log", xlabel="vision tokens, tries counted", ylabel="accuracy (%)", title=one["model"])
        where.xaxis.set_minor_formatter(NullFormatter())
        where.legend(fontsize=7)
        x = [100 * c["promised"] for c in one["curve"]]
        promised.plot(
            x, [100 * c["cost"] for c in one["curve"]], "s-", color="C0", label="time of an answer, % of none"
        )
        promised.set(xscale="log", xlabel="loss promised at most (points)", ylim=(0, 105), title="what a promise costs")
        promised.set_xticks(x, [f"{one:g}" for one in x], fontsize=7)
        promised.minorticks_off()
        lost = promised.twinx()
        lost.plot(x, [100 * c["loss"] for c in one["curve"]], "^--", color="C1", ms=4)
        lost.plot(x, x, ":", color="C1", lw=0.8)
        lost.set_ylabel("loss on test questions (points)", color="C1", fontsize=8)
        promised.legend(fontsize=7)
        names, left = list(one["kinds"]), np.zeros(len(one["kinds"]))
        for step, choice in enumerate(one["choices"]):
            shares = np.array([100 * one["kinds"][kind]["got"][step] for kind in names])
            kinds.barh(names, shares, left=left, label=choice.replace("tokens=", ""), color=f"C{step}")
            left += shares
        kinds.set(xlabel="% of questions", title="which went where")
        kinds.legend(fontsize=6, loc="lower left")
    return made


def main(
    out: Annotated[Path | None, typer.Option(help="write auto.json, .md and .png into this folder")] = None,
    models: Annotated[str, typer.Option(help="which, joined by commas; `pretrained` where it is built")] = MODELS,
    tuned: Annotated[int, typer.Option(min=1, help="validation questions to tune on")] = 1200,
    tested: Annotated[int, typer.Option(min=1, help="test questions")] = 2000,
    shifted: Annotated[int, typer.Option(min=1, help="questions about pictures of other fonts and tints")] = 400,
    timed: Annotated[int, typer.Option(min=1, help="calls that are timed, at batch 1 and 8")] = 12,
    loss: Annotated[float, typer.Option(help="what is promised")] = 0.01,
    confidence: Annotated[float, typer.Option(help="with which confidence")] = 0.95,
    draws: Annotated[int, typer.Option(min=0, help="of the simulation of the promise")] = 200,
    seed: Annotated[int, typer.Option(help="which questions")] = 0,
    answers: Annotated[
        Path | None, typer.Option(help="keep what was said in this folder, or measure on it again")
    ] = None,
) -> None:
    """Tune and measure auto on the pocket models; what --out holds of other models stays."""
    counts = {"val": tuned, "test": tested, "shift": shifted}
    found = [measure(one.strip(), counts, timed, loss, confidence, draws, seed, answers) for one in models.split(",")]
    about = {"command": results.command(), "hardware": results.hardware(), "versions": results.versions(), "seed": seed}
    found = [{**one, **about} for one in found]
    before = json.loads((out / "auto.json").read_text())["models"] if out and (out / "auto.json").is_file() else []
    new = {one["model"] for one in found}
    told = {"kind": "auto", "models": [one for one in before if one["model"] not in new] + found}
    print(markdown({"models": found}))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "auto.json").write_text(json.dumps(told) + "\n")
        (out / "auto.md").write_text(markdown(told))
        plot(told).savefig(out / "auto.png", dpi=60)


if __name__ == "__main__":
    typer.run(main)
