"""LLaVA-1.5 as transformers has it: one tile an image, a square grid of patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtr.base import Layout, UnsupportedError
from vtr.engine.adapters import Adapter
from vtr.image import remembered


@remembered(64)
def tile_layout(height: int, width: int) -> Layout:
    """One tile of height × width patches, row by row."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    zero = torch.zeros(height * width, dtype=torch.int64)
    grid = height, width
    return Layout(zero, y.reshape(-1), x.reshape(-1), zero, grid, shrunk=lambda k: tile_layout(height // k, width // k))


class Llava(Adapter):
    """``LlavaForConditionalGeneration``."""

    family = "LLaVA-1.5"
    classes = ("LlavaForConditionalGeneration",)

    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """Every image is one tile: its patches in rows."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return {}
        config: Any = model.config
        strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
        if strategy == "full" and config.vision_config.model_type == "clip_vision_model":
            raise UnsupportedError(
                "vision_feature_select_strategy='full' sends CLIP's CLS token along with the patches, which has no "
                "place in the grid: use 'default'"
            )
        patch = config.vision_config.patch_size
        tile = tile_layout(pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        return {config.image_token_id: [tile] * len(pixels)}
