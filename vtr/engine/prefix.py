"""What rows have read in front of their first picture: alike under every policy, so a next try goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vtr.base import Policy
from vtr.engine.cache import RaggedLayer
from vtr.engine.cache_state import CacheState
from vtr.engine.prompt import Prompt
from vtr.engine.request import Request, per_token

WORTHWHILE = 8
"""Tokens in front of the first picture from which on they are not read again."""


def columns_of(prompt: Prompt, layers: Sequence[RaggedLayer], mask: Any) -> int:
    """How many columns at the beginning hold no picture of any row, and are worth keeping; 0: none.

    Args:
        layers: of a cache that these rows have filled. mask: the call's.
    """
    told = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)
    length = prompt.is_vision.shape[1]
    whole = all(layer.window is None or layer.window > length for layer in layers)
    if not told or not whole or not bool(prompt.is_vision.any(1).all()):
        return 0  # (what is behind a sliding window is not in the cache any more)
    columns = int(prompt.is_vision.int().argmax(1).min())
    return columns if min(counts_of(prompt, columns), default=0) >= WORTHWHILE else 0


def counts_of(prompt: Prompt, columns: int) -> list[int]:
    """How many tokens each row has in its first columns."""
    if prompt.valid is None:
        return [columns] * len(prompt.is_vision)
    return prompt.valid[:, :columns].sum(1).tolist()


def begun(
    layers: Sequence[RaggedLayer], at: Sequence[int], prompt: Prompt, policies: Sequence[Policy | None], columns: int
) -> list[RaggedLayer]:
    """The layers of a new cache that holds the first columns of some rows of another.

    Args:
        at: which rows of ``layers``. prompt, policies: of these rows.
    """
    counts, rows = counts_of(prompt, columns), len(at)
    state = CacheState(list(policies), [0] * rows, [[0] * rows for _ in layers])
    state.note(
        None if prompt.ids is None else prompt.ids[:, :columns],
        None if prompt.valid is None else prompt.valid[:, :columns], rows, columns,
    )  # fmt: skip
    state.logical = columns
    return [_first(layer, state, at, counts) for layer in layers]


def _first(layer: RaggedLayer, state: CacheState, at: Sequence[int], counts: list[int]) -> RaggedLayer:
    made, like = RaggedLayer(state, layer.index, layer.window, layer.latent), layer.buckets[0]
    made.lazy_initialization(like.keys, like.values)
    made._allocate(counts, like.keys, like.values)
    for row, (source, n) in enumerate(zip(at, counts, strict=True)):
        made.copy_row(row, *layer.place[source], n)
    made._set_lengths(counts)
    return made


def behind(request: Request, kwargs: dict[str, Any], columns: int) -> tuple[Request, dict[str, Any]]:
    """A call of the text model without its first columns.

    Args:
        kwargs: its arguments, inputs_embeds [rows, L, D] among them.
    """
    rows, length = kwargs["inputs_embeds"].shape[:2]
    out = {**kwargs, "inputs_embeds": kwargs["inputs_embeds"][:, columns:]}
    out |= {name: kwargs[name][:, columns:] for name in per_token(kwargs, rows, length)}
    if kwargs.get("position_ids") is not None:
        out["position_ids"] = kwargs["position_ids"][..., columns:]
    prompt = request.prompt

    def cut(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t[:, columns:]

    rest = Prompt(
        prompt.is_vision[:, columns:], prompt.layouts, prompt.places, cut(prompt.valid), cut(prompt.labels),
        cut(prompt.ids),
    )  # fmt: skip
    starts = [start - columns for start in request.answer_starts]
    return replace(request, prompt=rest, answer_starts=starts, offset=request.offset + columns), out
