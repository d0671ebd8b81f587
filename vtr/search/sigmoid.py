"""P-Sigmoid (Zhao et al., CVPR 2025, arXiv 2412.00556): a sigmoid over layers for a budget, by Bayesian optimisation.

From the paper: the shape, Bayesian optimisation of the steepness, a budget of tokens. The exact formula is not public.
Ours: steepness and middle are searched, the amplitude is what makes the schedule cost the budget (every point the
optimiser names is projected so), the budget may be counted in FLOPs or cached tokens as well, and the first points come
from the sigmoid fitted to a G-Search curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtr.base import Scores
from vtr.keep import Keep
from vtr.schedule import presets
from vtr.search.cost import Measure, check_measure
from vtr.search.curve import Sigmoid, fit, project
from vtr.search.found import Found
from vtr.search.prefix import Reuse
from vtr.search.rounds import Search
from vtr.search.suggest import Suggestions

BOUNDS = {"steepness": (math.log(1.0), math.log(80.0)), "middle": (-0.2, 1.0)}
"""Log of the steepness times the depth; the middle as a share of the depth."""
CURVE = "llava-1.5-7b"
"""The published curve that gives the first point if the caller has none."""


def psigmoid(
    model: Any, processor: Any, data: Any, *, budget: float, measure: Measure = "keep", objective: str = "kl",
    curve: Sequence[Keep] | None = None, start: int = 2, queries: Scores = "text", trials: int = 24, width: int = 4,
    batch_size: int = 32, max_new_tokens: int = 16, seed: int = 0, state: str | Path | None = None,
    reuse: Reuse = "batched", check_ranks: bool = True, progress: bool = True,
) -> Found:  # fmt: skip
    """The best sigmoid schedule for a budget (the paper's Scenario II).

    Args:
        budget: what may be spent, as a ratio to no reduction: of ``measure`` "keep" (mean share of vision tokens that
            enters a layer), "flops" (decoder prefill) or "kv" (cached tokens).
        curve: a schedule found by :func:`gsearch`, whose fitted sigmoid is tried first; None: that of
            LLaVA-1.5-7B, read off the paper's figure, stretched to this depth.
        trials: schedules tried in all; with the ``state`` of a search that is over, more of them go on with it.
            width: of them in a round, as rows of the same batch.
        model, data, objective, start, queries, batch_size, state, reuse, check_ranks: as for :func:`gsearch`.

    Returns:
        A :class:`~vtr.Schedule` with a ``record`` of the search; ``record["sigmoid"]`` is its shape.

    Raises:
        ValueError, TypeError: settings or data that cannot work; a budget out of reach; a state file that is damaged or
            of another search.
    """
    check_measure(measure)
    if isinstance(budget, bool) or not isinstance(budget, float) or not 0 < budget <= 1:
        raise ValueError(f"budget={budget!r} is a ratio to no reduction: a float in (0, 1]")
    if trials < 1 or width < 1:
        raise ValueError(f"trials={trials}, width={width}: both must be at least 1")
    first = fit(curve, start) if curve is not None else None
    settings = {
        "budget": budget, "measure": measure, "width": width,
        "curve": None if curve is None else list(curve),
    }  # fmt: skip
    with Search(
        model, processor, data, method="psigmoid", objective=objective, start=start, queries=queries,
        batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed, state=state, reuse=reuse, progress=progress,
        settings=settings, trials=trials,
    ) as search:  # fmt: skip
        space = _Space(search, budget, measure)
        space.at(math.log(8.0), 0.5)  # raises if the budget is out of reach, before anything is scored
        ranks = search.ranks() if check_ranks and search.depth > 2 else None
        asked = Suggestions(BOUNDS, seed)
        queue = [space.point(first)] if first is not None else [_published(search.depth)]
        queue += [{"steepness": math.log(k), "middle": m} for k, m in ((5.0, 0.3), (12.0, 0.5), (30.0, 0.3))]
        best: tuple[float, Sigmoid] | None = None
        for done in range(0, trials, width):
            count = min(width, trials - done)
            points = [queue.pop(0) for _ in range(min(count, len(queue)))]
            points += asked.ask(count - len(points))
            shapes = [space.at(point["steepness"], point["middle"]) for point in points]
            whole = [1.0] * start
            scores = search.means(whole, [shape.keeps(search.depth, start) for shape in shapes])
            for point, shape, score in zip(points, shapes, scores, strict=True):
                assert score is not None  # nothing is dropped without a floor
                asked.tell(point, score)
                best = max((best, (score, shape)), key=lambda one: one[0]) if best is not None else (score, shape)
            assert best is not None
            search.say(trial=done + count, best=best[0])
        assert best is not None
        score, shape = best
        told = {"amplitude": shape.amplitude, "steepness": shape.steepness, "middle": shape.middle}
        return search.found(
            shape.keeps(search.depth, start), score, ranks, budget=budget, measure=measure, sigmoid=told
        )


class _Space:
    """Between the optimiser's parameters and sigmoids on the budget."""

    def __init__(self, search: Search, budget: float, measure: Measure) -> None:
        self.search, self.budget, self.measure = search, budget, measure

    def at(self, steepness: float, middle: float) -> Sigmoid:
        depth = self.search.depth

        def cost(keeps: Sequence[float]) -> float:
            return self.search.cost.ratio(keeps, self.measure)

        return project(math.exp(steepness) / depth, middle * depth, self.budget, cost, depth, self.search.start)

    def point(self, shape: Sigmoid) -> dict[str, float]:
        """The nearest point of the space."""
        return _inside(math.log(shape.steepness * self.search.depth), shape.middle / self.search.depth)


def _inside(steepness: float, middle: float) -> dict[str, float]:
    found = {"steepness": steepness, "middle": middle}
    return {name: min(max(value, BOUNDS[name][0]), BOUNDS[name][1]) for name, value in found.items()}


def _published(depth: int) -> dict[str, float]:
    curve = presets()[CURVE].schedule
    shape = fit(curve, 2)
    return _inside(math.log(shape.steepness * len(curve)), shape.middle / len(curve))
