"""A promise about a mean loss, made on some questions and kept on others of the same kind: Learn then Test.

Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control"
(arXiv 2110.01052). Losses lie in [0, 1], those of different units (pictures) are independent and alike. Each setting
has the null hypothesis that its mean loss is above what is promised; settings are tested in an order that was fixed
without these losses, at the full level each, until the first that is not rejected (fixed-sequence testing, section
2.2 there). So all that are rejected keep the promise together, with the confidence asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


def p_value(losses: np.ndarray, most: float, binary: bool) -> float:
    """How probable so small losses are if their mean is above ``most``: super-uniform under that hypothesis.

    For losses that can only be 0 or 1 the binomial tail itself, P(Bin(n, most) ≤ sum). For others Hoeffding and
    Bentkus' (Proposition 2 of the paper): min(exp(−n · h(min(mean, most), most)), e · P(Bin(n, most) ≤ ⌈n · mean⌉)),
    h(a, b) = a log(a/b) + (1 − a) log((1 − a)/(1 − b)).

    Args:
        losses: float [n] in [0, 1]. most: in (0, 1).
    """
    from scipy.stats import binom

    n, mean = len(losses), float(np.mean(losses))
    total = round(float(np.sum(losses)), 9)
    if binary:
        return float(binom.cdf(math.floor(total), n, most))
    hoeffding = math.exp(-n * _divergence(min(mean, most), most))
    return min(1.0, hoeffding, math.e * float(binom.cdf(math.ceil(total), n, most)))


def _divergence(a: float, b: float) -> float:
    """Of a coin that falls a from one that falls b: their Kullback-Leibler divergence, nats."""
    first = 0.0 if a == 0 else a * math.log(a / b)
    return first + (0.0 if a == 1 else (1 - a) * math.log((1 - a) / (1 - b)))


def needed(most: float, confidence: float) -> int:
    """How many units without any loss are needed to promise a mean loss of ``most``: (1 − most)^n ≤ 1 − confidence."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-most) - 1e-9)


def kept_up_to(path: Iterable[np.ndarray], most: float, confidence: float, binary: bool) -> int:
    """How many settings of a path keep the promise, counted from its beginning.

    Args:
        path: losses of each setting, [n] each, in an order that was fixed without them.
    """
    kept = 0
    for losses in path:
        if p_value(losses, most, binary) > 1 - confidence:
            break
        kept += 1
    return kept


def by_unit(losses: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The mean loss of each unit: questions about one picture are one draw, not several.

    Args:
        losses: float [n, …]. units: [n], whose each is.
    """
    _, where, counts = np.unique(units, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), *losses.shape[1:]))
    np.add.at(sums, where, losses)
    return sums / counts.reshape(-1, *[1] * (losses.ndim - 1))
