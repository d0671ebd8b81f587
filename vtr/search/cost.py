"""What a schedule costs on given prompts, worked out without running them: FLOPs, cached keys and values, tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vtr.engine.install import patch_of
from vtr.engine.trace import Geometry
from vtr.keep import Keep
from vtr.schedule import Schedule

Measure = Literal["keep", "flops", "kv"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Cost:
    """Costs of schedules, each as a ratio to no reduction.

    Attributes:
        sizes: (vision tokens, text tokens) of the prompts.
    """

    geometry: Geometry
    sizes: Sequence[tuple[int, int]]

    @classmethod
    def from_model(cls, model: Any, sizes: Sequence[tuple[int, int]]) -> Cost:
        """For a patched model."""
        return cls(patch_of(model).decoder.geometry, tuple(sizes))

    def flops(self, keeps: Sequence[Keep]) -> float:
        """Decoder prefill FLOPs, summed over the prompts (as :attr:`vtr.Report.prefill_flops` counts them)."""
        g, total = self.geometry, 0
        schedule = Schedule(keeps)
        for (vision, text), times in Counter(self.sizes).items():
            for linear, count in zip(g.linear_flops, schedule.counts(vision), strict=True):
                n = count + text
                total += times * (linear * n + 4 * g.heads * g.head_dim * n * n)
        return total

    def ratio(self, keeps: Sequence[Keep], measure: Measure) -> float:
        """``"flops"``: prefill FLOPs; ``"kv"``: cached tokens over all layers; ``"keep"``: vision tokens likewise."""
        depth = self.geometry.num_hidden_layers
        if measure == "flops":
            return self.flops(keeps) / self.flops([1.0] * depth)
        schedule, here, all_ = Schedule(keeps), 0, 0
        for (vision, text), times in Counter(self.sizes).items():
            text = text if measure == "kv" else 0
            here += times * (sum(schedule.counts(vision)) + depth * text)
            all_ += times * depth * (vision + text)
        return here / all_

    def ratios(self, keeps: Sequence[Keep]) -> dict[str, float]:
        """All three."""
        return {measure: self.ratio(keeps, measure) for measure in MEASURES}


def check_measure(measure: str) -> None:
    """Raise ValueError unless a budget can be counted so."""
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: a budget is counted in one of {', '.join(map(repr, MEASURES))}")
