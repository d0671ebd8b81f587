"""A task with long answers: list everything in the picture, region by region; about fifty words, order-free F1."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from .scenes import COLOR_NAMES, DIGITS, LETTERS, REGIONS, SHAPES, WORDS, Scene, scene_stream

QUESTION = "what is in the picture"
BEGINNING = "in the picture there are"
NAMES = {"digit": set(DIGITS), "word": set(WORDS)}

Item = tuple[str, str, str, str]
"""Region, colour, name and letter ("" without one) of an object."""


def answer(scene: Scene, rng: random.Random) -> str:
    """All objects by region in reading order, those of a region in random order.

    "in the picture there are top-left red star k top-left blue digit 7 top green word cat …": region, colour, shape
    (and its letter, if it has one) or kind and name. Each word can be looked up in the picture by the one before it.
    """
    words = BEGINNING.split()
    for region in REGIONS:
        here = [o for o in scene.objects if scene.region(o) == region]
        for o in rng.sample(here, len(here)):
            named = [o.name] if o.kind == "shape" else [o.kind, o.name]
            words += [region, o.color, *named, *([o.letter] if o.letter else [])]
    return " ".join(words)


def samples(n: int, split: str = "test", seed: int = 0) -> Iterator[dict[str, Any]]:
    """n pictures with the question and one right answer: dict(image, question, answer, type)."""
    for scene, rng in islice(scene_stream(split, f"{seed}-listing"), n):
        yield {"image": scene.image, "question": QUESTION, "answer": answer(scene, rng), "type": "listing"}


def items(text: str) -> Counter[Item]:
    """What an answer names. Words that make no object (a region or a colour without a name, …) are passed over."""
    found: Counter[Item] = Counter()
    parts: list[list[str]] = []
    for word in text.split():
        if word in REGIONS:
            parts.append([word])
        elif parts:
            parts[-1].append(word)
    for part in parts:
        region, color, kind, last, *_ = [*part, "", "", ""]
        if color in COLOR_NAMES and kind in SHAPES:
            found[region, color, kind, last if last in LETTERS else ""] += 1
        elif color in COLOR_NAMES and last in NAMES.get(kind, ()):
            found[region, color, last, ""] += 1
    return found


def f1(said: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the objects, all their properties right; order does not matter."""
    a, b = items(said), items(wanted)
    if not a or not b:
        return float(not a and not b)
    return 2 * sum((a & b).values()) / (sum(a.values()) + sum(b.values()))
