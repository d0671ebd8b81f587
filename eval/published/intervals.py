"""95 % intervals of what lmms-eval says, from its samples, and the word for where the paper's number lies.

A column says how its interval comes about:

* ``mean``, ``f1``, ``pairs`` (MME: two questions about a picture count together, kinds of questions add up): bootstrap
  over questions (pairs), drawn within each kind. It is made only where these samples give the very number that
  lmms-eval printed. Where a mean is of right and wrong alone, Wilson's interval instead.
* ``circular`` (MMBench: a question counts if it is right in every order of its choices): Wilson's, n the number of
  questions.
* ``stderr``: lmms-eval's standard error, ± 1.96 of it.
* ``none``: none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS, AT_ONCE, Z = 2000, 50, 1.96
NEAR = 1e-6


@dataclass(frozen=True)
class Units:
    """What is drawn: parts of a score, of questions or of pairs.

    parts: float64 [units, k], of which sums make the score. keys: what each unit is, the same for every policy.
    kinds: int [units]: draws stay within a kind.
    """

    kind: str
    parts: np.ndarray
    keys: tuple[Any, ...]
    kinds: np.ndarray

    def score(self, sums: np.ndarray) -> np.ndarray:
        """[…, k] sums → […] scores."""
        if self.kind == "f1":
            return 2 * sums[..., 0] / np.maximum(2 * sums[..., 0] + sums[..., 1] + sums[..., 2], 1e-12)
        half = sums.shape[-1] // 2
        return (sums[..., :half] / np.maximum(sums[..., half:], 1e-12)).sum(-1)

    def drawn(self, seed: int) -> np.ndarray:
        """[DRAWS] scores; the same draws for units of the same keys and kinds."""
        rng = np.random.default_rng(seed)
        groups = [np.flatnonzero(self.kinds == kind) for kind in np.unique(self.kinds)]
        out = []
        for _ in range(DRAWS // AT_ONCE):
            sums = sum(self.parts[g[rng.integers(0, len(g), (AT_ONCE, len(g)))]].sum(1) for g in groups)
            out.append(self.score(np.asarray(sums)))
        return np.concatenate(out)


def units_of(kind: str, metrics: Sequence[str], samples: Sequence[dict[str, Any]]) -> Units | None:
    """The units of a task's logged samples; None where a kind has none, or the samples lack the metrics.

    samples: ``{"doc_id": …, metric: …}``, as lmms-eval logs them.
    """
    try:
        if kind == "mean" and len(metrics) == 1:
            ordered = sorted(samples, key=lambda one: one["doc_id"])
            parts = [[float(one[metrics[0]]), 1.0] for one in ordered]
            return Units(kind, np.array(parts), tuple(one["doc_id"] for one in ordered), np.zeros(len(parts), int))
        if kind == "f1":
            return f1_units(metrics[0], samples)
        if kind == "pairs":
            return pair_units(metrics, samples)
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return None


def f1_units(metric: str, samples: Sequence[dict[str, Any]]) -> Units:
    ordered = sorted(samples, key=lambda one: one["doc_id"])
    said = [(one[metric]["prediction"], one[metric]["ground_truth"]) for one in ordered]
    parts = [[p == g == "yes", p == "yes" and g == "no", p == "no" and g == "yes"] for p, g in said]
    return Units("f1", np.array(parts, float), tuple(one["doc_id"] for one in ordered), np.zeros(len(parts), int))


def pair_units(metrics: Sequence[str], samples: Sequence[dict[str, Any]]) -> Units:
    """A picture's questions: their accuracy and whether all are right, 100 each.

    Raises:
        KeyError: no sample has the metrics.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        for one in (sample[m] for m in metrics if isinstance(sample.get(m), dict)):
            found.setdefault((one["category"], str(one["question_id"])), []).append(float(one["score"]))
    if not found:
        raise KeyError(metrics[0])
    keys = sorted(found)
    names = sorted({category for category, _ in keys})
    parts = np.zeros((len(keys), 2 * len(names)))
    for at, key in enumerate(keys):
        which, scores = names.index(key[0]), found[key]
        parts[at, which] = 100 * sum(scores) / len(scores) + 100 * (sum(scores) == len(scores))
        parts[at, len(names) + which] = 1
    return Units("pairs", parts, tuple(keys), np.array([names.index(category) for category, _ in keys]))


