"""Suggestions of the bayesian-optimization package, several at a time."""

from __future__ import annotations

from collections.abc import Mapping

from bayes_opt import BayesianOptimization, acquisition


class Suggestions:
    """Asks for points and is told what they were worth; the same seed and answers give the same points.

    Expected improvement; points asked for together are kept apart by a constant lie about those before.

    Args:
        bounds: of each parameter.
    """

    def __init__(self, bounds: Mapping[str, tuple[float, float]], seed: int) -> None:
        lie = acquisition.ConstantLiar(acquisition.ExpectedImprovement(xi=0.0), strategy="mean")
        self.optimizer = BayesianOptimization(
            None, dict(bounds), acquisition_function=lie, random_state=seed, verbose=0, allow_duplicate_points=True
        )

    def ask(self, count: int) -> list[dict[str, float]]:
        """Points to try."""
        return [{k: float(v) for k, v in self.optimizer.suggest().items()} for _ in range(count)]

    def tell(self, point: Mapping[str, float], value: float) -> None:
        """What a point was worth."""
        self.optimizer.register(dict(point), value)
