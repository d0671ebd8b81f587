"""Tiny random models of the supported families, and batches of rows made of letters and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

IMAGE = "<image>"
IMAGE_ID, PAD, BOS = 5, 0, 1
SIDE, PATCH = 24, 4
SIZES = [(40, 40), (20, 44), (48, 24), (30, 18)]
"""Pixel sizes (height, width) that a batch's AnyRes images take in turn; none fills its canvas."""


def _configs(layers: int) -> dict[str, Any]:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None,
    )  # fmt: skip
    return {"vision_config": vision, "text_config": text, "image_token_index": IMAGE_ID}


def _ready(model: Any, attn: str) -> Any:
    for layer in model.get_decoder().layers:  # random weights attend almost evenly; selection would not matter
        layer.self_attn.q_proj.weight.data *= 8
        layer.self_attn.k_proj.weight.data *= 8
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    return model.eval()


def llava(attn: str = "sdpa", layers: int = 5, seed: int = 0) -> Any:
    """LLaVA-1.5 over Llama with grouped queries: 36 vision tokens an image."""
    torch.manual_seed(seed)
    return _ready(LlavaForConditionalGeneration(LlavaConfig(**_configs(layers))), attn)


def llava_next(attn: str = "sdpa", layers: int = 5, seed: int = 0) -> Any:
    """LLaVA-NeXT over Llama: thumbnail, up to four crops, newline tokens."""
    torch.manual_seed(seed)
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = LlavaNextConfig(**_configs(layers), image_grid_pinpoints=grids)
    return _ready(LlavaNextForConditionalGeneration(config), attn)


def _images(model: Any, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Random pixels for ``count`` images, with sizes for AnyRes models."""
    made = torch.Generator().manual_seed(seed)
    if model.config.model_type == "llava":
        return {"pixel_values": torch.randn(count, 3, SIDE, SIDE, generator=made)}
    sizes = torch.tensor([SIZES[i % len(SIZES)] for i in range(count)])
    return {"pixel_values": torch.randn(count, 5, 3, SIDE, SIDE, generator=made), "image_sizes": sizes}


def lengths(model: Any, images: dict[str, torch.Tensor]) -> list[int]:
    """Vision tokens of each image, as the model itself makes them."""
    with torch.no_grad():
        return [len(features) for features in model.model.get_image_features(**images).pooler_output]


def batch(
    model: Any, rows: Sequence[Sequence[str]], padding: str = "left", seed: int = 0, bos: bool = True
) -> dict[str, torch.Tensor]:
    """A padded batch. Each row is a list of texts (a token a letter) and IMAGE marks; BOS is put in front of each."""
    count = sum(part == IMAGE for row in rows for part in row)
    images = _images(model, count, seed) if count else {}
    left = lengths(model, images) if count else []
    ids = []
    for row in rows:
        ids.append([BOS] if bos else [])
        for part in row:
            ids[-1] += [IMAGE_ID] * left.pop(0) if part == IMAGE else [8 + (ord(c) - 97) % 50 for c in part]
    width = max(map(len, ids))
    pads = [[PAD] * (width - len(row)) for row in ids]
    ones = [[1] * len(row) for row in ids]
    left_side = padding == "left"
    return {
        "input_ids": torch.tensor([p + row if left_side else row + p for p, row in zip(pads, ids, strict=True)]),
        "attention_mask": torch.tensor([p + row if left_side else row + p for p, row in zip(pads, ones, strict=True)]),
        **images,
    }


def real(inputs: dict[str, torch.Tensor], b: int) -> torch.Tensor:
    """Slots of row b that are not padding."""
    return inputs["attention_mask"][b].nonzero().squeeze(1)


def single(inputs: dict[str, torch.Tensor], b: int, model: Any) -> dict[str, torch.Tensor]:
    """Row b by itself: no padding, its own images."""
    real = inputs["attention_mask"][b].bool()
    out = {"input_ids": inputs["input_ids"][b : b + 1, real], "attention_mask": torch.ones(1, int(real.sum())).long()}
    if "pixel_values" not in inputs:
        return out
    images: dict[str, torch.Tensor] = {n: inputs[n] for n in ("pixel_values", "image_sizes") if n in inputs}
    here, rows = lengths(model, images), (inputs["input_ids"] == IMAGE_ID).sum(1).tolist()
    ends = torch.tensor([0, *here]).cumsum(0).tolist()
    start, stop = sum(rows[:b]), sum(rows[: b + 1])
    mine = [i for i in range(len(here)) if start <= ends[i] and ends[i + 1] <= stop]
    return {**out, **({name: value[mine] for name, value in images.items()} if mine else {})}


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    """Greedy, never the image token (transformers takes a decoded one for a placeholder)."""
    defaults = {"do_sample": False, "suppress_tokens": [IMAGE_ID], "pad_token_id": PAD}
    return model.generate(**inputs, **{**defaults, **kwargs})
