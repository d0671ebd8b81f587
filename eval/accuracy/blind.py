"""A question-blind selector to measure question-guided ones against: keep tokens that differ from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import vtr
from vtr.keep import keep_count


@vtr.register_policy("diverse")
@dataclass
class Diverse(vtr.Policy):
    """Keep the vision tokens that differ most from each other, on entering layer ``layer``.

    Greedy max-min of the cosine distance between hidden states, as DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175)
    poses the problem. It sees the picture, never the question. Written to compare with, not tuned.

    Args:
        keep: tokens that stay: a ratio (float) or a count (int).
        layer: the decoder layer before which the cut happens.
    """

    keep: int | float = 0.5
    layer: int = 2

    def prune(self, layer: int, tokens: vtr.Tokens) -> torch.Tensor | None:
        if layer != self.layer:
            return None
        unit = torch.nn.functional.normalize(tokens.hidden.float(), dim=1)
        nearest = unit @ unit.mean(0)  # start with the token least like the average
        chosen = []
        for _ in range(keep_count(self.keep, tokens.total)):
            pick = nearest.argmin()
            chosen.append(pick)
            nearest = torch.maximum(nearest, unit @ unit[pick])
            nearest[pick] = 2.0  # taken
        return torch.stack(chosen) if chosen else torch.empty(0, dtype=torch.int64)
