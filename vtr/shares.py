"""A mean budget (the share of vision tokens that enters a layer, in the mean over layers) as cuts; a total divided."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST = 0.02
"""A cut that would have to leave less than this to reach a mean budget is made in an earlier layer."""
STAGE = 1 / 3
"""Stages that would have to keep less than this share of the one before begin earlier."""
NEAR = 0.6
"""A policy that can only take steps must come as near to a budget as this factor."""


def check_share(share: float) -> None:
    """Raise ValueError unless a mean budget lies between 0 and 1."""
    if not 0 < share < 1:
        raise ValueError(f"budget={share!r} is the mean share of tokens that stays: choose one between 0 and 1")


def ratio(exact: float) -> float:
    """A ratio in four digits, never rounded to nothing."""
    return max(round(exact, 4), 0.0001)


def one_cut(share: float, num_hidden_layers: int, layers: Sequence[int]) -> tuple[float, int]:
    """(keep, layer) of a cut whose mean is ``share``, in the first of ``layers`` that can have it; of several, by
    leaving at least ``LEAST``.

    Raises:
        ValueError: none of them can: too many tokens enter the layers before.
    """
    least = LEAST if len(layers) > 1 else 0.0001
    for layer in layers:
        keep = (share * num_hidden_layers - layer) / max(num_hidden_layers - layer, 1)
        if layer < num_hidden_layers and keep >= least:
            return ratio(keep), layer
    raise ValueError(f"a cut in layer {layers[-1]} of {num_hidden_layers} keeps the mean above {share:.3g}")


def equal_steps(spans: Sequence[int], mean: float) -> float:
    """Each span of layers keeps the same share of the one before, the first all: the share whose mean is ``mean``."""
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        found = sum(span * share**step for step, span in enumerate(spans)) / sum(spans)
        low, high = (share, high) if found < mean else (low, share)
    return low


def nearest_side(share: float, side: int) -> int:
    """The side of the square with a share of ``side`` × ``side`` tokens nearest to this one, at least 1."""
    exact = side * math.sqrt(share)
    return max(min((math.floor(exact), math.ceil(exact)), key=lambda s: abs((s / side) ** 2 - share)), 1)


def divided(count: int, sizes: Sequence[int], here: Sequence[int]) -> list[int]:
    """``count`` tokens among images of ``sizes`` tokens, of which ``here`` are left: in proportion, at least one each.

    Rounded by :func:`apportion`. Fewer tokens than images go to the larger ones; ``count`` at most ``sum(here)``.
    """
    there = [i for i, n in enumerate(here) if n]
    if count < len(there):
        first = sorted(there, key=lambda i: (-sizes[i], i))[:count]
        return [int(i in first) for i in range(len(here))]
    exact = apportion([float(n) for n in sizes], list(here), count)
    for i in there:
        if not exact[i]:
            exact[max(there, key=lambda j: exact[j])] -= 1
            exact[i] = 1
    return exact


def apportion(shares: list[float], capacities: list[int], total: int) -> list[int]:
    """Whole counts that add up to ``total``, as near to ``shares`` (scaled to that sum) as whole numbers come.

    No count exceeds its capacity; what a full crop cannot take, the others share. Largest remainders are rounded up
    first, the earlier crop among equal ones. ``total`` must not exceed the capacities' sum.
    """
    counts, scale = [0] * len(shares), 0.0
    unfilled = [j for j, n in enumerate(capacities) if n]
    while unfilled:
        scale = (total - sum(counts)) / sum(shares[j] for j in unfilled)
        full = [j for j in unfilled if shares[j] * scale >= capacities[j]]
        if not full:
            break
        for j in full:
            counts[j] = capacities[j]
        unfilled = [j for j in unfilled if j not in full]
    for j in unfilled:
        counts[j] = math.floor(shares[j] * scale)
    by_rest = sorted(unfilled, key=lambda j: (counts[j] - shares[j] * scale, j))
    for j in by_rest[: total - sum(counts)]:
        counts[j] += 1
    return counts
