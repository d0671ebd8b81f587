"""A question-blind selector to measure question-guided ones against: keep what stands out in the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import vtr


@vtr.register_policy("salient")
@dataclass
class Salient(vtr.Policy):
    """Keep the vision tokens whose hidden states lie farthest from their tile's mean, on entering layer ``layer``.

    It sees the picture, never the question: what stands out from the background stays.
    """

    keep: int | float = 0.5
    layer: int = 2

    def prune(self, layer: int, tokens: vtr.Tokens) -> torch.Tensor | None:  # type: ignore[override]
        if layer != self.layer:
            return None
        hidden, tile = tokens.hidden.float(), tokens.tile + 64 * tokens.image
        same = (tile[:, None] == tile[None, :]).float()
        distance = (hidden - same @ hidden / same.sum(1, keepdim=True)).norm(dim=1)
        distance = distance.masked_fill(tokens.newline.bool(), 0.0)
        keep = int(tokens.total * self.keep + 1e-9) if isinstance(self.keep, float) else min(self.keep, tokens.total)
        return distance.argsort(descending=True, stable=True)[:keep]
