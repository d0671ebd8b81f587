"""Tiny random models of the supported families and language models, and batches of rows made of letters and images.

They have random weights, sharp enough that the choice of tokens shows in the logits, and run in milliseconds. ``head``
is the size of an attention head; GPU kernels take multiples of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

IMAGE, VIDEO = "<image>", "<video>"
IMAGE_ID, VIDEO_ID, PAD, BOS = 5, 4, 0, 1
NEVER = [IMAGE_ID, VIDEO_ID]
"""Tokens that are not to be generated: transformers takes a decoded one for a placeholder."""
IMG, END_IMG = 6, 7
"""What stands around an image of InternVL."""
SIDE, PATCH, WINDOW, FRAMES = 24, 4, 40, 3
HEAD = 12
"""How wide a head is; a GPU's kernels take multiples of 8 alone."""
SIZES = [(40, 40), (20, 44), (48, 24), (30, 18)]
"""Pixel sizes (height, width) that a batch's AnyRes images take in turn; none fills its canvas."""
TILES = [5, 1, 3, 4]
"""Tiles (crops and thumbnail) that a batch's InternVL images take in turn."""
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl")
LMS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
_WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
}


def _text(lm: str, layers: int, head_dim: int = 12) -> Any:
    """Mistral has a sliding window in all layers, Qwen2 from layer 2 on; most rows are longer than it."""
    return LMS[lm](
        vocab_size=64, hidden_size=4 * head_dim, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=1024, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=None, **_WINDOWS.get(lm, {}),
    )  # fmt: skip


def _tower(kind: type, **settings: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return kind(**sizes, **settings)


def _ready(model: Any, attn: str) -> Any:
    for layer in model.get_decoder().layers:  # random weights attend almost evenly; selection would not matter
        attention = layer.self_attn
        for kind in ("q", "k"):
            if hasattr(attention, f"{kind}_norm"):  # Qwen3: queries and keys are normalised
                getattr(attention, f"{kind}_norm").weight.data *= 1.5
            else:
                getattr(attention, f"{kind}_proj").weight.data *= 8
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    return model.eval()


def llava(attn: str = "sdpa", layers: int = 5, seed: int = 0, lm: str = "llama", head_dim: int = HEAD) -> Any:
    """LLaVA-1.5, grouped queries: 36 vision tokens an image."""
    torch.manual_seed(seed)
    vision = _tower(CLIPVisionConfig, image_size=SIDE, patch_size=PATCH, projection_dim=32)
    config = LlavaConfig(vision_config=vision, text_config=_text(lm, layers, head_dim), image_token_index=IMAGE_ID)
    return _ready(LlavaForConditionalGeneration(config), attn)


def llava_next(attn: str = "sdpa", layers: int = 5, seed: int = 0, lm: str = "llama", head_dim: int = HEAD) -> Any:
    """LLaVA-NeXT: thumbnail, up to four crops, newline tokens."""
    torch.manual_seed(seed)
    vision = _tower(CLIPVisionConfig, image_size=SIDE, patch_size=PATCH, projection_dim=32)
    text = _text(lm, layers, head_dim)
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_grid_pinpoints=GRIDS
    )
    return _ready(LlavaNextForConditionalGeneration(config), attn)


def llava_onevision(attn: str = "sdpa", layers: int = 5, seed: int = 0, lm: str = "llama", head_dim: int = HEAD) -> Any:
    """LLaVA-OneVision over SigLIP: canvases of more than two tiles are scaled down; a video frame has 3 × 3 tokens."""
    torch.manual_seed(seed)
    vision = _tower(SiglipVisionConfig, image_size=SIDE, patch_size=PATCH, vision_use_head=False)
    text = _text(lm, layers, head_dim)
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, video_token_index=VIDEO_ID,
        image_grid_pinpoints=GRIDS, vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    return _ready(LlavaOnevisionForConditionalGeneration(config), attn)


