"""Prompts with images for a model without its tower: placeholders are painted, decoded tokens are given.

Whatever a vision tower would say, the decoder gets an embedding of its own for every placeholder; and the tokens that
``generate`` writes are forced, so that two runs cannot part at a near-tie.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList
from vtr.integrations.internvl import runs_of
from vtr.integrations.llava import tile_layout
from vtr.integrations.structural import IMAGE_IDS, VIDEO_IDS

from vtr.image import Layout

Inputs = dict[str, torch.Tensor]
RULED_OUT = 1e9
"""Logits of tokens that a model never says are below minus this."""
STEPS = 4
"""Tokens that are decoded."""


def marks(model: Any) -> tuple[int, ...]:
    """Ids of the placeholders of a model's config, an image's first; empty if it names none."""
    found = []
    for names in (IMAGE_IDS, VIDEO_IDS):
        found += [value for name in names if isinstance(value := getattr(model.config, name, None), int)][:1]
    return tuple(dict.fromkeys(found))


class Paint:
    """A forward hook on the input embedding: the n-th placeholder of a row gets the n-th vector of that row's own.

    A row is known by its first token that is not padding, so that it is painted alike in every batch. Some models look
    up another id where a placeholder stands, so the ids are those that the whole model was called with.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = torch.tensor(ids)
        self.vectors: dict[int, torch.Tensor] = {}
        self.called_with: torch.Tensor | None = None

    def note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook on the whole model."""
        self.called_with = args[0] if args else kwargs.get("input_ids")

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, out: torch.Tensor) -> torch.Tensor | None:
        ids = args[0] if args else kwargs.get("input")
        if ids is not None and self.called_with is not None and self.called_with.shape == ids.shape:
            ids = self.called_with
        if ids is None or ids.dim() != 2 or out.dim() != 3 or not (hit := torch.isin(ids, self.ids)).any():
            return None
        out = out.clone()
        for row in range(len(ids)):
            where = hit[row].nonzero()[:, 0]
            out[row, where] = self.of(int(ids[row][ids[row] != 0][0]), module, out.shape[-1])[: len(where)].to(out)
        return out

    def of(self, name: int, module: Any, size: int) -> torch.Tensor:
        """The vectors of the row that begins with this token: float [128, size]."""
        if name not in self.vectors:
            drawn = torch.randn(128, size, generator=torch.Generator().manual_seed(name))
            self.vectors[name] = drawn * float(module.weight.std())
        return self.vectors[name]


def paint(model: Any) -> Any:
    """Have the model's placeholders painted from now on; returns the hook's handle."""
    made = Paint(marks(model))
    model.register_forward_pre_hook(made.note, with_kwargs=True)
    return model.get_input_embeddings().register_forward_hook(made, with_kwargs=True)


def by_runs(model: Any) -> None:
    """Have a patched model read every run of placeholders as one image, whatever its family's adapter asks of a call.

    A family with an adapter of its own wants the pictures that painted placeholders do not have. The adapter itself,
    which all models of a family share, stays as it is.
    """
    patch = model.__dict__["_vtr"]
    own = copy.copy(patch.adapter)
    own.layouts = layouts
    patch.adapter = patch.choice.adapter = own


def layouts(model: Any, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
    """Per placeholder id one layout per run of it: a square, or a row."""
    runs = {mark: runs_of(inputs["input_ids"] == mark) for mark in marks(model)}
    return {
        mark: [tile_layout(*_grid(end - start)) for _, start, end in found] for mark, found in runs.items() if found
    }


def _grid(count: int) -> tuple[int, int]:
    side = math.isqrt(count)
    return (side, side) if side * side == count else (1, count)


class Forced(LogitsProcessor):
    """Decode tokens 70, 71, … whatever the logits say."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(scores, -torch.inf)
        out[:, 70 + self.step] = 0.0
        self.step += 1
        return out


def prompts(mark: int) -> list[list[int]]:
    """Three rows: one image of 16 tokens; two images of 9 and 7; none. Each begins with another token."""
    one = [10, 20, 21, *[mark] * 16, 22, 23, 24, 25]
    two = [11, 30, *[mark] * 9, 31, 32, *[mark] * 7, 33, 34, 35, 36, 37]
    return [one, two, [12, *range(40, 59)]]


def batch(rows: Sequence[Sequence[int]]) -> Inputs:
    """Rows as a model takes them, padded on the left: int64 ``input_ids`` and ``attention_mask`` [rows, longest]."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def extras(model: Any, inputs: Inputs) -> Inputs:
    """What a processor would give besides, for the models that take it: which tokens are an image's."""
    takes = inspect.signature(type(model).forward).parameters
    image = (inputs["input_ids"] == marks(model)[0]).long()
    return {name: image for name in ("token_type_ids", "mm_token_type_ids") if name in takes}


@torch.no_grad()
def generate(model: Any, inputs: Inputs, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of each decoded token, float [STEPS, rows, vocabulary], and the sequences, int64 [rows, tokens]."""
    out = model.generate(
        **inputs, **extras(model, inputs), max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True,
        output_logits=True, pad_token_id=0, eos_token_id=None, logits_processor=LogitsProcessorList([Forced()]),
        **kwargs,
    )  # fmt: skip
    return torch.stack(out.logits), out.sequences


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors, of the largest number where that is above 1; NaN is infinitely far."""
    said = other[other.abs() < RULED_OUT].abs()
    return float((one - other).abs().nan_to_num(nan=torch.inf).max() / max(1.0, float(said.max())))
