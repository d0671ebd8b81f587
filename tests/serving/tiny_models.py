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
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from vtr.testing.tiny import GRIDS, PATCH, SIDE

WORDS = [
    "what", "which", "where", "how", "many", "color", "shape", "is", "are", "the", "on", "in", "a", "of", "there",
    "picture", "circle", "red", "blue", "one", "two", "three",
]  # fmt: skip
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>"]
IDS = {word: i for i, word in enumerate(SPECIAL + WORDS)}
NEVER = [4, 5, 6, 7, 8]
PINPOINTS = [*GRIDS, [4 * SIDE, 4 * SIDE]]
TEMPLATE = (
    "{%- for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE {% elif part['type'] == 'text' %}"
    "{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def tokenizer(image: str) -> Any:
    """A token a word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"], padding_side="left", model_max_length=4096,
        extra_special_tokens={
            "image_token": image, "video_token": "<video>", "start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
    )  # fmt: skip
    return made


def _text(kind: type, layers: int = 4) -> Any:
    return kind(
        vocab_size=len(IDS), hidden_size=128, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip


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
    """Write a random checkpoint of ``family``; its attention is not flat, so that pictures matter."""
    torch.manual_seed(0)
    model, processor = MAKERS[family]()
    for layer in model.get_decoder().layers:
        for name in ("q_proj", "k_proj"):
            getattr(layer.self_attn, name).weight.data *= 8
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
