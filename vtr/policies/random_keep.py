"""Random selection: the baseline every selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtr.base import Keep, Policy, Tokens, check_keep, keep_count
from vtr.policies._checks import check_depth, check_layer
from vtr.registry import register_policy


@register_policy("random")
@dataclass
class Random(Policy):
    """Baseline: vision tokens drawn at random, on entering one decoder layer.

    The draw depends on (seed, layer, number of tokens) only: the same row gives the same tokens in any batch.

    Args:
        keep: tokens that stay: a ratio (float) or a count (int).
        layer: 0 reduces before the whole decoder.
        seed: another seed, another draw.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.5
    layer: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer(self.layer)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")

    def check(self, num_hidden_layers: int) -> None:
        check_depth(self.layer, num_hidden_layers)

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        if layer != self.layer:
            return None
        n = len(tokens)
        # mixed by multiplication, since nearby seeds of the generator give related draws
        mixed = (self.seed * 1_000_003 + layer) * 1_000_003 + n
        draw = torch.randperm(n, generator=torch.Generator().manual_seed(mixed % 2**63))
        return draw[: keep_count(self.keep, tokens.total)].sort().values
