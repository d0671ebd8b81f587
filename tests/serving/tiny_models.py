"""Random LLaVA, LLaVA-OneVision and InternVL checkpoints with processors, small enough to serve in a test."""

from __future__ import annotations

from pathlib import Path
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
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.serving import tiny_words
from tests.serving.tiny_words import TEMPLATE
from vtr.testing.tiny import GRIDS, PATCH, SIDE

SPECIAL = ["<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>"]
NEVER = [4, 5, 6, 7, 8]
PINPOINTS = [*GRIDS, [4 * SIDE, 4 * SIDE]]


def tokenizer(image: str) -> Any:
    """With ``image`` for a picture."""
    names = {
        "image_token": image, "video_token": "<video>", "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }  # fmt: skip
    return tiny_words.tokenizer(SPECIAL, extra_special_tokens=names)


def _text(kind: type) -> Any:
    return tiny_words.text(kind, len(tiny_words.vocabulary(SPECIAL)))


def _vision(kind: type, **settings: Any) -> Any:
    return kind(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, **settings)


def _llava() -> tuple[Any, Any]:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = _vision(CLIPVisionConfig, image_size=SIDE, patch_size=PATCH, projection_dim=64)
    config = LlavaConfig(vision_config=vision, text_config=_text(LlamaConfig), image_token_index=4)
    square = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(size=square, crop_size=square)
    processor = LlavaProcessor(
        pictures, tokenizer("<image>"), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    vision = _vision(SiglipVisionConfig, image_size=SIDE, patch_size=PATCH, vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=_text(Qwen2Config), image_token_index=4, video_token_index=5,
        image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    square = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=PINPOINTS), tokenizer("<image>"),
        LlavaOnevisionVideoProcessor(size=square), num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full", chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    vision = _vision(InternVLVisionConfig, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    config = InternVLConfig(vision_config=vision, text_config=_text(Qwen2Config), image_token_id=8)
    square = {"height": SIDE, "width": SIDE}
    processor = InternVLProcessor(
        GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer("<image>"), InternVLVideoProcessor(size=square), image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), processor


def save_pocket_internvl(folder: Path, whole: bool = False) -> Path:
    """The shipped pocket InternVL as vLLM wants it: with InternVL's own processor (which needs torchvision), and unless
    ``whole`` without the tower's last layer, behind which vLLM would look.
    """
    from transformers import AutoTokenizer, InternVLProcessor, InternVLVideoProcessor

    import vtr

    model, shipped = vtr.pocket.load("internvl")
    words = AutoTokenizer.from_pretrained(model.name_or_path, extra_special_tokens={"video_token": "<unk>"})
    processor = InternVLProcessor(
        shipped.image_processor, words, InternVLVideoProcessor(size=shipped.image_processor.size),
        image_seq_length=shipped.image_seq_length, chat_template=shipped.chat_template,
    )  # fmt: skip
    if not whole:
        del model.model.vision_tower.encoder.layer[-1]
        model.config.vision_config.num_hidden_layers -= 1
        model.config.vision_feature_layer = -1
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


MAKERS = {"llava": _llava, "llava_onevision": _llava_onevision, "internvl": _internvl}


def save(family: str, folder: Path) -> Path:
    """Write a random checkpoint of ``family``."""
    torch.manual_seed(0)
    tiny_words.save(*MAKERS[family](), folder)
    return folder
