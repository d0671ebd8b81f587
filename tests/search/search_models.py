"""A few layers of the pocket model and small pictures: what searches are tested on, real processor and all."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import vtr
from vtr.search import Example


@lru_cache(maxsize=4)
def short(layers: int) -> tuple[Any, Any]:
    """The pocket model cut off behind so many layers, patched, and its processor."""
    model, processor = vtr.pocket.load()
    text = model.model.language_model
    text.layers = text.layers[:layers]
    model.config.text_config.num_hidden_layers = layers
    return vtr.patch(model), processor


@lru_cache(maxsize=4)
def questions(count: int, split: str = "val") -> tuple[Example, ...]:
    """Questions about pictures of one small crop (300 vision tokens); two of a picture stand together."""
    made = vtr.pocket.samples(count, split=split, per_scene=2)
    return tuple(Example(one["image"].resize((96, 96)), one["question"], one["answer"]) for one in made)
