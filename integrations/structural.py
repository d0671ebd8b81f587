"""Any other model of transformers that merges images at placeholder tokens, known by its parts alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from vtr.integrations.grids import layouts_of, rows_of_tokens
from vtr.integrations.internvl import runs_of
from vtr.integrations.qwen_vl import patch_order

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
RESAMPLERS = ("Resampler", "Perceiver", "QFormer", "Qformer")
"""Parts of names of modules whose tokens are learned queries, which have no place in the picture."""


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
    """Serves what no other adapter does: a ``generate``, an image token in the config, a decoder with ``.layers``.

    Nobody has looked at these models, so :mod:`vtr.engine.selftest` compares each with the model as it was.

    Args:
        model: whose adapter it is; None: it only finds those that it can serve.

    Attributes:
        queries: whether the model's image tokens are learned queries, which have no place in the picture.
    """

    family = "by structure"
    classes = ()
    proven = False
    queries = False
    grids = "the sizes that the processor gives; else a run of placeholders is one row"

    def __init__(self, model: nn.Module | None = None) -> None:
        if model is None:
            return
        features = getattr(model, "get_image_features", None)
        self.image_inputs = () if features is None else tuple(inspect.signature(features).parameters)
        self.lacks = self._lacks(model)
        self.queries = any(name in type(part).__name__ for part in model.modules() for name in RESAMPLERS)

    def serves(self, model: nn.Module) -> bool:
        config: Any = getattr(model, "config", None)
        if config is None or not hasattr(model, "generate") or getattr(config, "is_encoder_decoder", False):
            return False
        merges = any(hasattr(part, name) for part in (model, getattr(model, "model", None)) for name in MERGES)
        return merges and first_of(config, IMAGE_IDS) is not None and decoder_of(model) is not None

    def for_model(self, model: nn.Module) -> Structural:
        return Structural(model)

    def text_model(self, model: nn.Module) -> Any:
        return decoder_of(model)

    def placeholders(self, model: nn.Module) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self._marks(model).values()))

    def _marks(self, model: nn.Module) -> dict[str, int]:
        """The placeholder's id of each kind that the config names: image, video."""
        named = {kind: first_of(model.config, names) for kind, names in (("image", IMAGE_IDS), ("video", VIDEO_IDS))}
        return {kind: int(mark) for kind, mark in named.items() if mark is not None}

    def tower(self, model: nn.Module) -> Any:
        return first_of(getattr(model, "model", model), TOWERS) or Absent()

    def projector(self, model: nn.Module) -> Any:
        inner = getattr(model, "model", model)
        return first_of(inner, PROJECTORS) or first_of(first_of(inner, TOWERS), PROJECTORS) or Absent()

    def patch_order(self, model: nn.Module, layout: Layout) -> torch.Tensor | None:
        """That of Qwen2.5-VL's tower where this one has windows, too."""
        config: Any = model.config
        return patch_order(config.vision_config, layout) if _windowed(self.tower(model)) else None

    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """Grids of the sizes that the processor gave; else every run of placeholders is an image of one row."""
        found: dict[int, list[Layout]] = {}
        for kind, mark in self._marks(model).items():
            if not (runs := runs_of(inputs["input_ids"] == mark)) or mark in found:
                continue
            known = None if self.queries else layouts_of(model.config, inputs, runs, kind)
            found[mark] = rows_of_tokens(runs) if known is None else known
        return found

    def layer_features(self, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        kwargs.pop("visual_pos_masks", None)
        return kwargs.pop("deepstack_visual_embeds", None) or []

    def _lacks(self, model: nn.Module) -> dict[str, str]:
        """What policies may want of the tower and cannot have: what is not known for certain is not given."""
        projector = "how this model's projector takes the states of its vision tower is not known"
        tower, vision = self.tower(model), getattr(model.config, "vision_config", None)
        merge = getattr(vision, "spatial_merge_size", None) or 1
        if isinstance(tower, Absent):
            why = "this model's vision tower was not found"
        elif merge > 1 and not _merges_neighbours(vision, self.projector(model)):
            why = "how this model makes a token of several patches is not known"
        else:
            return {"projector": projector}
        return {"hidden_states": why, "attentions": why, "cls_token": why, "projector": projector}


def _windowed(tower: Any) -> bool:
    """Whether a vision tower takes its patches window by window."""
    return hasattr(tower, "get_window_index")


def _merges_neighbours(vision: Any, projector: Any) -> bool:
    """Whether a projector makes a token of patches that follow each other, as Qwen-VL's does: one of its Linear modules
    takes as many states as are merged."""
    widths = [getattr(vision, name, None) for name in ("embed_dim", "hidden_size")]
    wanted = {width * vision.spatial_merge_size**2 for width in widths if isinstance(width, int)}
    return any(isinstance(part, nn.Linear) and part.in_features in wanted for part in projector.modules())
