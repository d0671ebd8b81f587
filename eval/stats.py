"""Paired statistics: two policies answer the same questions, so their differences are taken question by question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Paired:
    """Mean difference a − b with a 95 % bootstrap interval; wins and losses of a over b."""

    difference: float
    low: float
    high: float
    wins: int
    losses: int

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
    _, group = np.unique(np.arange(len(diff)) if groups is None else np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(group, diff), np.bincount(group)
    pick = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[pick].sum(1) / counts[pick].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Paired(float(diff.mean()), float(low), float(high), int((diff > 0).sum()), int((diff < 0).sum()))
