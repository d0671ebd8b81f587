"""A checkpoint of a family that no adapter was written for, on disk with its processor: a tiny Aya Vision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, AyaVisionProcessor, CLIPVisionConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from vtr.pocket.model import IDS
from vtr.pocket.processing import CHAT_TEMPLATE, make_tokenizer

SIDE, PATCH = 32, 4
"""Pixels of a tile's side and of a patch's. Two by two patches make a token: 16 of them a tile."""
MARKS = {"image_token": "<image>", "start": "<|START_OF_IMG|>", "end": "<|END_OF_IMG|>", "patch": "<|IMG_PATCH|>"}
TILES = ["TILE_GLOBAL", *(f"TILE_{i}" for i in range(1, 5))]


def processor() -> Any:
    """Pictures in up to four tiles and the whole, words of the pocket model."""
    tokenizer = make_tokenizer(IDS, MARKS)
    tokenizer.add_tokens(["TILE", *TILES])
    pictures = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return AyaVisionProcessor(
        pictures, tokenizer, patch_size=PATCH, img_size=SIDE, downsample_factor=2, chat_template=CHAT_TEMPLATE
    )


def model(words: Any) -> AyaVisionForConditionalGeneration:
    """Of random weights, with the ids of this tokenizer."""
    torch.manual_seed(0)
    text = dict(
        model_type="cohere2", vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=512, pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    ).to_dict()  # fmt: skip
    config = AyaVisionConfig(
        text_config=text, vision_config={**vision, "model_type": "siglip_vision_model"}, downsample_factor=2,
        image_token_id=words.convert_tokens_to_ids(MARKS["patch"]), alignment_intermediate_size=64,
    )  # fmt: skip
    return AyaVisionForConditionalGeneration(config).eval()


def write(folder: Path) -> str:
    """Save model and processor as ``from_pretrained`` finds them; returns the folder's name."""
    made = processor()
    model(made.tokenizer).save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)
