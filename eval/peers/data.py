"""What all workers are given: questions, pictures, the pocket model's language model alone, and merged embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from vtr.eval.cost.engine import merged
from vtr.eval.studies.budgets import tokenize

import vtr

SHAPES = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.5, 0.5))
"""Of the probes' pictures: shares of width and height, so that their prompts have very different lengths."""


def probes(samples: Sequence[dict[str, Any]], n: int = 8) -> list[dict[str, Any]]:
    """Questions about cropped pictures: right answers are not expected, equal ones (alone, in a batch) are."""
    out = []
    for i in range(n):
        sample, (x, y) = samples[i % len(samples)], SHAPES[i % len(SHAPES)]
        width, height = sample["image"].size
        out.append({**sample, "image": sample["image"].crop((0, 0, int(width * x), int(height * y)))})
    return out


def export(folder: Path, n: int, seed: int) -> list[dict[str, Any]]:
    """Write ``n`` held-out questions and eight probes into ``folder``, for workers without vtr; returns them.

    ``questions.json`` (question, answer, picture's file, length, where the picture ends), ``language_model/`` (a
    LlamaForCausalLM) and ``embeddings.safetensors`` (per question float32 [length, hidden size], as they enter it).
    """
    model, processor = vtr.pocket.load()
    samples = list(vtr.pocket.samples(n, split="test", seed=seed))
    samples += probes(samples)
    entries: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    files: dict[int, str] = {}
    for i, sample in enumerate(tqdm(samples, desc="embeddings")):
        picture = sample["image"]
        if id(picture) not in files:
            files[id(picture)] = f"{len(files):04d}.png"
            picture.save(folder / files[id(picture)])
        inputs = tokenize(processor, [sample])
        end = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero().max()) + 1
        with torch.inference_mode():
            tensors[str(i)] = merged(model, inputs)[0].contiguous()
        entries.append(
            {
                "question": sample["question"],
                "answer": sample["answer"],
                "picture": files[id(picture)],
                "length": inputs["input_ids"].shape[1],
                "picture_ends": end,
            }
        )
    (folder / "questions.json").write_text(json.dumps(entries))
    save_file(tensors, str(folder / "embeddings.safetensors"))
    language_model(model).save_pretrained(folder / "language_model")
    return entries


def language_model(model: Any) -> Any:
    """The text model and head of a LLaVA as a LlamaForCausalLM with the same weights."""
    from transformers import LlamaForCausalLM

    alone = LlamaForCausalLM(model.config.text_config)
    alone.model.load_state_dict(model.get_decoder().state_dict())
    alone.lm_head.weight = model.lm_head.weight
    alone.generation_config = model.generation_config
    return alone.eval()
