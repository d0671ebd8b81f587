"""Puts tower, projector and decoder together and saves a plain folder that transformers loads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import SAYS, TRAINED, UNTRAINED, adapter, decoder, start, tower, wheels
from .check import Figure, figures
from .parts import Parts, parts

SIDE = 224
"""Pixels along a side of the picture: 16 × 16 patches, 64 tokens."""
SHUFFLE = 2
"""Patches along a side of a token."""
LONGEST = 32
"""Tokens of an answer, unless a call says otherwise."""


def assemble(found: Parts, side: int = SIDE) -> tuple[Any, Any]:
    """The model (float32, evaluation mode, nothing in it trained) and its processor.

    Raises:
        ValueError: the parts do not fit each other or a picture of ``side`` pixels.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    text, vision = decoder.config(found.decoder), tower.config(found.tower, side)
    across = side // vision.patch_size[0]
    if across % SHUFFLE:
        raise ValueError(f"side={side} gives {across} patches, which cannot be put together in twos")
    processor = make_processor(decoder.tokenizer(found.decoder), side, (across // SHUFFLE) ** 2)
    config = InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        downsample_ratio=1 / SHUFFLE,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state(found.tower, across))
    model.model.language_model.load_state_dict(decoder.state(found.decoder))
    model.tie_weights()
    start.start(model, start.pictures(processor))
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id = text.bos_token_id, text.eos_token_id
    settings.pad_token_id, settings.max_new_tokens, settings.do_sample = text.pad_token_id, LONGEST, False
    return model, processor


def make_processor(tokenizer: Any, side: int, tokens: int) -> Any:
    """InternVL's prompts and pixels. A picture of 448 pixels is four tiles and a thumbnail, a smaller one a tile."""
    from transformers import QianfanOCRProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    pictures = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, crop_to_patches=True, min_patches=1, max_patches=4,
        image_mean=list(tower.MEAN), image_std=list(tower.STD),
    )  # fmt: skip
    return QianfanOCRProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        image_seq_length=tokens,
        image_placeholder_token=decoder.CONTEXT,
        chat_template=decoder.CHAT_TEMPLATE,
    )


def save(
    model: Any, processor: Any, where: Path, packages: tuple[wheels.Package, ...] = (wheels.TOWER, wheels.DECODER),
    weights: Path | None = None,
) -> None:  # fmt: skip
    """Write the folder in one piece: whoever looks sees the old one or the whole new one.

    Args:
        weights: what was added to the model; a copy is kept in the folder.
    """
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where.parent) as fresh:
        new = Path(fresh) / "model"
        model.save_pretrained(new)
        processor.save_pretrained(new)
        if weights is not None:
            shutil.copy(weights, new / adapter.FILE)
        says = {
            "projector": UNTRAINED if weights is None else TRAINED,
            "packages": [asdict(package) for package in packages],
        }
        (new / SAYS).write_text(json.dumps(says, indent=1) + "\n", encoding="utf-8")
        if where.exists():
            shutil.rmtree(where)
        new.rename(where)


def make(where: Path, say: Callable[[str], None] = print, weights: Path | None = None) -> tuple[list[Figure], Any, Any]:
    """All of it: fetch, read, put together, check, save as ``where``/model.

    Args:
        weights: what ``train`` wrote, to be added; None adds nothing.

    Returns:
        the figures of the check, the model, the processor.
    """
    found = parts(where / "wheels", say=say)
    say("putting tower, projector and decoder together")
    with torch.no_grad():
        model, processor = assemble(found)
    say("checking them against the packages' own numbers")
    rows = figures(found, model, processor)
    if weights is not None:
        say(f"adding the trained projector and the decoder's trained changes of {weights}")
        adapter.put_on(model, adapter.load(weights))
    say(f"saving {where / 'model'}")
    save(model, processor, where / "model", weights=weights)
    return rows, model, processor
