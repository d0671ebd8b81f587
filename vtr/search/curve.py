"""Sigmoids over layers: fitted to a schedule, projected onto a budget, drawn.

The paper's Fig. 1c fits a scaled sigmoid to G-Search's curve, amplitude / (1 + exp(steepness · (layer - middle))). How
its budget enters that formula is not public. Ours: the amplitude is what makes the cost the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vtr.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 0.004
"""No layer of a projected sigmoid keeps less than this share."""
STEPS = 60
MOST = 1e6
"""An amplitude that keeps everything in all layers."""


@dataclass(frozen=True)
class Sigmoid:
    """Keep of 0-based decoder layer l: ``amplitude / (1 + exp(steepness (l - middle)))``, at most 1.

    Attributes:
        rmse: how far a fitted one is from its schedule.
    """

    amplitude: float
    steepness: float
    middle: float
    rmse: float = 0.0

    def at(self, layer: float) -> float:
        return min(1.0, self.amplitude / (1 + math.exp(min(self.steepness * (layer - self.middle), 700.0))))

    def keeps(self, depth: int, start: int) -> list[float]:
        """One keep per layer; layers before ``start`` keep all, none less than :data:`LEAST`; rounded down."""
        cut = [max(math.floor(self.at(layer) * 1e4) / 1e4, LEAST) for layer in range(start, depth)]
        return [1.0] * start + cut


def project(
    steepness: float, middle: float, budget: float, cost: Callable[[Sequence[float]], float], depth: int, start: int
) -> Sigmoid:
    """The sigmoid of this shape that costs the budget: the largest amplitude that does not cost more.

    Every point of the search is brought onto the budget so; none is thrown away or penalised.

    Raises:
        ValueError: a budget that no amplitude reaches.
    """

    def cost_of(amplitude: float) -> float:
        return cost(Sigmoid(amplitude, steepness, middle).keeps(depth, start))

    least = cost_of(0.0)
    if not least <= budget <= 1.0:
        raise ValueError(
            f"budget={budget}: with {start} whole layers of {depth}, schedules cost between {least:.3f} and 1"
        )
    low, high = 1e-4, MOST
    if cost_of(high) <= budget:
        return Sigmoid(high, steepness, middle)
    for _ in range(STEPS):
        middle_amplitude = math.sqrt(low * high)
        low, high = (middle_amplitude, high) if cost_of(middle_amplitude) <= budget else (low, middle_amplitude)
    return Sigmoid(low, steepness, middle)


def fit(schedule: Sequence[Any], start: int = 2) -> Sigmoid:
    """The scaled sigmoid nearest to a schedule of ratios from layer ``start`` on (least squares).

    Raises:
        ValueError: counts among the keeps, or less than three layers to fit.
    """
    from scipy.optimize import least_squares

    keeps = np.asarray(schedule[start:], float)
    if any(isinstance(keep, int) for keep in schedule) or len(keeps) < 3:
        raise ValueError(
            f"a sigmoid is fitted to ratios of at least three layers from {start} on: give a schedule of floats"
        )
    layers, depth = np.arange(start, len(schedule)), len(schedule)

    def off(p: np.ndarray) -> np.ndarray:
        missed: np.ndarray = np.exp(p[0]) / (1 + np.exp(np.clip(np.exp(p[1]) * (layers - p[2]), -700, 700))) - keeps
        return missed

    tries = [(math.log(max(keeps[0], 1e-3)), math.log(k / depth), depth * m) for k in (4, 12, 30) for m in (0.2, 0.5)]
    bounds = [math.log(1e-3), math.log(0.5 / depth), -depth], [math.log(50.0), math.log(200.0 / depth), 2.0 * depth]
    best = min((least_squares(off, start_at, bounds=bounds) for start_at in tries), key=lambda found: found.cost)
    a, k, m = best.x
    rmse = float(np.sqrt(np.mean(best.fun**2)))
    return Sigmoid(float(np.exp(a)), float(np.exp(k)), float(m), rmse)


def plot(
    schedules: Mapping[str, Sequence[Any]], fitted: Sigmoid | None = None, start: int = 2, title: str = ""
) -> Figure:
    """Schedules (by name) over layers, and a fitted sigmoid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    depth = 0
    for name, schedule in schedules.items():
        depth = max(depth, len(schedule))
        axis.step(range(len(schedule)), Schedule(list(schedule)).counts(10**6), where="mid", label=name, lw=1.8)
    if fitted is not None:
        xs = np.linspace(start, depth - 1, 200)
        told = (
            f"fit {fitted.amplitude:.2f}/(1+exp({fitted.steepness:.2f}(l−{fitted.middle:.1f}))), rmse {fitted.rmse:.3f}"
        )
        axis.plot(xs, [1e6 * fitted.at(x) for x in xs], "k--", lw=1, label=told)
    axis.set(xlabel="decoder layer", ylabel="vision tokens that enter", ylim=(0, 1.05e6), title=title)
    axis.set_yticks([0, 2.5e5, 5e5, 7.5e5, 1e6], ["0", "25 %", "50 %", "75 %", "100 %"])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
