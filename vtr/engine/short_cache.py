"""A cache of transformers' own, of whatever layers, with shortened rows: real lengths inside, logical ones outside.

The rows are padded on the left to a common length. What the engine must know of them between calls is carried by the
cache object itself, as by a ragged one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from vtr.base import UnsupportedError
from vtr.engine.cache import is_ragged
from vtr.engine.cache_state import CacheState
from vtr.engine.once import from_host
from vtr.engine.trace import Trace


@dataclass(eq=False)
class ShortState(CacheState):
    """What is known of shortened rows; ``dropped`` and ``logical`` are those of any reduced cache.

    Attributes:
        mask: int64 [rows, columns], 1 where a column of the cache holds a token of the row.
        lengths: per row, how many columns do. missing: logical columns that the cache does not have.
        form: how the prompt's positions were given: "none", "columns" ([1, L] for several rows), "rows" or "axes".
        following: int64 [rows], the position of each row's next token, where the model does not give it.
    """

    mask: torch.Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    missing: int = 0
    form: str = "rows"
    following: torch.Tensor | None = None

    def append(self, columns: int) -> None:
        """So many tokens have been added to every row."""
        assert self.mask is not None and self.following is not None
        self.mask = self.longer(columns)
        self.lengths = [length + columns for length in self.lengths]
        self.following = self.following + columns
        self.logical += columns
        self.tail += columns

    def longer(self, columns: int) -> torch.Tensor:
        """The mask with so many tokens more in every row."""
        assert self.mask is not None
        return torch.cat([self.mask, self.mask.new_ones(len(self.mask), columns)], 1)

    def take(self, sources: list[int]) -> None:
        super().take(sources)
        self.lengths = [self.lengths[s] for s in sources]
        assert self.mask is not None and self.following is not None
        at = from_host(sources, self.mask.device)
        self.mask, self.following = self.mask.index_select(0, at), self.following.index_select(0, at)


class ShortCache(DynamicCache):
    """Made of a ``DynamicCache`` by :func:`shorten`, in place; what happens to its rows happens to ``vtr_state``."""

    vtr_state: ShortState

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical columns, as ``generate`` and the module that merges images count them."""
        return int(super().get_seq_length(layer_idx)) + self.vtr_state.missing

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(columns, where they begin), counted as :meth:`get_seq_length` does."""
        columns, start = super().get_mask_sizes(query_length, layer_idx)
        missing = self.vtr_state.missing
        return (columns, start + missing) if start else (columns + missing, 0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.vtr_state.take(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.vtr_state.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As beams change places, since recurrent layers know that alone."""
        rows = torch.arange(len(self.vtr_state.lengths))[indices.cpu()]
        self.reorder_cache(rows.to(self.vtr_state.mask.device))  # type: ignore[union-attr]
        for layer in self.layers:
            if hasattr(layer, "batch_size"):
                layer.batch_size = len(rows)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(
            "tokens cannot be taken back out of a cache of shortened rows: copy it before they are added "
            "(copy.deepcopy), or run this call with policy=None"
        )

    def reset(self) -> None:
        """Empty, it is a cache like any other."""
        super().reset()  # type: ignore[no-untyped-call]
        self.__class__ = DynamicCache  # type: ignore[assignment]
        del self.__dict__["vtr_state"]


def shorten(cache: Any, state: ShortState) -> ShortCache:
    """The same object, from now on a cache of shortened rows.

    Raises:
        UnsupportedError: another kind of cache than transformers' ``DynamicCache``.
    """
    if type(cache) is not DynamicCache:
        raise UnsupportedError(
            f"this model keeps what it has read in a {type(cache).__name__}, whose rows cannot be shortened: pass "
            "use_cache=False, or policy=None"
        )
    cache.vtr_state = state  # type: ignore[attr-defined]
    cache.__class__ = ShortCache  # type: ignore[assignment]
    return cache  # type: ignore[return-value]


def inside(cache: ShortCache) -> DynamicCache:
    """The same cache as the decoder is to see it: its length is that of the shortened rows."""
    made = DynamicCache.__new__(DynamicCache)
    made.__dict__ = cache.__dict__
    return made


def is_short(cache: Any) -> bool:
    """True for a cache of shortened rows."""
    return isinstance(cache, ShortCache)


def is_reduced(cache: Any) -> bool:
    """True for a cache whose rows are reduced, in whatever way."""
    return is_ragged(cache) or is_short(cache)


def check_own_cache(cache: Any) -> None:
    """Refuse a cache that cannot hold shortened rows.

    Raises:
        UnsupportedError: of another class, offloaded, or filled by an unreduced call.
    """
    if cache is None or is_short(cache):
        return
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        raise UnsupportedError(
            f"a reduced call of this model needs a plain DynamicCache, got {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}: leave out the cache, or pass "
            "policy=None"
        )
    held = cache.get_seq_length() if len(cache.layers) else 0
    if held > 0:
        raise UnsupportedError(
            f"this cache already holds {held} unreduced tokens: pass the policy from the first call of the "
            "conversation on, or go on with policy=None"
        )


def columns_of(cache: Any, depth: int) -> list[int]:
    """Per decoder layer, the columns of keys that a cache of transformers' own holds; 0 where there are none."""
    layers = [] if cache is None else cache.layers
    found = [max((columns for columns, _ in _held(layer)), default=0) for layer in layers[:depth]]
    return found + [0] * (depth - len(found))


def note_short(trace: Trace, cache: ShortCache) -> None:
    """Add to the trace how many bytes of keys and values ``cache`` holds; recurrent states are not counted."""
    lengths = cache.vtr_state.lengths
    trace.kv_bytes = trace.kv_allocated = 0
    for layer in cache.layers:
        for columns, size in _held(layer):
            trace.kv_allocated += len(lengths) * columns * size
            trace.kv_bytes += sum(min(length, columns) for length in lengths) * size


def _held(layer: Any) -> Sequence[tuple[int, int]]:
    """Of a layer's keys and values (and an indexer's keys): the columns that they have, and the bytes of one row's."""
    found = []
    for name in ("keys", "values", "indexer_keys"):
        held = getattr(layer, name, None)
        if isinstance(held, torch.Tensor) and held.numel():
            columns = held.shape[-2]
            found.append((columns, held.numel() * held.element_size() // (held.shape[0] * columns)))
    return found
