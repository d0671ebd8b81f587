"""Where VTW (Lin et al., AAAI 2025, arXiv 2405.05803) may withdraw the vision tokens of a model.

From the paper: the smallest layer behind which the picture can go without moving the answers' distribution by more than
a threshold chosen by hand. Ours: the divergence is taken from the unreduced model, over all tokens of its own answers
(the official code: the other way round, over the first token alone, in 20 samples, from layer 5 on).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vtr.engine.install import patch_of
from vtr.policies.decoder.vtw import VTW
from vtr.search.found import RECORD_NAME
from vtr.search.prompts import Prepared, answer_logits


@dataclass(frozen=True)
class Withdrawal:
    """Where the vision tokens of a model may leave.

    Attributes:
        layer: the first one whose divergence is below the threshold. divergence: of each layer, in nats a token.
        record: JSON data on how it was found.
    """

    layer: int
    divergence: Sequence[float]
    positions: str = "keep"
    record: dict[str, Any] = field(default_factory=dict)

    def policy(self) -> VTW:
        """The policy it was searched for."""
        return VTW(self.layer, self.positions)  # type: ignore[arg-type]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write policy and record; ``vtr.VTW.from_pretrained(folder)`` reads the policy back."""
        folder = Path(folder)
        self.policy().save_pretrained(folder)
        told = {"layer": self.layer, "divergence": list(self.divergence), **self.record}
        (folder / RECORD_NAME).write_text(json.dumps(told, indent=1) + "\n")


@torch.inference_mode()
def vtw(
    model: Any, processor: Any, data: Any, *, threshold: float = 0.01, first: int = 1, positions: str = "keep",
    batch_size: int = 32, max_new_tokens: int = 16, progress: bool = True,
) -> Withdrawal:  # fmt: skip
    """The first layer at which vision tokens may leave: there the KL divergence is below the threshold.

    The layers in front of a withdrawal are run once for all candidates.

    Args:
        model: patched. data: questions, see :func:`vtr.search.examples`, or a :class:`vtr.search.Prepared` of objective
            "kl".
        threshold: of the divergence from the unreduced model, mean over the questions, in nats a token.
        first: no layer before this one is taken. positions: as :class:`vtr.VTW` has it.
        batch_size: rows a call. max_new_tokens: of the model's own answers; 1 looks at the first token alone.

    Raises:
        ValueError, TypeError: settings or data that cannot work; no layer is below the threshold.
    """
    model = patch_of(model).model
    depth = patch_of(model).decoder.depth
    VTW(first, positions).check(depth)  # type: ignore[arg-type]
    if not threshold > 0:
        raise ValueError(f"threshold={threshold!r}: the divergence is below it somewhere, so it lies above 0")
    with tqdm(desc="vtw", unit=" prompts", disable=not progress) as bar:
        if not isinstance(data, Prepared):
            data = Prepared(model, processor, data, "kl", batch_size, max_new_tokens, bar.update)
        elif data.model is not model or data.objective.name != "kl":
            raise ValueError("the prepared questions are of another model or objective: prepare them with 'kl'")
        sums = [0.0] * depth
        for batch, state in zip(data.batches, data.starts, strict=True):
            rows = range(len(batch))
            for layer in range(depth):
                end = state.go([(row, VTW(layer, positions)) for row in rows], depth)  # type: ignore[arg-type]
                sums[layer] -= sum(batch.values(data.objective, answer_logits(model, end, batch.counts)))
                state = state.go([(row, None) for row in rows], layer + 1)
            bar.update(len(batch))
    divergence = [one / len(data.base) for one in sums]
    below = [layer for layer in range(first, depth) if divergence[layer] < threshold]
    if not below:
        best = min(range(first, depth), key=divergence.__getitem__)
        raise ValueError(
            f"no layer from {first} on is below threshold={threshold}: the smallest divergence is "
            f"{divergence[best]:.3g}, at layer {best}; give a larger threshold"
        )
    record = {
        "method": "vtw", "threshold": threshold, "first": first, "questions": len(data.base),
        "max_new_tokens": data.max_new_tokens, "pictures": sorted({one.picture for one in data.examples}),
    }  # fmt: skip
    return Withdrawal(below[0], divergence, positions, record)
