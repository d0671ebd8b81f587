"""Is what ``vtr tune auto`` promises kept? ``python -m vtr.eval.studies.promise --answers FILE.npz``.

The questions of a file of answers (``vtr tune auto --answers``) stand for all there are. From them as many as a user
might have are drawn, again and again; each draw is tuned anew, from fitting the estimate to testing the thresholds, and
the policy's true loss is that on all questions. Draws whose true loss is above what was promised break the promise.
Whether they are too many is said by an exact binomial test: of 200 draws at 95 % ten are expected to be allowed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

import vtr
from vtr.training import auto
from vtr.training.asked import Asked


@dataclass(frozen=True)
class Kept:
    """What draws came to.

    Attributes:
        draws, questions: how many, and of so many each. broken: how many lose more than promised.
        p: of an exact one-sided binomial test that no more than 1 − confidence of draws do.
        nothing: draws for which no try paid, so that nothing was promised.
        loss: mean true loss. cost: mean cost against the last choice's. Of draws that were tuned.
    """

    promised: float
    confidence: float
    draws: int
    questions: int
    broken: int
    p: float
    nothing: int
    loss: float
    cost: float


def thresholds(made: vtr.AutoPolicy) -> list[float]:
    """Of every choice but the last."""
    given = made.thresholds
    return list(given) if isinstance(given, Sequence) else [given] * made.last


def on(made: vtr.AutoPolicy, asked: Asked, costs: auto.Costs) -> auto.Outcome:
    """What a tuned policy comes to on questions that were asked under all choices."""
    steps = [asked.choices.index(name) for name in made.names]
    part = asked.of(steps)
    estimates = np.stack([made.estimate(s, part.began(s)).numpy() for s in range(made.last)], 1)
    found = auto.outcome(part, estimates, thresholds(made), costs.of(steps))
    found.chosen = np.asarray(steps)[found.chosen]
    return found


def simulate(
    pool: Asked, costs: auto.Costs, *, loss: float, confidence: float, draws: int = 200, questions: int = 600,
    seed: int = 0, binary: bool = True,
) -> Kept:  # fmt: skip
    """Tune on many draws, and compare what is promised with what is true."""
    from scipy.stats import binomtest

    rng, true, spent, nothing = np.random.default_rng(seed), list[float](), list[float](), 0
    for draw in tqdm(range(draws), desc="draws", unit=""):
        mine = pool.part(rng.integers(0, len(pool), questions))
        mine.group = np.array([f"{i}" for i in range(questions)])  # each is drawn by itself
        try:
            made = auto.tune(
                mine, costs, loss=loss, confidence=confidence, binary=binary, seed=draw, signal="confidence"
            )
        except auto.NoneKeptError:
            nothing += 1
            continue
        found = on(made, pool, costs)
        true.append(float(found.loss.mean()))
        spent.append(float(found.cost.mean() / costs.taken[-1]))
    broken = sum(one > loss for one in true)
    p = float(binomtest(broken, draws, 1 - confidence, alternative="greater").pvalue)
    mean = (float(np.mean(one)) if one else float("nan") for one in (true, spent))
    return Kept(loss, confidence, draws, questions, broken, p, nothing, *mean)


def line(kept: Kept) -> str:
    """What was found, as a line of a table."""
    return (
        f"| ≤ {kept.promised:.1%} with {kept.confidence:.0%} | {kept.questions} | {kept.broken} of {kept.draws} | "
        f"{kept.p:.2f} | {kept.loss:.2%} | {kept.cost:.0%} | {kept.nothing} |"
    )


HEAD = (
    "| promised | questions | broken | binomial p | mean true loss | mean cost | nothing promised |\n"
    "|---|--:|--:|--:|--:|--:|--:|"
)


def main(
    answers: Annotated[Path, typer.Option(help="what `vtr tune auto --answers` has written")],
    loss: Annotated[float, typer.Option(help="what is promised")] = 0.01,
    confidence: Annotated[float, typer.Option(help="with which confidence")] = 0.95,
    draws: Annotated[int, typer.Option(min=1)] = 200,
    questions: Annotated[int, typer.Option(min=1, help="of each draw")] = 600,
    costs: Annotated[str, typer.Option(help="of each choice, one against another", show_default="tokens")] = "",
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="write promise.json into this folder")] = None,
) -> None:
    """Count how often a promise is broken."""
    pool = Asked.load(answers)
    taken = [float(one) for one in costs.split(",")] if costs else pool.tokens.mean(0).tolist()
    kept = simulate(
        pool, auto.Costs(taken, taken[:-1], "cost"), loss=loss, confidence=confidence, draws=draws, questions=questions,
        seed=seed,
    )  # fmt: skip
    print(f"{HEAD}\n{line(kept)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        told: dict[str, Any] = {"choices": pool.choices, "pool": len(pool), "seed": seed, **asdict(kept)}
        (out / "promise.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
