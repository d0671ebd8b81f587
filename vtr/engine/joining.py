"""Rows of several ragged caches become the rows of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vtr.engine.cache import RaggedLayer
from vtr.engine.cache_state import PADDING, CacheState
from vtr.engine.once import Once

Part = tuple[list[RaggedLayer], Sequence[int], Sequence[int]]
"""A cache's layers, which of its rows, and which rows of the whole these become."""


def joined(parts: Sequence[Part]) -> list[RaggedLayer]:
    """The layers of one cache with rows of several, which are copied once; the longest says how many columns."""
    state = _state(parts)
    return [_layer(index, state, parts) for index in range(len(parts[0][0]))]


def _state(parts: Sequence[Part]) -> CacheState:
    states = [layers[0].state for layers, _, _ in parts]
    first, sources = states[0], _sources(parts)
    shift = [[states[p].shift[layer][i] for p, i in sources] for layer in range(len(first.shift))]
    seen = None
    if all(state.seen is not None for state in states):
        columns = max(state.seen.shape[1] for state in states)  # type: ignore[union-attr]
        rows = [states[p].seen[i] for p, i in sources]  # type: ignore[index]
        seen = torch.stack([torch.nn.functional.pad(r, (0, columns - len(r)), value=PADDING) for r in rows])
    return replace(
        first, policies=[states[p].policies[i] for p, i in sources], dropped=[states[p].dropped[i] for p, i in sources],
        shift=shift, logical=max(s.logical for s in states), tail=min(s.tail for s in states),
        exact=all(s.exact for s in states), floor=max(s.floor for s in states), seen=seen, decoding=None, memos=[],
        once=Once(), _lists=Once(),
    )  # fmt: skip


def _sources(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Of each row of the whole: which part it comes from, and which row of that."""
    found = {row: (p, i) for p, (_, mine, rows) in enumerate(parts) for i, row in zip(mine, rows, strict=True)}
    return [found[row] for row in range(len(found))]


def _layer(index: int, state: CacheState, parts: Sequence[Part]) -> RaggedLayer:
    olds, sources = [layers[index] for layers, _, _ in parts], _sources(parts)
    first = olds[0]
    made = RaggedLayer(state, index, first.window, first.latent)
    made.record_past, made._committed = any(old.record_past for old in olds), max(old._committed for old in olds)
    made.lazy_initialization(first.buckets[0].keys, first.buckets[0].values)
    held = [old.lengths() for old in olds]
    lengths = [held[p][i] for p, i in sources]
    made._allocate(lengths, first.buckets[0].keys, first.buckets[0].values)
    for row, (p, i) in enumerate(sources):
        made.copy_row(row, *olds[p].place[i], lengths[row])
    made._set_lengths(lengths)
    return made
