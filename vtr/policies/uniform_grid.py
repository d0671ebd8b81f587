"""Evenly spread selection: the question-blind, picture-blind baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtr.base import Keep, Policy, Tokens, check_keep, keep_count, top
from vtr.policies._checks import check_depth, check_layer
from vtr.registry import register_policy

if TYPE_CHECKING:
    import torch

BITS = 6  # a 64 × 64 pattern: every patch of a tile up to that size has a rank of its own


def dither_rank(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rank of (y, x) in a Bayer (ordered dither) pattern: the cells of rank < r are evenly spread for every r.

    Interleaves the reversed bits of ``x ^ y`` and ``y`` (Bayer, 1973). int64 in, int64 in [0, 4**BITS) out.
    """
    rank = y * 0
    for bit in range(BITS):
        shift = 2 * (BITS - 1 - bit)
        rank = rank | (((x ^ y) >> bit & 1) << (shift + 1)) | ((y >> bit & 1) << shift)
    return rank


@register_policy("uniform")
@dataclass
class UniformGrid(Policy):
    """Baseline: vision tokens spread evenly over the patch grid of every tile, on entering one decoder layer.

    Args:
        keep: tokens that stay: a ratio (float) or a count (int).
        layer: 0 reduces before the whole decoder.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.5
    layer: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer(self.layer)

    def check(self, num_hidden_layers: int) -> None:
        check_depth(self.layer, num_hidden_layers)

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        if layer != self.layer:
            return None
        rank = -dither_rank(tokens.y, tokens.x)
        return top(rank, keep_count(self.keep, tokens.total))
