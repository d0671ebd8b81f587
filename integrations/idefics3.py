"""Idefics3 and SmolVLM as transformers has them: square tiles after pixel shuffle, text tokens between them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from vtr.integrations.internvl import runs_of, with_frames
from vtr.integrations.llava import tile_layout

from vtr.engine.adapters import Adapter
from vtr.image import Layout

LABEL = range(6, 25)
"""Tokens between two frames of a video ("Frame from 00:01:"); between two tiles of a picture stand fewer."""


class Idefics3(Adapter):
    """``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``.

    Every tile (crop, whole picture, frame of a video) stands between text tokens that say which it is, and is an image
    of its own here: how a picture was cut is only in the tokenizer's names for these.
    """

    family = "Idefics3, SmolVLM"
    classes = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
    image_inputs = ("pixel_values", "pixel_attention_mask")
    lacks = MappingProxyType(
        {
            "projector": "it merges states in front of the projector, which here takes several patches at once (pixel "
            "shuffle)",
            "cls_token": "it is about the vision tower's CLS token, and SigLIP has none",
        }
    )
    unsupported = MappingProxyType(
        {
            "globalcom2": "which tile is the whole picture that guides the crops is not in the model's inputs; m3 and "
            "pool shrink tiles before the decoder here"
        }
    )

    def text_model(self, model: nn.Module) -> Any:
        return model.model.text_model  # type: ignore[union-attr]

    def tower(self, model: nn.Module) -> Any:
        return model.model.vision_model  # type: ignore[union-attr]

    def projector(self, model: nn.Module) -> Any:
        return model.model.connector  # type: ignore[union-attr]

    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """One image per tile: as many as there are placeholders for.

        Raises:
            ValueError: a number of placeholders that is no whole number of tiles.
        """
        if inputs.get("pixel_values") is None:
            return {}
        config: Any = model.config
        height, width = inputs["pixel_values"].shape[-2:]
        side = config.vision_config.patch_size * config.scale_factor
        tile = tile_layout(height // side, width // side)
        marks = inputs["input_ids"] == config.image_token_id
        count, left = divmod(int(marks.sum()), len(tile))
        if left:
            raise ValueError(
                f"{left} image placeholders are left over from whole tiles of {len(tile)} tokens: tokenize text and "
                "images in one processor call, and do not truncate"
            )
        runs = runs_of(marks)
        if any(end - start != len(tile) for _, start, end in runs):  # tiles without text between them
            return {int(config.image_token_id): [tile] * count}
        return {int(config.image_token_id): with_frames([tile] * count, runs, LABEL)}
