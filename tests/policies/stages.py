"""What tests of policies inside the decoder share: tokens of given numbers, tiny text models with given pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import vtr
from tests import official
from vtr.base import Tokens


def tokens_of(
    layer: int, depth: int, fields: dict[str, Tensor], scores: Any = None, memo: dict[str, Any] | None = None,
    total: int | None = None, per_image: tuple[int, ...] | None = None,
) -> Tokens:  # fmt: skip
    """A row's tokens entering a layer, as a policy sees them. ``fields``: those it may read, ``place`` among them."""
    n = len(fields["place"])
    given = {"image": torch.zeros(n).long(), "newline": torch.zeros(n).long(), **fields}
    length = n + len(given.get("text_place", ()))
    counts = (n,) if per_image is None else per_image
    return Tokens(
        layer, depth, n if total is None else total, n, given.__getitem__, scores, lambda: scores, counts, length,
        {} if memo is None else memo,
    )  # fmt: skip


def text_model(config: dict[str, Any], state: dict[str, Tensor], prefix: str) -> Any:
    """A tiny LLaVA with this text model, patched, whose pictures are given (:class:`tests.official.Given`).

    state: its parameters, transformers' names behind ``prefix``; the last word of the vocabulary is the placeholder.
    """
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=2, patch_size=1
    )
    words = config["vocab_size"]
    made: Any = official.Given(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**config), image_token_index=words - 1)
    )
    named = {
        k if k == "lm_head.weight" else "model.language_model." + k.removeprefix(prefix): t for k, t in state.items()
    }
    missing, unexpected = made.load_state_dict(named, strict=False)
    assert not unexpected and not [k for k in missing if "language_model" in k or k == "lm_head.weight"]
    made.set_attn_implementation("eager")
    return vtr.patch(official.features_given(made).eval())


def prompt_of(model: Any, ids: Tensor, pictures: list[Tensor]) -> dict[str, Tensor]:
    """What the model takes: ``ids`` [1, n] with its placeholder where tokens of the pictures stand."""
    model.pictures = pictures
    pixels = torch.zeros(len(pictures), 3, 2, 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