def internvl(attn: str = "sdpa", layers: int = 5, seed: int = 0, lm: str = "llama", head_dim: int = HEAD) -> Any:
    """InternVL: pixel shuffle leaves 9 tokens a tile, the thumbnail comes last."""
    torch.manual_seed(seed)
    vision = _tower(InternVLVisionConfig, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    config = InternVLConfig(vision_config=vision, text_config=_text(lm, layers, head_dim), image_token_id=IMAGE_ID)
    return _ready(InternVLForConditionalGeneration(config), attn)


def _images(model: Any, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Random pixels for ``count`` images, with sizes for AnyRes models; a seed other than 0 draws the sizes too."""
    made, kind = torch.Generator().manual_seed(seed), model.config.model_type
    if kind in ("llava", "internvl"):
        count = count if kind == "llava" else sum(_tiles(count, seed))
        return {"pixel_values": torch.randn(count, 3, SIDE, SIDE, generator=made)}
    sizes = torch.tensor([SIZES[i % len(SIZES)] for i in range(count)])
    sizes = torch.randint(10, 60, (count, 2), generator=made) if seed else sizes
    return {"pixel_values": torch.randn(count, 5, 3, SIDE, SIDE, generator=made), "image_sizes": sizes}


def _tiles(count: int, seed: int) -> list[int]:
    """How many tiles each of ``count`` InternVL images has."""
    return [TILES[(i + seed) % len(TILES)] for i in range(count)]


def _videos(count: int, seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed + 1)
    return {"pixel_values_videos": torch.randn(count, FRAMES, 3, SIDE, SIDE, generator=made)}


def features(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Vision tokens [n, D] of each image (of each tile, for InternVL), as the model itself makes them."""
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    return list(model.model.get_image_features(**images).pooler_output)


def lengths(model: Any, images: dict[str, torch.Tensor]) -> list[int]:
    """Vision tokens of each image (of each tile, for InternVL)."""
    with torch.no_grad():
        return [len(tokens) for tokens in features(model, images)]


def batch(
    model: Any, rows: Sequence[Sequence[str]], padding: str = "left", seed: int = 0, bos: bool = True
) -> dict[str, torch.Tensor]:
    """A padded batch. Each row is a list of texts (a token a letter), IMAGE and VIDEO marks; BOS is put in front."""
    count, videos = (sum(part == mark for row in rows for part in row) for mark in (IMAGE, VIDEO))
    images = _images(model, count, seed) if count else {}
    framed = model.config.model_type == "internvl"
    left = [9 * tiles for tiles in _tiles(count, seed)] if framed else lengths(model, images) if count else []
    ids = []
    for row in rows:
        ids.append([BOS] if bos else [])
        for part in row:
            if part == IMAGE:
                ids[-1] += [IMG] * framed + [IMAGE_ID] * left.pop(0) + [END_IMG] * framed
            elif part == VIDEO:
                ids[-1] += [VIDEO_ID] * (FRAMES * 9 + 1)
            else:
                ids[-1] += [8 + (ord(c) - 97) % 50 for c in part]
    width = max(map(len, ids))
    pads = [[PAD] * (width - len(row)) for row in ids]
    ones = [[1] * len(row) for row in ids]
    left_side = padding == "left"
    return {
        "input_ids": torch.tensor([p + row if left_side else row + p for p, row in zip(pads, ids, strict=True)]),
        "attention_mask": torch.tensor([p + row if left_side else row + p for p, row in zip(pads, ones, strict=True)]),
        **images,
        **(_videos(videos, seed) if videos else {}),
    }


def real(inputs: dict[str, torch.Tensor], b: int) -> torch.Tensor:
    """Slots of row b that are not padding."""
    return inputs["attention_mask"][b].nonzero().squeeze(1)


def single(inputs: dict[str, torch.Tensor], b: int, model: Any) -> dict[str, torch.Tensor]:
    """Row b by itself: no padding, its own images and videos."""
    real = inputs["attention_mask"][b].bool()
    out = {"input_ids": inputs["input_ids"][b : b + 1, real], "attention_mask": torch.ones(1, int(real.sum())).long()}
    if "pixel_values" in inputs:
        mine = _of_row(inputs["input_ids"] == IMAGE_ID, b, lengths(model, inputs))
        names = [name for name in ("pixel_values", "image_sizes") if name in inputs]
        out.update({name: inputs[name][mine] for name in names} if mine else {})
    if "pixel_values_videos" in inputs:
        videos = inputs["pixel_values_videos"]
        mine = _of_row(inputs["input_ids"] == VIDEO_ID, b, [FRAMES * 9 + 1] * len(videos))
        out.update({"pixel_values_videos": videos[mine]} if mine else {})
    return out


def _of_row(marks: torch.Tensor, b: int, lengths: list[int]) -> list[int]:
    """Which of the features of these ``lengths`` fill the marks of row b."""
    rows = marks.sum(1).tolist()
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    start, stop = sum(rows[:b]), sum(rows[: b + 1])
    return [i for i in range(len(lengths)) if start <= ends[i] and ends[i + 1] <= stop]


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    """Greedy, never the image token (transformers takes a decoded one for a placeholder)."""
    defaults = {"do_sample": False, "suppress_tokens": NEVER, "pad_token_id": PAD}
    return model.generate(**inputs, **{**defaults, **kwargs})
