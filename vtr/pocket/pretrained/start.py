"""Where the projector starts: a random map whose tokens look, in their mean and spread, like the decoder's words.

Both moments are set in closed form on pictures that the package draws itself. Nothing is learnt of what is on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

PICTURES = 8


@torch.no_grad()
def start(model: Any, pixels: torch.Tensor, seed: int = 0) -> None:
    """Fill a model's projector.

    Args:
        pixels: of some pictures, [pictures, 3, side, side].
    """
    projector = model.model.multi_modal_projector
    draw = torch.Generator().manual_seed(seed)
    for layer in (projector.linear_1, projector.linear_2):
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw) / math.sqrt(layer.in_features))
        layer.bias.zero_()
    projector.layer_norm.reset_parameters()
    words = model.get_input_embeddings().weight
    tokens = model.model.get_image_features(pixel_values=pixels).pooler_output.reshape(-1, words.shape[1])
    gain = words.std(0).norm() / tokens.std(0, correction=0).norm()
    projector.linear_2.weight.mul_(gain)
    projector.linear_2.bias.copy_(words.mean(0) - gain * tokens.mean(0))


def one_tile(processor: Any, pictures: Sequence[Any]) -> torch.Tensor:
    """Pixels of pictures, one tile each: [pictures, 3, side, side] float32."""
    found = processor.image_processor(list(pictures), max_patches=1, return_tensors="pt")["pixel_values"]
    return found  # type: ignore[no-any-return]


def pictures(processor: Any, count: int = PICTURES) -> torch.Tensor:
    """Pixels of the first drawn scenes, one tile each."""
    from ..scenes import scene_stream

    stream = scene_stream("train", "pretrained-0")
    return one_tile(processor, [next(stream)[0].image for _ in range(count)])
