"""Paired statistics: two policies answer the same questions, so their differences are taken question by question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

EXACT_BELOW = 25
"""With fewer questions than that on which two policies differ, McNemar's test is taken from the binomial itself."""


@dataclass(frozen=True)
class Paired:
    """Mean difference a − b with a 95 % bootstrap interval; wins and losses of a over b."""

    difference: float
    low: float
    high: float
    wins: int
    losses: int

    def figures(self) -> dict[str, Any]:
        """As result files have it, with McNemar's p."""
        return {
            "difference": self.difference, "low": self.low, "high": self.high,
            "p_mcnemar": mcnemar(self.wins, self.losses), "wins": self.wins, "losses": self.losses,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def paired(
    a: Sequence[float], b: Sequence[float], groups: Sequence[int] | None = None, draws: int = 4000, seed: int = 0
) -> Paired:
    """Compare scores of the same questions.

    Args:
        groups: the picture each question belongs to; whole pictures are drawn, since their questions go together.

    Raises:
        ValueError: not the same number of questions, or none.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired scores need the same questions on both sides, got {len(a)} and {len(b)}")
    diff = np.asarray(a, float) - np.asarray(b, float)
    low, high = interval(diff, groups, draws, seed)
    return Paired(float(diff.mean()), low, high, int((diff > 0).sum()), int((diff < 0).sum()))


def interval(
    scores: Sequence[float] | np.ndarray, groups: Sequence[int] | None = None, draws: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean; ``groups`` as in :func:`paired`."""
    values = np.asarray(scores, float)
    _, group = np.unique(np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    pick = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[pick].sum(1) / counts[pick].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided p of McNemar's test: how likely so uneven wins and losses are if neither policy is better.

    Exact (binomial) below 25 differing questions, else chi-square with Edwards' continuity correction. For graded
    scores, with wins and losses as :func:`paired` counts them, it is a sign test. Questions count as independent of
    each other, also those about one picture: the interval of :func:`paired` is the careful figure there.
    """
    from scipy import stats

    differ = wins + losses
    if not differ:
        return 1.0
    if differ < EXACT_BELOW:
        return float(stats.binomtest(wins, differ, 0.5).pvalue)
    return float(stats.chi2.sf((abs(wins - losses) - 1) ** 2 / differ, 1))


def outcomes(a: Sequence[float], b: Sequence[float], names: Sequence[T]) -> tuple[list[T], list[T]]:
    """The questions (by name) that a wins over b, and those it loses."""
    rows = list(zip(names, a, b, strict=True))
    return [name for name, x, y in rows if x > y], [name for name, x, y in rows if x < y]
