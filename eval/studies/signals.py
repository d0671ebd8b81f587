"""What each signal of ``auto`` says of whether a choice suffices: ``python -m vtr.eval.studies.signals``.

Of answers that ``vtr tune auto --answers`` has kept. AUC is that of the signal as it is; log losses are those of its
calibration, each question by a fit without its picture. A signal that knew nothing but how often a choice suffices
would have the log loss of the last column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from vtr.training import auto
from vtr.training.asked import Asked


@dataclass(frozen=True)
class Said:
    """What a signal says of one choice.

    Attributes:
        suffices: the share of the questions in which the choice loses nothing. auc: of the signal; NaN where all
            suffice, or none. low, high: 95 % of it, pictures drawn again. loss, base: log losses, nats.
    """

    choice: str
    signal: str
    suffices: float
    auc: float
    low: float
    high: float
    loss: float
    base: float


def said(asked: Asked, tokens: int = 1, seed: int = 0, draws: int = 1000) -> Iterator[Said]:
    """Choice by choice, of every signal that is there; the probe at the best of its strengths."""
    good = auto.suffices(asked)
    found = [*auto.fit_plain(asked, tokens, seed, None), auto.fit_estimate(asked, tokens, seed, "probe")]
    for step, choice in enumerate(asked.choices[:-1]):
        mine = good[:, step]
        share = float(mine.mean())
        base = -auto.log_likelihood(np.full(len(mine), share), mine)
        for one in found:
            p = one.held_out[:, step]
            raw = p if one.lines is None else auto.raw_of(asked, one.signal, tokens)[:, step]
            area, loss = _auc(raw, mine, asked.group, draws, seed), -auto.log_likelihood(p, mine)
            yield Said(choice, one.signal, share, *area, loss, base)


def _auc(raw: np.ndarray, good: np.ndarray, group: np.ndarray, draws: int, seed: int) -> tuple[float, float, float]:
    """Area under the ROC curve, and 95 % of it (bootstrap over pictures)."""
    from sklearn.metrics import roc_auc_score

    if good.all() or not good.any():
        return float("nan"), float("nan"), float("nan")
    rng, units = np.random.default_rng(seed), np.unique(group, return_inverse=True)[1]
    rows = [np.flatnonzero(units == unit) for unit in range(units.max() + 1)]
    again = []
    for _ in range(draws):
        at = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        if 0 < good[at].sum() < len(at):
            again.append(roc_auc_score(good[at], raw[at]))
    return (float(roc_auc_score(good, raw)), *(float(q) for q in np.quantile(again, [0.025, 0.975])))  # type: ignore[return-value]


def markdown(found: Iterator[Said]) -> str:
    """The table."""
    out = ["| choice | suffices | signal | AUC | log loss | knowing the share alone |", "|---|--:|---|--:|--:|--:|"]
    for one in found:
        area = f"{one.auc:.3f} [{one.low:.3f}, {one.high:.3f}]"
        out.append(f"| {one.choice} | {one.suffices:.1%} | {one.signal} | {area} | {one.loss:.3f} | {one.base:.3f} |")
    return "\n".join(out)


def main(
    answers: Annotated[Path, typer.Option(help="what `vtr tune auto --answers` has written")],
    tokens: Annotated[int, typer.Option(min=1, help="of the answer that are heard")] = 1,
    seed: Annotated[int, typer.Option(help="which questions are held out together")] = 0,
) -> None:
    """Say how much each signal knows of whether a choice suffices."""
    print(markdown(said(Asked.load(answers), tokens, seed)))


if __name__ == "__main__":
    typer.run(main)