@dataclass(frozen=True)
class Measured:
    """A column of a row as it came out here, on the paper's scale. interval: (low, high), or None and ``why``."""

    value: float
    interval: tuple[float, float] | None
    why: str = ""
    draws: np.ndarray | None = None
    keys: tuple[Any, ...] = ()


def measured(
    kind: str, metrics: Sequence[str], scale: float, results: dict[str, Any], samples: Sequence[dict[str, Any]]
) -> Measured:
    """What lmms-eval says of a task → the column's value and its interval.

    Args:
        results: of the task, by metric: ``{"exact_match": 0.6, "exact_match_stderr": 0.01}``.

    Raises:
        ValueError: a metric is missing.
    """
    if missing := [m for m in metrics if not isinstance(results.get(m), (int, float))]:
        raise ValueError(f"lmms-eval gives no {', '.join(missing)}: there is {', '.join(results) or 'nothing'}")
    value = scale * sum(float(results[m]) for m in metrics)
    if kind == "circular":
        return Measured(value, *of_circular(value, samples, metrics[0]))
    if kind == "stderr":
        error = results.get(f"{metrics[0]}_stderr")
        if len(metrics) > 1 or not isinstance(error, (int, float)):
            return Measured(value, None, "lmms-eval gives no standard error")
        half = Z * scale * float(error)
        return Measured(value, (value - half, value + half))
    if kind == "none":
        return Measured(value, None, "no interval is defined for this score")
    units = units_of(kind, metrics, samples)
    if units is None:
        return Measured(value, None, "the logged samples do not hold what this score is made of")
    again = scale * float(units.score(units.parts.sum(0)))
    if abs(again - value) > NEAR * max(1.0, abs(value)):
        return Measured(value, None, f"the logged samples give {again:g}, not {value:g}")
    draws = scale * units.drawn(seed=0)
    if kind == "mean" and set(np.unique(units.parts[:, 0])) <= {0.0, 1.0}:
        low, high = (scale * bound for bound in wilson(value / scale, len(units.keys)))
    else:
        low, high = np.quantile(draws, [0.025, 0.975])
    return Measured(value, (float(low), float(high)), "", draws, units.keys)


def of_circular(value: float, samples: Sequence[dict[str, Any]], metric: str) -> tuple[tuple[float, float] | None, str]:
    """The interval of a percentage of MMBench's questions; (None, why) where they cannot be counted."""
    try:
        n = len({int(one[metric]["index"]) % 10**6 for one in samples})
    except (KeyError, TypeError, ValueError):
        return None, "the logged samples do not say which question an order of choices belongs to"
    if not n or not 0 <= value <= 100:
        return None, "there are no logged samples, or the score is no percentage"
    low, high = wilson(value / 100, n)
    return (100 * low, 100 * high), ""


def wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share p of n."""
    middle = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return (middle - half) / (1 + Z * Z / n), (middle + half) / (1 + Z * Z / n)


def share(ours: Measured, whole: Measured) -> Measured:
    """Percent of the unreduced row, with a paired interval where both were drawn from the same units."""
    if whole.value == 0:
        return Measured(float("nan"), None, "the unreduced score is 0")
    value = 100 * ours.value / whole.value
    if ours.draws is None or whole.draws is None or ours.keys != whole.keys or (whole.draws <= 0).any():
        return Measured(value, None, "no paired samples")
    low, high = np.quantile(100 * ours.draws / whole.draws, [0.025, 0.975])
    return Measured(value, (float(low), float(high)))


def verdict(ours: Measured, paper: float, rounding: float) -> str:
    """ "agrees" where the paper's number, give or take its ``rounding``, lies in our interval; else where ours is."""
    if ours.interval is None:
        return "no interval"
    low, high = ours.interval
    if low - rounding - 1e-9 <= paper <= high + rounding + 1e-9:
        return "agrees"
    return "above" if ours.value > paper else "below"


def half_digit(number: float) -> float:
    """Half of a printed number's last digit: 61.9 → 0.05, 1783 → 0.5."""
    text = repr(number)
    return 0.5 * 10.0 ** -(len(text.partition(".")[2]) if "." in text else 0)
