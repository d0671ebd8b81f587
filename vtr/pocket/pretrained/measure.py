"""How well the pretrained pocket model answers: greedy answers, compared word by word."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import drawings, train
from .canvases import samples

BATCH = 16


@torch.inference_mode()
def answers(model: Any, processor: Any, questions: Sequence[str], pictures: Sequence[Any]) -> list[str]:
    """Greedy answers without reduction."""
    from vtr.chat import encode

    inputs = encode(processor, questions, pictures)
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    said = processor.tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [one.strip() for one in said]


def row(name: str, model: Any, processor: Any, asked: list[dict[str, Any]], pictures: list[Any]) -> dict[str, Any]:
    """The share of right answers to some questions, in all and by type."""
    right: dict[str, list[bool]] = defaultdict(list)
    for at in tqdm(range(0, len(asked), BATCH), desc=name):
        some = asked[at : at + BATCH]
        said = answers(model, processor, [one["question"] for one in some], pictures[at : at + BATCH])
        for one, answer in zip(some, said, strict=True):
            right[one["type"]].append(answer == one["answer"])
    every = [good for some in right.values() for good in some]
    by_type = {kind: sum(some) / len(some) for kind, some in sorted(right.items())}
    return {"shown": name, "questions": len(every), "all": sum(every) / len(every), "by_type": by_type}


def measure(limit: int, photographs: Path | None) -> list[dict[str, Any]]:
    """A row for the held-out style, one with pictures of other questions, and one for photographs where they are.

    Args:
        limit: questions a row. photographs: the folder of Tux Paint's stamps.

    Raises:
        ValueError: the model is not built, or no photographs are in the folder.
    """
    from vtr import pocket

    model, processor = pocket.load("pretrained")
    asked = list(samples(limit, drawings.held_out(), "measure"))
    pictures = [one["image"] for one in asked]
    found = [row("a style of drawing never seen", model, processor, asked, pictures)]
    others = pictures[:]
    random.Random(0).shuffle(others)
    found.append(row("the picture of another question", model, processor, asked, others))
    if photographs is not None:
        _, unseen = train.parted(drawings.photographs(photographs))
        asked = list(samples(limit, unseen, "measure"))
        found.append(row("photographs never seen", model, processor, asked, [one["image"] for one in asked]))
    return found
