"""Multiple choice: how such a question is put, and which choice a reply picks."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

Choices = Sequence[str] | None

LETTERS = string.ascii_uppercase
BY_LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's request behind the choices of a question."""


def with_choices(question: str, choices: Choices) -> str:
    """The question with its choices behind it, a letter each; the question alone where it has none."""
    if choices is None:
        return question
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, BY_LETTER])


def normalized(text: str) -> str:
    """Lower case, single spaces, no quotes, brackets or punctuation at either end."""
    return " ".join(text.casefold().split()).strip(" \t" + string.punctuation.translate({ord(c): None for c in "%$+-"}))


def picked(reply: str, choices: Choices) -> int | None:
    """The index of the choice a reply picks, by its text or its letter; None where it picks none or several.

    In this order: the reply is a choice's text; it is or begins with a letter (``B``, ``(B)``, ``B. …``); it says
    "answer is B" or "option B"; it contains exactly one choice's text. Without ``choices`` any letter A … Z counts.
    """
    count = len(choices) if choices is not None else len(LETTERS)
    said, texts = normalized(reply), [normalized(text) for text in choices or []]
    if texts.count(said) == 1:
        return texts.index(said)
    start = re.match(r"\s*[(\[]?([A-Za-z])(?:[)\].:,]|\s*$)", reply)
    stated = re.search(r"(?i:answer|option|choice)\b(?:\s+is)?\s*:?\s*[(\[]?([A-Z])\b", reply)
    for found in (start, stated):
        if found and LETTERS.index(found.group(1).upper()) < count:
            return LETTERS.index(found.group(1).upper())
    inside = [i for i, text in enumerate(texts) if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said)]
    return inside[0] if len(inside) == 1 else None


def letter_of(answer: str, choices: Sequence[str]) -> str:
    """The letter that a model is to say where :func:`with_choices` asks and ``answer`` (a text or a letter) is right.

    Raises:
        ValueError: it is none of the choices.
    """
    index = choices.index(answer) if choices.count(answer) == 1 else picked(answer, choices)
    if index is None:
        raise ValueError(f"the answer {answer!r} is none of the choices {list(choices)}")
    return LETTERS[index]
