"""A tiny random checkpoint in the layout of LLaVA's own package; batches for it and for its twin in transformers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests import tiny

INSTALLED = importlib.util.find_spec("llava") is not None
WHY = "LLaVA's own package is not installed: pip install --no-deps llava-torch"
IMAGE = -200
WORDS = 64
EOS = 2
SIDE, PATCH = tiny.SIDE, tiny.PATCH
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
"""Resolutions of canvases, (width, height)."""
SIZES = [(40, 40), (44, 20), (24, 48), (18, 30)]
"""(width, height) of a batch's images, in turn."""
MERGES: dict[str, dict[str, Any]] = {
    "square": {"mm_patch_merge_type": "flat", "image_aspect_ratio": "pad"},
    "anyres": {
        "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS,
    },
}  # fmt: skip


def checkpoint(folder: Path, kind: str, lm: str = "llama", words: int = WORDS, **settings: Any) -> Path:
    """Write one, its CLIP tower beside it. kind: a key of MERGES. words: size of the vocabulary."""
    from llava.model.language_model import llava_llama, llava_mistral

    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    size = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    CLIPImageProcessorPil(size=size[0], crop_size=size[1]).save_pretrained(folder / "tower")
    made, cls = {
        "llama": (llava_llama.LlavaConfig, llava_llama.LlavaLlamaForCausalLM),
        "mistral": (llava_mistral.LlavaMistralConfig, llava_mistral.LlavaMistralForCausalLM),
    }[lm]
    config = made(
        vocab_size=words, hidden_size=48, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
        mm_vision_tower=str(folder / "tower"), mm_hidden_size=32, mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2, mm_vision_select_feature="patch", tokenizer_padding_side="left",
        **{**MERGES[kind], **settings},
    )  # fmt: skip
    model = cls(config)
    for layer in model.model.layers:  # random weights attend almost evenly; selection would not matter
        layer.self_attn.q_proj.weight.data *= 8
        layer.self_attn.k_proj.weight.data *= 8
    if hasattr(model.model, "image_newline"):
        model.model.image_newline.data.normal_()
    model.save_pretrained(folder)
    return folder


def load(folder: Path, lm: str = "llama") -> Any:
    """As the package's own loader does: the model, then its tower."""
    from llava.model.language_model import llava_llama, llava_mistral

    cls = llava_llama.LlavaLlamaForCausalLM if lm == "llama" else llava_mistral.LlavaMistralForCausalLM
    model = cls.from_pretrained(folder, torch_dtype=torch.float32)
    model.get_vision_tower().load_model()
    return model.eval()


def twin(folder: Path, out: Path) -> Any:
    """The same weights in transformers' own classes."""
    from vtr.convert import convert_checkpoint

    made = convert_checkpoint("m3", folder, out)
    anyres = json.loads((folder / "config.json").read_text())["image_aspect_ratio"] == "anyres"
    cls = LlavaNextForConditionalGeneration if anyres else LlavaForConditionalGeneration
    return cls.from_pretrained(made.model).eval()


def letters(text: str) -> list[int]:
    return [8 + (ord(c) - 97) % 50 for c in text]


def batch(rows: Sequence[Sequence[str]], kind: str, seed: int = 0) -> dict[str, Any]:
    """Left-padded rows of texts and IMAGE marks, as the package takes them; one picture for a row without, too."""
    made = torch.Generator().manual_seed(seed)
    ids = [[1, *(t for part in row for t in ([IMAGE] if part == tiny.IMAGE else letters(part)))] for row in rows]
    width = max(map(len, ids))
    count = sum(max(row.count(IMAGE), 1) for row in ids)
    sizes = [SIZES[i % len(SIZES)] for i in range(count)]
    if kind == "square":
        images: Any = torch.randn(count, 3, SIDE, SIDE, generator=made)
    else:
        images = [torch.randn(tiles_of(size), 3, SIDE, SIDE, generator=made) for size in sizes]
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        "images": images,
        "image_sizes": sizes,
    }


def tiles_of(size: tuple[int, int]) -> int:
    from llava.mm_utils import get_anyres_image_grid_shape

    columns, rows = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    return 1 + rows * columns


def single(inputs: dict[str, Any], b: int) -> dict[str, Any]:
    """Row b by itself, without padding."""
    counts = [max(int(row.eq(IMAGE).sum()), 1) for row in inputs["input_ids"]]
    mine = slice(sum(counts[:b]), sum(counts[: b + 1]))
    real = inputs["attention_mask"][b].bool()
    return {
        "input_ids": inputs["input_ids"][b : b + 1, real],
        "attention_mask": torch.ones(1, int(real.sum())).long(),
        "images": inputs["images"][mine],
        "image_sizes": inputs["image_sizes"][mine],
    }


def for_twin(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same batch as transformers takes it: a placeholder for every vision token, no pictures without a row."""
    images = inputs["images"]
    owners = [b for b, row in enumerate(inputs["input_ids"]) for _ in range(max(int(row.eq(IMAGE).sum()), 1))]
    used = [i for i, b in enumerate(owners) if bool(inputs["input_ids"][b].eq(IMAGE).any())]
    if isinstance(images, Tensor):
        given = {"pixel_values": images[used]}
    else:
        most = max(len(images[i]) for i in used)
        given = {
            "pixel_values": torch.stack(
                [torch.cat([images[i], torch.zeros(most - len(images[i]), 3, SIDE, SIDE)]) for i in used]
            ),
            "image_sizes": torch.tensor([inputs["image_sizes"][i][::-1] for i in used]),
        }
    with torch.no_grad():
        counts = [len(tokens) for tokens in model.model.get_image_features(**given).pooler_output]
    rows = []
    for row, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        ids: list[int] = []
        for token in row[mask].tolist():
            ids += [model.config.image_token_id] * counts.pop(0) if token == IMAGE else [token]
        rows.append(ids)
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        **given,
    }
