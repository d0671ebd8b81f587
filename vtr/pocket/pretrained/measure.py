"""How well the pretrained pocket model answers: greedy answers, compared word by word."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ..evaluate import accuracy
from . import drawings, train
from .canvases import samples

LONGEST = 12
"""Tokens of an answer."""


def row(name: str, model: Any, processor: Any, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of right answers to some questions, in all and by type."""
    found = accuracy(model, processor, asked, batch=16, name=name, longest=LONGEST)
    return {"shown": name, "questions": len(asked), "all": found.pop("all"), "by_type": found}


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
    found = [row("a style of drawing never seen", model, processor, asked)]
    others = [one["image"] for one in asked]
    random.Random(0).shuffle(others)
    wrong = [{**one, "image": other} for one, other in zip(asked, others, strict=True)]
    found.append(row("the picture of another question", model, processor, wrong))
    if photographs is not None:
        _, unseen = train.parted(drawings.photographs(photographs))
        asked = list(samples(limit, unseen, "measure"))
        found.append(row("photographs never seen", model, processor, asked))
    return found
