"""Random selection: the baseline every selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtr.base import Policy, Tokens
from vtr.image import Image, Layout
from vtr.keep import Keep, check_keep, keep_count
from vtr.policies._checks import check_before, check_depth, check_layer
from vtr.settings import register_policy


@register_policy("random")
@dataclass
class Random(Policy):
    """Baseline: vision tokens drawn at random, on entering one decoder layer.

    The draw depends on (seed, layer, number of tokens) only: the same row gives the same tokens in any batch.

    Args:
        keep: tokens that stay: a ratio (float) or a count (int).
        layer: 0 reduces before the whole decoder.
        seed: another seed, another draw.
        before_decoder: each image is reduced by itself, and the positions of what follows close up: the prompt is
            really shorter, and engines that know nothing of vtr's decoder hooks can serve it (vLLM). ``keep`` is then
            of each image's tokens, newlines included; images of as many tokens get the same draw.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.5
    layer: int = 0
    seed: int = 0
    before_decoder: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer(self.layer)
        check_before(self.before_decoder, self.layer)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")

    def check(self, num_hidden_layers: int) -> None:
        check_depth(self.layer, num_hidden_layers)

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        if layer != self.layer:
            return None
        return self._draw(layer, len(tokens), tokens.total)

    def _draw(self, layer: int, n: int, total: int) -> torch.Tensor:
        # mixed by multiplication, since nearby seeds of the generator give related draws
        mixed = (self.seed * 1_000_003 + layer) * 1_000_003 + n
        draw = torch.randperm(n, generator=torch.Generator().manual_seed(mixed % 2**63))
        return draw[: keep_count(self.keep, total)].sort().values

    def asks(self, question: str) -> bool:
        return question == ("compress" if self.before_decoder else "prune")

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps with ``before_decoder``."""
        return keep_count(self.keep, len(layout)) if self.before_decoder else super().kept_of(layout)

    def compress(self, image: Image) -> torch.Tensor:
        return self._draw(0, len(image), len(image))
