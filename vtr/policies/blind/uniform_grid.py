"""Evenly spread selection: the question-blind, picture-blind baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vtr.base import Tokens
from vtr.policies.blind._blind import Blind
from vtr.settings import register_policy

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
class UniformGrid(Blind):
    """Baseline: vision tokens spread evenly over the patch grid of every tile, on entering one decoder layer.

    Args:
        keep: tokens that stay: a ratio (float) or a count (int).
        layer: 0 reduces before the whole decoder.
        before_decoder: each image is reduced by itself, and the positions of what follows close up: the prompt is
            really shorter, and engines that know nothing of vtr's decoder hooks can serve it (vLLM). ``keep`` is then
            of each image's tokens, newlines included.
        share: who competes: "row", all vision tokens of the row together; "image", those of each image among
            themselves, the budget divided by how many tokens the images have.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    layer: int = 0
    before_decoder: bool = False

    def rank(self, y: torch.Tensor, x: torch.Tensor, layer: int) -> torch.Tensor:
        return -dither_rank(y, x)

    def score_all(self, tokens: Sequence[Tokens]) -> Sequence[torch.Tensor]:
        y, x = (torch.cat([getattr(one, name) for one in tokens]) for name in ("y", "x"))
        ranks: Sequence[torch.Tensor] = self.rank(y, x, self.layer).split([len(one) for one in tokens])
        return ranks
