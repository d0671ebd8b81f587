"""A task with long answers: list everything in the picture, region by region. About fifty words, order-free F1."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from .scenes import COLOR_NAMES, DIGITS, LETTERS, REGIONS, SHAPES, WORDS, Scene, scene_stream

QUESTION = "what is in the picture"
NAMES = {"digit": set(DIGITS), "word": set(WORDS)}

Item = tuple[str, str, str, str]
"""Region, colour, name and letter ("" without one) of an object."""


def answer(scene: Scene, rng: random.Random) -> str:
    """All objects: every region in reading order, then what lies in it, in random order.

    "top-left a red star k a blue digit 7 top a green word cat …": a shape with its letter, if it has one.
    """
    words: list[str] = []
    for region in REGIONS:
        words.append(region)
        here = [o for o in scene.objects if scene.region(o) == region]
        for o in rng.sample(here, len(here)):
            words += [
                "a",
                o.color,
                o.name if o.kind == "shape" else f"{o.kind} {o.name}",
                *([o.letter] if o.letter else []),
            ]
    return " ".join(words)


def samples(n: int, split: str = "test", seed: int = 0) -> Iterator[dict[str, Any]]:
    """n pictures with the question and one right answer: dict(image, question, answer, type)."""
    for scene, rng in islice(scene_stream(split, f"{seed}-listing"), n):
        yield {"image": scene.image, "question": QUESTION, "answer": answer(scene, rng), "type": "listing"}


def items(text: str) -> Counter[Item]:
    """What an answer names. Words that make no object (a colour without a name, …) are passed over."""
    found: Counter[Item] = Counter()
    region, part = "", []
    for word in [*text.split(), "a"]:
        if word != "a" and word not in REGIONS:
            part.append(word)
            continue
        color, kind, *more = [*part, "", ""]
        if region and color in COLOR_NAMES:
            if kind in SHAPES:
                found[region, color, kind, more[0] if more[0] in LETTERS else ""] += 1
            elif more[0] in NAMES.get(kind, ()):
                found[region, color, more[0], ""] += 1
        part = []
        region = region if word == "a" else word
    return found


def f1(said: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the objects, all their properties right; order does not matter."""
    a, b = items(said), items(wanted)
    if not a or not b:
        return float(not a and not b)
    return 2 * sum((a & b).values()) / (sum(a.values()) + sum(b.values()))
