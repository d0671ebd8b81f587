"""A policy that keeps everything and notes how the text ranks the vision tokens, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vtr.base import Policy, Scores, Tokens


@dataclass
class Watch(Policy):
    """Not registered: made for one call, and read after it.

    Attributes:
        queries: whose attention. seen: decoder layer → float32 [vision tokens] on the CPU, the attention they got in
            it; the last layer is not there, since it ranks nothing.
    """

    queries: Scores = "text"
    seen: dict[int, torch.Tensor] = field(default_factory=dict)

    def needs(self, layer: int) -> Scores | None:
        return self.queries if layer else None

    def prune(self, layer: int, tokens: Tokens) -> None:
        if tokens.scores is not None:
            self.seen[layer - 1] = tokens.scores.float().cpu()
