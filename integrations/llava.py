"""LLaVA-1.5 as transformers has it: one tile an image, a grid of patches; Pixtral's tower gives each its own grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtr.base import UnsupportedError
from vtr.engine.adapters import Adapter
from vtr.engine.tower import leading_tokens
from vtr.image import Layout, remembered


@remembered(64)
def tile_layout(height: int, width: int) -> Layout:
    """One tile of height × width patches, row by row."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    zero = torch.zeros(height * width, dtype=torch.int64)
    grid = height, width
    return Layout(zero, y.reshape(-1), x.reshape(-1), zero, grid, shrunk=lambda k: tile_layout(height // k, width // k))


def check_patches(tower: Any, config: Any, inputs: Mapping[str, Any]) -> None:
    """Check that the tokens used of the tower are its patches, all of them and nothing else.

    Raises:
        UnsupportedError: a CLS token or registers would come along, or the first patch would be missing.
    """
    strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    name, leading, removed = type(tower).__name__, leading_tokens(tower), int(strategy == "default")
    if leading == 1 and not removed:
        raise UnsupportedError(
            f"vision_feature_select_strategy='full' sends the CLS token of {name} along with the patches, which has no "
            "place in the grid: use 'default'"
        )
    if leading > removed:
        raise UnsupportedError(
            f"{name} puts {leading} tokens in front of the patches (CLS, registers), and "
            f"vision_feature_select_strategy={strategy!r} leaves {leading - removed} of them among the image's tokens, "
            "which have no place in the grid: use a checkpoint without registers, or pass policy=None"
        )
    if leading < removed:
        raise UnsupportedError(
            f"vision_feature_select_strategy='default' takes the first token away, but {name} has no CLS token, so a "
            "patch would be missing in the grid: use 'full' (and as many placeholders), or pass policy=None"
        )


class Llava(Adapter):
    """``LlavaForConditionalGeneration``."""

    family = "LLaVA-1.5"
    classes = ("LlavaForConditionalGeneration",)

    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """Every image is one tile: its patches in rows. Pixtral's are of ``image_sizes``, with text between rows.

        Raises:
            UnsupportedError: more or less than the tower's patches become tokens.
        """
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return {}
        config: Any = model.config
        check_patches(self.tower(model), config, inputs)
        patch, sizes = config.vision_config.patch_size, inputs.get("image_sizes")
        if sizes is None:
            sizes = [pixels.shape[-2:]] * len(pixels)
        sizes = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        return {config.image_token_id: [tile_layout(int(h) // patch, int(w) // patch) for h, w in sizes]}
