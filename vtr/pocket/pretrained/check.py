"""Is what was put together what the packages hold? Figures beside a second computation, and beside limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from . import reference
from .parts import Parts

TEXT = (
    "The sun is a star. It is the closest star to the Earth, and it gives us light and heat. Plants use the light of "
    "the sun to grow, and animals eat the plants. Without the sun there would be no life on our planet. The Earth "
    "moves around the sun once every year, and the moon moves around the Earth about once every month. At night we "
    "can see many other stars, but they are so far away that they look like small points of light."
)
"""English of ours, which a language model of this size finds easy."""
QUESTIONS = {"What is the capital of France?": "Paris", "What colour is the sky on a clear day?": "blue"}
WORDS = 24
"""Tokens of the text that are computed a second time."""


@dataclass(frozen=True)
class Figure:
    """One figure, and what it has to be below."""

    what: str
    value: float
    most: float

    @property
    def good(self) -> bool:
        return self.value <= self.most


@torch.inference_mode()
def figures(found: Parts, model: Any, processor: Any) -> list[Figure]:
    """Of the tower, the decoder as numbers and the decoder as a speaker, before anything trained is added."""
    side = model.config.vision_config.image_size[0]
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours = model.model.vision_tower(pixels).last_hidden_state[0].double().numpy()
    tower_off = abs(ours - reference.features(found.tower, pixels[0].double().numpy())).max() / abs(ours).max()
    ids = processor.tokenizer(TEXT, return_tensors="pt").input_ids
    logits = model(input_ids=ids).logits[0]
    theirs = reference.logits(found.decoder, ids[0, :WORDS].tolist())
    decoder_off = abs(logits[:WORDS].double().numpy() - theirs).max() / abs(theirs).max()
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()
    wrong = sum(word not in say(model, processor, question) for question, word in QUESTIONS.items())
    return [
        Figure("tower: largest difference to the formula, of the largest value", float(tower_off), 1e-4),
        Figure("decoder: largest difference to the formula, of the largest logit", float(decoder_off), 1e-4),
        Figure("decoder: perplexity of plain English", math.exp(loss), 12.0),
        Figure(f"decoder: wrong answers to {len(QUESTIONS)} easy questions", wrong, 0),
    ]


@torch.inference_mode()
def difference(fresh: Any, saved: Any) -> Figure:
    """How far the weights of a saved model are from those of one that was just put together."""
    ours, theirs = fresh.state_dict(), saved.state_dict()
    if ours.keys() != theirs.keys():
        return Figure("saved model: weights that the other does not have", len(ours.keys() ^ theirs.keys()), 0)
    off = max(float((value - theirs[name]).abs().max()) for name, value in ours.items())
    return Figure("saved model: largest difference to a fresh one", off, 1e-6)


@torch.inference_mode()
def say(model: Any, processor: Any, question: str, longest: int = 24) -> str:
    """The decoder's answer to a question without a picture."""
    turns = [{"role": "user", "content": question}]
    text = processor.tokenizer.apply_chat_template(
        turns, chat_template=processor.chat_template, add_generation_prompt=True, tokenize=False
    )
    inputs = processor.tokenizer(text, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    return str(processor.tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)).strip()
