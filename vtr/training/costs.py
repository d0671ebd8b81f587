"""What choices cost on a model, and which are there by default."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vtr.accounting import report as last_report
from vtr.auto_policy import AutoPolicy
from vtr.base import Policy
from vtr.chat import encode
from vtr.data.records import Sample
from vtr.engine.install import patch_of
from vtr.image import scales


@dataclass(frozen=True)
class Costs:
    """What each choice costs a question in the decoder, in one unit.

    Attributes:
        taken: [c], of an answer under it. tried: [c - 1], of a try of it that is left.
    """

    taken: Sequence[float]
    tried: Sequence[float]
    unit: str = "FLOPs"

    def of(self, steps: Sequence[int]) -> Costs:
        """Of some of the choices."""
        return Costs([self.taken[s] for s in steps], [self.tried[s] for s in list(steps)[:-1]], self.unit)


def default_choices(model: Any, processor: Any, sample: Sample) -> list[str]:
    """M3's scales of the model's grid, coarsest first, and no reduction; where it has none, the most diverse tokens."""
    inputs = encode(processor, [sample.asked], [sample.picture()]).to(model.device)
    layouts = [one for many in patch_of(model).adapter.layouts(model, dict(inputs)).values() for one in many]
    grids = {layout.grid for layout in layouts}
    if len(grids) == 1 and len(ladder := sorted(scales(*grids))) > 1:
        return [*(f"m3:tokens={count}" for count in ladder[:-1]), "none"]
    return ["divprune:keep=0.0625", "divprune:keep=0.25", "none"]


@torch.inference_mode()
def measure(
    model: Any, processor: Any, samples: Sequence[Sample], choices: Sequence[tuple[str, Policy | None]], *,
    unit: str = "time", tokens: int = 1, max_new_tokens: int = 32, turns: int = 3,
) -> Costs:  # fmt: skip
    """What an answer under each choice costs, and a try of it that is left, as medians of prompts taken in turns.

    Args:
        unit: "time": seconds of a whole ``generate`` (of this process on the CPU, of the GPU there); "flops": of the
            decoder. tokens: that a try says.
    """
    last = choices[-1]
    tries = [AutoPolicy([name, last[0]], 1.0, tokens=tokens) for name, _ in choices[:-1]]
    policies: list[Any] = [policy for _, policy in choices]
    found: list[list[float]] = []
    for sample in samples:
        inputs = encode(processor, [sample.asked], [sample.picture()]).to(model.device)
        for _ in range(turns if unit == "time" else 1):
            found.append([_spent(model, inputs, p, unit, max_new_tokens) for p in (*policies, *tries)])
    costs, n = np.median(np.array(found), 0), len(choices)
    tried = [max(float(one - costs[n - 1]), 0.0) for one in costs[n:]]
    return Costs([float(one) for one in costs[:n]], tried, {"time": "time", "flops": "FLOPs"}[unit])


def _spent(model: Any, inputs: Any, policy: Any, unit: str, longest: int) -> float:
    """Of one ``generate``: seconds, or FLOPs of the decoder."""
    cuda = model.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    model.generate(**inputs, policy=policy, do_sample=False, max_new_tokens=longest)
    if cuda:
        torch.cuda.synchronize(model.device)
    return clock() - start if unit == "time" else float(last_report(model).flops)
