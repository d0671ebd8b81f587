"""Any other model of transformers that merges images at placeholder tokens, known by its parts alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from vtr.integrations.internvl import runs_of
from vtr.integrations.llava import tile_layout

from vtr.engine.adapters import Adapter
from vtr.image import Layout

MERGES = ("get_placeholder_mask", "inputs_merger")
"""Methods by which transformers' models put image features at placeholder tokens."""
DECODERS = ("language_model", "text_model")
BELOW = ("model", "decoder")
"""Where the layers are in a decoder that does not hold them itself."""
TOWERS = (
    "vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder", "vision_embed_tokens", "vision",
)  # fmt: skip
PROJECTORS = (
    "multi_modal_projector", "connector", "embed_vision", "aligner", "merger", "projector", "perceive_projector",
    "resampler_model", "mlp_AR", "vision_projection", "visual_projection",
)  # fmt: skip
IMAGE_IDS = ("image_token_id", "image_token_index", "image_patch_id", "img_context_token_id")
VIDEO_IDS = ("video_token_id", "video_token_index")


class Absent(nn.Module):
    """Stands for a tower or projector that was not found: its hooks never run."""


def first_of(owner: Any, names: Iterable[str]) -> Any:
    """The first of these attributes that ``owner`` has and that is not None; None if there is none."""
    return next((found for name in names if (found := getattr(owner, name, None)) is not None), None)


def decoder_of(model: nn.Module) -> Any:
    """The module that runs a model's decoder layers; None if it cannot be found."""
    inner = getattr(model, "model", model)
    found = first_of(inner, DECODERS) or first_of(model, DECODERS)
    if found is None and hasattr(model, "get_decoder"):
        found = model.get_decoder()  # type: ignore[operator]
    while found is not None and not hasattr(found, "layers"):
        found = first_of(found, BELOW)
    return found


class Structural(Adapter):
    """Serves what no other adapter does: a ``generate``, an image token in the config, a decoder with ``.layers``."""

    family = "by structure"
    classes = ()

    def serves(self, model: nn.Module) -> bool:
        config: Any = getattr(model, "config", None)
        if config is None or not hasattr(model, "generate") or getattr(config, "is_encoder_decoder", False):
            return False
        merges = any(hasattr(part, name) for part in (model, getattr(model, "model", None)) for name in MERGES)
        return merges and first_of(config, IMAGE_IDS) is not None and decoder_of(model) is not None

    def text_model(self, model: nn.Module) -> Any:
        return decoder_of(model)

    def placeholders(self, model: nn.Module) -> tuple[int, ...]:
        ids = (first_of(model.config, names) for names in (IMAGE_IDS, VIDEO_IDS))
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    def tower(self, model: nn.Module) -> Any:
        return first_of(getattr(model, "model", model), TOWERS) or Absent()

    def projector(self, model: nn.Module) -> Any:
        inner = getattr(model, "model", model)
        return first_of(inner, PROJECTORS) or first_of(first_of(inner, TOWERS), PROJECTORS) or Absent()

    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """Every run of placeholders is an image of one row."""
        found: dict[int, list[Layout]] = {}
        for mark in self.placeholders(model):
            if runs := runs_of(inputs["input_ids"] == mark):
                found[mark] = [tile_layout(1, end - start) for _, start, end in runs]
        return found

    def layer_features(self, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        kwargs.pop("visual_pos_masks", None)
        return kwargs.pop("deepstack_visual_embeds", None) or []
