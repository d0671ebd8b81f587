"""Evenly spread selection: the question-blind, picture-blind baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtr.base import Policy, Tokens
from vtr.image import Image, Layout
from vtr.keep import Keep, check_keep, keep_count, top
from vtr.policies._checks import check_before, check_depth, check_layer
from vtr.settings import register_policy

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
        before_decoder: each image is reduced by itself, and the positions of what follows close up: the prompt is
            really shorter, and engines that know nothing of vtr's decoder hooks can serve it (vLLM). ``keep`` is then
            of each image's tokens, newlines included.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.5
    layer: int = 0
    before_decoder: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer(self.layer)
        check_before(self.before_decoder, self.layer)

    def check(self, num_hidden_layers: int) -> None:
        check_depth(self.layer, num_hidden_layers)

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        if layer != self.layer:
            return None
        return self._spread(tokens.y, tokens.x, tokens.total)

    def _spread(self, y: torch.Tensor, x: torch.Tensor, total: int) -> torch.Tensor:
        return top(-dither_rank(y, x), keep_count(self.keep, total))

    def asks(self, question: str) -> bool:
        return question == ("compress" if self.before_decoder else "prune")

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps with ``before_decoder``."""
        return keep_count(self.keep, len(layout)) if self.before_decoder else super().kept_of(layout)

    def compress(self, image: Image) -> torch.Tensor:
        return self._spread(image.layout.y, image.layout.x, len(image))
