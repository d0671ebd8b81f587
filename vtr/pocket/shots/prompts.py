"""Prompts of several pictures whose labels have to be learnt from the prompt itself.

A prompt has K demonstrations (a picture, a question, an answer) and a query of the same type about another picture. The
answers are *remapped*: one permutation of the type's words a prompt, so that "red" may stand for green throughout it.
Who does not read the demonstrations is right by chance only, once in eight.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..scenes import COLOR_NAMES, SHAPES, _all_questions, scene_stream

WORDS = {"color": COLOR_NAMES, "shape": SHAPES}
"""The types of question that are asked here, and the words that answer them."""
CHANCE = 1 / 8
DEMONSTRATED = 160
"""Scenes that demonstrations are drawn from."""


@dataclass(frozen=True)
class Example:
    """A picture with a question and its answer; ``answer`` is remapped, ``seen`` is what the picture shows."""

    image: Any
    question: str
    answer: str
    seen: str


@dataclass(frozen=True)
class Prompt:
    """Demonstrations and a query of one type."""

    type: str
    demonstrations: tuple[Example, ...]
    query: Example


def remapping(rng: random.Random, words: list[str]) -> dict[str, str]:
    """One permutation of the words, drawn; a word may keep its meaning."""
    return dict(zip(words, rng.sample(words, len(words)), strict=True))


@functools.lru_cache(maxsize=4)
def _pool(split: str, seed: int) -> dict[str, dict[str, list[tuple[Any, str]]]]:
    """Type → answer → pictures with a question of that answer; of scenes that no query is about."""
    found: dict[str, dict[str, list[tuple[Any, str]]]] = {t: defaultdict(list) for t in WORDS}
    stream = scene_stream(split, f"{seed}-demonstrations")
    for _ in range(DEMONSTRATED):
        scene, rng = next(stream)
        asked = _all_questions(scene, rng)
        for kind, by_answer in found.items():
            for q in asked[kind]:
                by_answer[q.answer].append((scene.image, q.text))
    return found


def prompts(n: int, shots: int, split: str = "test", seed: int = 0) -> Iterator[Prompt]:
    """n prompts with ``shots`` demonstrations each.

    The n-th query, its remapping and the order in which words are demonstrated depend on ``seed`` alone: those of fewer
    shots are among those of more. The word that the query asks for is demonstrated first, then each other word once,
    then all again (so eight shots show all words); then the demonstrations are shuffled.
    """
    stream = scene_stream(split, f"{seed}-queries")
    for number in range(n):
        rng = random.Random(f"{split}-{seed}-{number}")
        kind = list(WORDS)[number % len(WORDS)]
        query = None
        while query is None:
            scene, scene_rng = next(stream)
            asked = _all_questions(scene, scene_rng)[kind]
            query = rng.choice(asked) if asked else None
        new = remapping(rng, WORDS[kind])
        others = [word for word in WORDS[kind] if word != query.answer]
        shown = [query.answer, *rng.sample(others, len(others))]
        pool, drawn = _pool(split, seed)[kind], []
        for i in range(shots):
            word = shown[i % len(shown)]
            image, text = rng.choice(pool[word])
            drawn.append(Example(image, text, new[word], word))
        random.Random(f"{split}-{seed}-{number}-{shots}").shuffle(drawn)
        yield Prompt(kind, tuple(drawn), Example(scene.image, query.text, new[query.answer], query.answer))


def turns(prompt: Prompt) -> list[dict[str, Any]]:
    """The prompt as a conversation for a chat template: each demonstration a turn of the user, its answer the
    assistant's."""
    said: list[dict[str, Any]] = []
    for one in prompt.demonstrations:
        said.append(_asked(one.question))
        said.append({"role": "assistant", "content": [{"type": "text", "text": one.answer}]})
    return [*said, _asked(prompt.query.question)]


def pictures(prompt: Prompt) -> list[Any]:
    """The prompt's pictures, in order; the query's is the last."""
    return [*(one.image for one in prompt.demonstrations), prompt.query.image]


def _asked(question: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
