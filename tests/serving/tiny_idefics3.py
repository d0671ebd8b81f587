"""Random Idefics3 and SmolVLM checkpoints with processors, small enough to serve in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.serving.tiny_words import BASIC, TEMPLATE, WORDS, save, text, tokenizer

PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *PLACES]
IMAGE = 4
NEVER = list(range(IMAGE, IMAGE + len(SPECIAL)))
TILE, PATCH = 32, 4
TOKENS = (TILE // PATCH // 2) ** 2
"""Of a tile."""


def _processor(family: str) -> Any:
    import transformers

    words = tokenizer(SPECIAL, additional_special_tokens=SPECIAL)
    settings: Any = {"image_seq_len": TOKENS, "chat_template": TEMPLATE.replace("IMAGE", "<image>")}
    sizes = {"size": {"longest_edge": 3 * TILE}, "max_image_size": {"longest_edge": TILE}}
    if family == "smolvlm":
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        pictures = SmolVLMImageProcessorPil(**sizes)
        return transformers.SmolVLMProcessor(pictures, words, transformers.SmolVLMVideoProcessor(), **settings)
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return transformers.Idefics3Processor(Idefics3ImageProcessorPil(**sizes), words, **settings)


def save_idefics3(family: str, folder: Path) -> Path:
    """Write a random checkpoint of ``family``: "idefics3" or "smolvlm"."""
    import transformers

    torch.manual_seed(0)
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[family]
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": TILE, "patch_size": PATCH,
    }  # fmt: skip
    decoder = text(transformers.LlamaConfig, len(BASIC) + len(SPECIAL) + len(WORDS))
    config = getattr(transformers, name + "Config")(
        vision_config=vision, text_config=decoder.to_dict(), image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    save(getattr(transformers, name + "ForConditionalGeneration")(config), _processor(family), folder)
    return folder
