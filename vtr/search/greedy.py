"""G-Search (Zhao et al., CVPR 2025, arXiv 2412.00556): one keep per layer, from shallow to deep, each fixed once found.

From the paper: the ranking by the layer before, the order, r_l <= r_(l-1), the first two layers whole, Bayesian
optimisation of each keep with an objective that weighs performance against cost. Ours, since it is not public: the
form of that objective, its weight, the measure of performance and the calibration data. Layers behind the one being
searched use its keep: dropped tokens do not come back, so "uncut" is the same. Bisection under a tolerance is ours too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from vtr.base import Scores
from vtr.search.found import Found
from vtr.search.prefix import Reuse
from vtr.search.rounds import Search
from vtr.search.suggest import Suggestions

LEVELS = tuple(round(2 ** (-step / 4), 4) for step in range(29))
"""What bisection chooses from: 1, 0.84, 0.71, … 1/128, each 2^(-1/4) of the one before."""


def gsearch(
    model: Any, processor: Any, data: Any, *, tolerance: float = 0.01, objective: str = "kl",
    method: Literal["bisect", "bayes"] = "bisect", start: int = 2, queries: Scores = "text",
    levels: Sequence[float] = LEVELS, weight: float | None = None, trials: int = 8, width: int = 4,
    batch_size: int = 32, max_new_tokens: int = 16, seed: int = 0, state: str | Path | None = None,
    reuse: Reuse = "batched", check_ranks: bool = True, progress: bool = True,
) -> Found:  # fmt: skip
    """The cheapest schedule that loses at most ``tolerance`` on the calibration questions (the paper's Scenario I).

    Args:
        model: patched. data: calibration questions, see :func:`vtr.search.examples` (:func:`vtr.search.split` keeps
            others to measure on), or a :class:`vtr.search.Prepared` that several searches share.
        tolerance: how far the mean score may fall below the unreduced model's.
        objective: "kl" (from the unreduced model, nats a token) and "agreement" need no answers; "accuracy",
            "likelihood" score the data's (see :data:`vtr.search.OBJECTIVES`).
        method: "bisect" finds in each layer the smallest level that stays within the tolerance; "bayes" maximises
            score - weight · FLOPs ratio by Bayesian optimisation, as the paper does.
        start: the first layer that may cut (0-based; the paper's is 2). queries: the ranking, see :class:`vtr.GSearch`.
        levels: of "bisect": what a keep may be. weight: of "bayes"; None is the tolerance, which then bounds the loss:
            each layer gives up at most weight · what it saves, so all of them at most weight · (1 - FLOPs ratio).
        trials: of "bayes", candidates a layer at most. width: candidates scored in one round (rows of the same batch).
        batch_size: rows a call. state: a file to go on from after an interruption; the result is the same, bit for bit.
            With more ``trials`` a search that is over goes on: what was scored is looked up.
        reuse: "batched", or for comparison "prefix" or "naive" (see :class:`vtr.search.prefix.Scorer`).
        check_ranks: measure the paper's assumption first, and warn where it fails.

    Returns:
        A :class:`~vtr.Schedule` with a ``record`` of the search.

    Raises:
        ValueError, TypeError: settings or data that cannot work; a state file that is damaged or of another search.
        UnsupportedError: what a reduced call of this model would raise.
    """
    _check(tolerance, method, trials, width, weight)
    ladder = _ladder(levels)
    settings = {
        "tolerance": tolerance, "method": method, "width": width, "levels": ladder if method == "bisect" else None,
        "weight": weight,
    }  # fmt: skip
    with Search(
        model, processor, data, method=f"gsearch-{method}", objective=objective, start=start, queries=queries,
        batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed, state=state, reuse=reuse, progress=progress,
        settings=settings, trials=trials if method == "bayes" else None,
    ) as search:  # fmt: skip
        ranks = search.ranks() if check_ranks and search.depth > 2 else None
        keeps, score = [1.0] * start, search.scorer.base_mean
        for layer in range(start, search.depth):
            if method == "bisect":
                keep, score = _bisect(search, keeps, score, ladder, search.scorer.base_mean - tolerance, width)
            else:
                how = tolerance if weight is None else weight
                keep, score = _bayes(search, keeps, score, ladder[0], how, trials, width)
            keeps.append(keep)
            search.say(layer=layer, keep=keep, score=score)
        return search.found(keeps, score, ranks, tolerance=tolerance, weight=weight)


def _bisect(
    search: Search, decided: list[float], score: float, ladder: list[float], floor: float, width: int
) -> tuple[float, float]:
    """The smallest level at this layer whose score is not below the floor, if scores fall with the level."""
    last = decided[-1]
    below = [level for level in ladder if level < last]
    low, high, best = -1, len(below), (last, score)  # below[low] fails, below[high] holds
    while high - low > 1:
        between = high - low - 1
        picks = sorted({low + 1 + (between - 1) * (2 * i + 1) // (2 * min(width, between)) for i in range(width)})
        picks = [i for i in picks if i < high]
        scores = search.means(decided, [_held(search, decided, below[i]) for i in picks], floor)
        holds = [(i, s) for i, s in zip(picks, scores, strict=True) if s is not None and s >= floor]
        if holds:
            high, best = holds[0][0], (below[holds[0][0]], holds[0][1])
        low = max([i for i in picks if i < high], default=low)
    return best


def _bayes(
    search: Search, decided: list[float], score: float, least: float, weight: float, trials: int, width: int
) -> tuple[float, float]:
    """The keep at this layer with the largest score - weight · FLOPs ratio among those tried, and the last layer's."""
    last = decided[-1]
    found = {last: score}
    if last <= least * 1.02:
        return last, score

    def value(keep: float) -> float:
        return found[keep] - weight * search.cost.ratio(_held(search, decided, keep), "flops")

    asked = Suggestions({"keep": (least, last)}, search.seed + len(decided))
    asked.tell({"keep": last}, value(last))
    first = [least + (last - least) * (i + 0.5) / width for i in range(width)]
    for done in range(0, trials, width):
        raw = [{"keep": keep} for keep in first] if not done else asked.ask(min(width, trials - done))
        points = sorted({round(point["keep"], 3) for point in raw} - set(found))
        if not points:  # the optimiser only repeats itself
            break
        scores = search.means(decided, [_held(search, decided, keep) for keep in points])
        for keep, one in zip(points, scores, strict=True):
            assert one is not None  # nothing is dropped without a floor
            found[keep] = one
            asked.tell({"keep": keep}, value(keep))
    best = max(found, key=lambda keep: (value(keep), -keep))
    return best, found[best]


def _held(search: Search, decided: list[float], keep: float) -> list[float]:
    """The layers decided so far, and the rest at this keep."""
    return [*decided, *[keep] * (search.depth - len(decided))]


def _ladder(levels: Sequence[float]) -> list[float]:
    known = sorted(set(levels))
    if not known or any(isinstance(x, bool) or not isinstance(x, float) or not 0 < x <= 1 for x in known):
        raise ValueError(f"levels={levels!r}: give ratios (floats) in (0, 1]")
    return known


def _check(tolerance: float, method: str, trials: int, width: int, weight: float | None) -> None:
    if method not in ("bisect", "bayes"):
        raise ValueError(f"method={method!r}: choose 'bisect' or 'bayes'")
    if not tolerance >= 0 or (weight is not None and not weight >= 0):
        raise ValueError(f"tolerance={tolerance!r}, weight={weight!r}: neither can be negative")
    if trials < 1 or width < 1:
        raise ValueError(f"trials={trials}, width={width}: both must be at least 1")
