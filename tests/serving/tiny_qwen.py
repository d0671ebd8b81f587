"""Random Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints with processors, small enough to serve in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.serving.tiny_words import BASIC, TEMPLATE, WORDS, save, text, tokenizer

SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
IMAGE, VIDEO, START, END = range(4, 8)
NEVER = [IMAGE, VIDEO, START, END]
PATCH, LEAST, MOST = 4, 16 * 16, 128 * 128
NAMES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}


def _config(family: str) -> Any:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    if family == "qwen3_vl":
        rope["mrope_interleaved"] = True
    wide = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128}
    more: dict[str, Any] = {
        "qwen2_vl": {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2},
        "qwen2_5_vl": {**wide, "window_size": 16, "fullatt_block_indexes": [1]},
        "qwen3_vl": {**wide, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    }[family]
    words = len(BASIC) + len(SPECIAL) + len(WORDS)
    return getattr(transformers, NAMES[family] + "Config")(
        text_config=text(dict, words, rope_parameters=rope),
        vision_config={
            "depth": 3, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, **more,
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip


def _processor(family: str) -> Any:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    grid = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": LEAST, "longest_edge": MOST}
    pictures = Qwen2VLImageProcessorPil(size=size, **grid)
    video = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    names = {
        "image_token": SPECIAL[0], "video_token": SPECIAL[1], "vision_bos_token": SPECIAL[2],
        "vision_eos_token": SPECIAL[3],
    }  # fmt: skip
    return getattr(transformers, NAMES[family] + "Processor")(
        pictures, tokenizer(SPECIAL, extra_special_tokens=names), getattr(transformers, video)(size=size, **grid),
        chat_template=TEMPLATE.replace("IMAGE", " ".join((SPECIAL[2], SPECIAL[0], SPECIAL[3]))),
    )  # fmt: skip


def save_qwen(family: str, folder: Path) -> Path:
    """Write a random checkpoint of ``family``."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, NAMES[family] + "ForConditionalGeneration")(_config(family))
    save(model, _processor(family), folder)
    return folder
