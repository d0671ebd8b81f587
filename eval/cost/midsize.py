"""LLaVA-1.5 models of any size with random weights, and prompts for them: what the engine is timed on.

Times do not depend on what the weights say, only on their shapes. The vision tower is a stub of one narrow layer that
gives as many tokens as asked for, so that all the work is in the text model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

PAD, IMAGE_ID, FIRST_LETTER = 0, 3, 8
"""Ids of padding, of a vision token's placeholder, and the first id that prompts take for text."""
PATCH = 2
"""Pixels a patch: the tower looks at tiny pictures."""


@dataclass(frozen=True)
class Size:
    """Shapes of a model and of what it is asked.

    Attributes:
        layers, hidden_size, intermediate_size, heads, vocab_size: of the text model (as in ``LlamaConfig``).
        side: an image is side × side vision tokens. text_tokens: stand behind it.
        decode_tokens: how many tokens are decoded where the result says 64, 512 and 2048.
        repeats: timed runs of each prefill.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    side: int
    text_tokens: int = 64
    vocab_size: int = 1024
    decode_tokens: tuple[int, int, int] = (64, 512, 2048)
    repeats: int = 3

    @property
    def vision_tokens(self) -> int:
        return self.side**2


SMALL = Size(8, 512, 1408, 8, side=24, decode_tokens=(64, 96, 192), repeats=5)
MIDSIZE = Size(16, 1024, 2816, 16, side=45)
LLAVA_7B = Size(32, 4096, 11008, 32, side=24, vocab_size=32064, repeats=10)


NARROW = MappingProxyType(
    {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
)
"""The vision tower that gives its tokens and does nothing else."""


def build(
    size: Size, device: str, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0,
    tower: Mapping[str, Any] = NARROW,
) -> Any:  # fmt: skip
    """A random ``LlavaForConditionalGeneration``, its weights drawn on ``device`` and in ``dtype`` from the start.

    tower: what ``CLIPVisionConfig`` is to say of the vision tower.
    """
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        **tower, projection_dim=32,
        image_size=size.side * PATCH, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=size.vocab_size, hidden_size=size.hidden_size, intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, max_position_embeddings=65536,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    return model.eval()


def twin(model: Any) -> Any:
    """The model once more, on the same weights: patching one leaves the other as it is, at no memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def padded(
    rows: Sequence[tuple[int, int]], vision_tokens: int, vocab_size: int, draw: torch.Generator
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, padded on the left.

    Args:
        rows: how many images each begins with, and how many random text tokens follow. vision_tokens: of an image.
    """
    ids = [
        [IMAGE_ID] * (vision_tokens * images)
        + torch.randint(FIRST_LETTER, vocab_size, (text,), generator=draw).tolist()
        for images, text in rows
    ]
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
    }


def prompts(model: Any, size: Size, rows: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """A left-padded batch. Each row: how many images it begins with, and how many text tokens follow."""
    draw = torch.Generator().manual_seed(seed)
    out = padded(rows, size.vision_tokens, size.vocab_size, draw)
    if count := sum(images for images, _ in rows):
        pixels = torch.randn(count, 3, size.side * PATCH, size.side * PATCH, generator=draw)
        out["pixel_values"] = pixels.to(model.dtype)
    return {name: value.to(model.device) for name, value in out.items()}


def row_of(inputs: dict[str, torch.Tensor], b: int) -> dict[str, torch.Tensor]:
    """Row ``b`` of a batch by itself: no padding, its own image."""
    real = inputs["attention_mask"][b].bool()
    out = {
        "input_ids": inputs["input_ids"][b : b + 1, real],
        "attention_mask": inputs["attention_mask"][b : b + 1, real],
    }
    has_image = (inputs["input_ids"] == IMAGE_ID).any(1)
    if has_image[b]:
        i = int(has_image[:b].sum())
        out["pixel_values"] = inputs["pixel_values"][i : i + 1]
    return out
