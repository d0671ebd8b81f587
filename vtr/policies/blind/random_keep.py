"""Random selection: the baseline every selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtr.policies.blind._blind import Blind
from vtr.settings import register_policy


@register_policy("random")
@dataclass
class Random(Blind):
    """Baseline: vision tokens drawn at random, on entering one decoder layer.

    The draw depends on (seed, layer, number of tokens) only: the same row gives the same tokens in any batch.

    Args:
        keep: tokens that stay: a ratio (float) or a count (int).
        layer: 0 reduces before the whole decoder.
        seed: another seed, another draw.
        before_decoder: each image is reduced by itself, and the positions of what follows close up: the prompt is
            really shorter, and engines that know nothing of vtr's decoder hooks can serve it (vLLM). ``keep`` is then
            of each image's tokens, newlines included; images of as many tokens get the same draw.
        share: who competes: "row", all vision tokens of the row together; "image", those of each image among
            themselves, the budget divided by how many tokens the images have.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    layer: int = 0
    seed: int = 0
    before_decoder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")

    def rank(self, y: torch.Tensor, x: torch.Tensor, layer: int) -> torch.Tensor:
        n = len(y)
        # mixed by multiplication, since nearby seeds of the generator give related draws
        mixed = (self.seed * 1_000_003 + layer) * 1_000_003 + n
        draw = torch.randperm(n, generator=torch.Generator().manual_seed(mixed % 2**63))
        return torch.empty(n).index_copy_(0, draw, -torch.arange(n).float())
