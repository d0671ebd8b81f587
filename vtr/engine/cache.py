"""The ragged cache layer: every row has its own physical length, while transformers sees the logical one.

Rows of similar length share a dense bucket ``[b, kv_heads, capacity, head_dim]``, so that one unreduced row does not
make every row's cache long. Buckets grow in blocks of about a tenth, never by a copy per token. Of a layer with a
sliding window they hold no token that none to come can see, give or take such a block while a call is running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from vtr.base import Policy, UnsupportedError
from vtr.engine.bucket import Bucket, Storage, block

SIMILAR = 0.92
"""Rows at least this fraction of a bucket's longest row may share the bucket."""

READABLE = ("cpu",)
"""Devices whose tensors can be read without waiting for them."""


@dataclass(eq=False)
class CacheState:
    """What the engine knows of a ragged cache between calls; shared by the layers, carried by the cache object."""

    policies: list[Policy | None]
    dropped: list[int]
    """Per row: how many positions the prompt really lost before the decoder (compression renumbers positions)."""
    shift: list[list[int]] = field(default_factory=list)
    """Per layer and row: how many positions more were lost by cuts in the decoder that renumber."""
    logical: int = 0
    tail: int = 0
    """Tokens appended since the last reduction, the same for every row: what ``crop`` may take back."""
    exact: bool = True
    """False once ``remember`` has refused a token: rows then end at different places."""
    floor: int = 0
    """Logical length that ``crop`` cannot go below: tokens that a sliding window would need are gone."""
    memos: list[dict[str, Any]] = field(default_factory=list)
    layout: Any = None
    """How a prefill was laid out in the layer before: from what, and the tables of indices made for it."""

    def take(self, sources: list[int]) -> None:
        self.policies = [self.policies[s] for s in sources]
        self.dropped = [self.dropped[s] for s in sources]
        self.shift = [[layer[s] for s in sources] for layer in self.shift]


class RaggedLayer(DynamicLayer):
    """One decoder layer's keys and values, a length per row. Only ever updated under a plan of a patched model."""

    is_croppable = True

    def __init__(self, state: CacheState, index: int, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state, self.index, self.window = state, index, window
        self.record_past, self._committed = False, 0
        self.staged: Any = None
        self.buckets: list[Bucket] = []
        self.place: dict[int, tuple[Bucket, int]] = {}
        self.attended: Any = 0
        self._order: torch.Tensor | None = None
        self.is_initialized = True

    # -- what transformers asks ------------------------------------------------------------------------------------
    def get_seq_length(self) -> int:
        return self.state.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.state.logical + query_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values as the staged plan says; returns them as they came."""
        plan, self.staged = self.staged, None
        if plan is None:
            raise UnsupportedError(
                "this cache was filled by a model patched with vtr and holds rows of different lengths, so only that "
                "model can go on with it: vtr.patch(model) again, or start with a new cache"
            )
        self.lazy_initialization(key_states, value_states)
        if plan.decode:
            self._append_one(key_states, value_states, plan.positions)
        else:
            self._append_packed(key_states, value_states, plan.lengths, plan.positions)
        return key_states, value_states

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        self._take(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take([row for row in range(len(self.place)) for _ in range(repeats)])

    def reset(self) -> None:
        self.buckets, self.place, self.attended = [], {}, 0
        self.state.logical = self.state.tail = self.state.floor = self._committed = 0

    def activate_past_recording(self) -> None:
        """From now on, what comes in can be taken back: until ``crop``, no token is dropped that it may need."""
        self.record_past, self._committed = True, self.state.logical

    def crop(self, tokens_to_remove: int) -> None:
        n = abs(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove from the end")
        if not self.state.exact or (self.index == 0 and n > self.state.tail):
            raise UnsupportedError(
                f"cannot crop {n} tokens: only tokens decoded after the last reduction, all of them remembered, can be "
                "taken back; start with a new cache instead"
            )
        if self.index == 0 and n and self.state.logical - n < self.state.floor:
            raise UnsupportedError(
                f"cannot crop {n} tokens: what a sliding window would then need is gone; call "
                "cache.activate_past_recording() before the tokens that are to be taken back, or start with a new cache"
            )
        for bucket in self.buckets:
            bucket.lens = bucket.lens - n
            bucket.upper -= n
        if self.index == 0:
            self.state.logical -= n
            self.state.tail -= n
        self._committed = self.state.logical
        self.tidy()

    # -- what the engine asks --------------------------------------------------------------------------------------
    @property
    def one_bucket(self) -> bool:
        """True if one bucket holds all rows, in order."""
        return len(self.buckets) == 1

    def in_order(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Put per-bucket results ([b, …] each) back into the order of the rows."""
        if self.one_bucket:
            return parts[0]
        if self._order is None:
            rows = [row for bucket in self.buckets for row in bucket.rows]
            self._order = torch.tensor(rows, device=parts[0].device).argsort()
        return torch.cat(parts).index_select(0, self._order)

    def row(self, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one row, [1, kv_heads, length, head_dim] each."""
        bucket, i = self.place[row]
        return bucket.keys[i : i + 1, :, :length], bucket.values[i : i + 1, :, :length]

    def positions(self, row: int, length: int) -> torch.Tensor:
        """int64 [length]: positions of one row's tokens (of a layer with a sliding window)."""
        bucket, i = self.place[row]
        assert bucket.positions is not None
        return bucket.positions[i, :length]

    def lengths(self) -> list[int]:
        """Tokens of every row (reads the device if ``remember`` decided there)."""
        out = [0] * len(self.place)
        for bucket in self.buckets:
            lens = [bucket.upper] * len(bucket.rows) if bucket.equal else bucket.lens.tolist()
            for row, n in zip(bucket.rows, lens, strict=True):
                out[row] = n
        return out

    def live(self) -> Any:
        """Tokens held, all rows: an int, or a 0-d tensor where only the device knows."""
        if all(b.equal for b in self.buckets):
            return sum(b.upper * len(b.rows) for b in self.buckets)
        return sum(b.lens.sum() for b in self.buckets)

    def allocated(self) -> int:
        """Bytes of key and value storage."""
        return sum(t.numel() * t.element_size() for b in self.buckets for t in (b.keys, b.values))

    def tidy(self, new: int = 0) -> None:
        """:meth:`drop_unseen` where it is worth a copy."""
        if self.window is not None and any(b.upper >= self.window + block(self.window) for b in self.buckets):
            self.drop_unseen(new)

    def drop_unseen(self, new: int = 0) -> None:
        """Drop what is behind the sliding window for every token to come; reads the device.

        Args:
            new: tokens of each row that are cached and not yet counted in ``state.logical``.
        """
        if self.window is None or self.state.logical + new < self.window:
            return
        slack = self.state.logical + new - self._committed if self.record_past else 0
        for bucket in self.buckets:
            assert bucket.positions is not None
            last = bucket.positions.gather(1, (bucket.lens - 1).clamp(min=0)[:, None])[:, 0]
            by = bucket.unseen(last + 1, self.window, slack)
            gone, left = torch.stack([by, bucket.lens - by]).tolist()
            capacity = self._capacity(max(left))
            if any(gone) or bucket.keys.shape[2] > capacity:
                bucket.shift(by, left, capacity)
            if any(gone):
                self.state.floor = max(self.state.floor, self.state.logical + new - slack)

    # -- storage ---------------------------------------------------------------------------------------------------
    def _append_packed(
        self, keys: torch.Tensor, values: torch.Tensor, lengths: tuple[int, ...], positions: torch.Tensor | None
    ) -> None:
        ends = list(accumulate(lengths))
        if not self.place:
            kept = [self._seen_later(n, end, positions) for n, end in zip(lengths, ends, strict=True)]
            self._fill(self._allocate(kept, keys, values), keys, values, lengths, kept, positions)
            return
        # what is behind the window goes when these tokens have attended to it
        old = self.lengths()
        self._reserve([o + n for o, n in zip(old, lengths, strict=True)])
        for row, (n, end) in enumerate(zip(lengths, ends, strict=True)):
            bucket, i = self.place[row]
            here = slice(old[row], old[row] + n)
            bucket.keys[i, :, here] = keys[0, :, end - n : end]
            bucket.values[i, :, here] = values[0, :, end - n : end]
            if bucket.positions is not None and positions is not None:
                bucket.positions[i, here] = positions[end - n : end]
        self._set_lengths([o + n for o, n in zip(old, lengths, strict=True)])

    def _fill(
        self, storage: Storage, keys: torch.Tensor, values: torch.Tensor, lengths: Sequence[int], kept: list[int],
        positions: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """Write the last ``kept`` tokens of each row, all rows at once. keys, values: [1, kv_heads, T, head_dim]."""
        layout = (tuple(lengths), tuple(kept), keys.device)
        if self.state.layout is None or self.state.layout[0] != layout:  # most layers hold what the layer before holds
            self.state.layout = layout, self._cells(lengths, kept, keys.device)
        cells, sources, lens = self.state.layout[1]
        for store, new in ((storage.keys, keys), (storage.values, values)):
            tokens = new[0].transpose(0, 1)
            store.index_copy_(0, cells, tokens if sources is None else tokens.index_select(0, sources))
        if storage.positions is not None and positions is not None:
            storage.positions.index_copy_(
                0, cells, positions if sources is None else positions.index_select(0, sources)
            )
        at = 0
        for bucket in self.buckets:
            n = len(bucket.rows)
            bucket.lens, at = lens[at : at + n], at + n
            mine = [kept[row] for row in bucket.rows]
            bucket.upper, bucket.equal = max(mine), len(set(mine)) == 1

    def _cells(
        self, lengths: Sequence[int], kept: list[int], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Where in the storage each token goes; which packed tokens these are (None: all); and the buckets' ``lens``."""
        cell, first = [0] * len(kept), 0
        for bucket in self.buckets:
            for row in bucket.rows:
                cell[row], first = first, first + bucket.keys.shape[2]
        here = [start - before for start, before in zip(cell, accumulate([0, *kept]), strict=False)]
        gone = [n - k for n, k in zip(lengths, kept, strict=True)]
        lens = [kept[row] for bucket in self.buckets for row in bucket.rows]
        table = torch.tensor([here, list(accumulate(gone)), kept, lens]).to(device, non_blocking=True)
        total = sum(kept)
        each = torch.arange(total, device=device)
        cells = each + table[0].repeat_interleave(table[2], output_size=total)
        sources = each + table[1].repeat_interleave(table[2], output_size=total) if any(gone) else None
        return cells, sources, table[3]

    def _seen_later(self, n: int, end: int, positions: torch.Tensor | None) -> int:
        """How many of a row's first ``n`` tokens, which end at ``end``, any token to come can see."""
        if self.window is None or self.record_past or positions is None:
            return n
        at, later = positions[end - n : end], min(n, self.window - 1)
        if at.device.type in READABLE:  # with gaps between them they are fewer
            later = n - int(((at > at[-1] + 1 - self.window).cumsum(0) == 0).sum())
        if later < n:
            self.state.floor = max(self.state.floor, self.state.logical + n)
        return later

    def _make_room(self, bucket: Bucket, coming: torch.Tensor | None) -> None:
        """A full bucket gets room for a token more a row, at positions ``coming`` ([b]; None without a window)."""
        if self.window is None or coming is None:
            if not bucket.equal:
                bucket.upper = int(bucket.lens.max())
            if bucket.upper + 1 > bucket.keys.shape[2]:
                bucket.grow(bucket.upper + 1 + block(bucket.upper))
            return
        slack = self.state.logical - self._committed if self.record_past else 0
        by = bucket.unseen(coming, self.window, slack)
        gone, left = torch.stack([by, bucket.lens - by]).tolist()
        if any(gone):
            self.state.floor = max(self.state.floor, self.state.logical - slack)
        bucket.shift(by, left, max(left) + 1 + block(max(left)))

    def _capacity(self, longest: int) -> int:
        """Tokens a bucket gets storage for, whose longest row has ``longest``; no more than a window has."""
        roomy = longest + block(longest)
        return roomy if self.window is None else max(longest, min(roomy, self.window - 1))

    def _append_one(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None) -> None:
        """One token per row, [b, kv_heads, 1, head_dim]. Always written; it counts as cached only if remembered."""
        for bucket in self.buckets:
            if bucket.upper + 1 > bucket.keys.shape[2]:
                self._make_room(bucket, positions if positions is None or self.one_bucket else positions[bucket.rows])
            new_k, new_v = (keys, values) if self.one_bucket else (keys[bucket.rows], values[bucket.rows])
            if bucket.equal:
                bucket.keys[:, :, bucket.upper] = new_k[:, :, 0]
                bucket.values[:, :, bucket.upper] = new_v[:, :, 0]
            else:
                each = torch.arange(len(bucket.rows), device=keys.device)
                bucket.keys[each, :, bucket.lens] = new_k[:, :, 0]
                bucket.values[each, :, bucket.lens] = new_v[:, :, 0]
            if bucket.positions is not None and positions is not None:
                each = torch.arange(len(bucket.rows), device=keys.device)
                bucket.positions[each, bucket.lens] = positions if self.one_bucket else positions[bucket.rows]

    def attend_done(self, remember: torch.Tensor | None) -> None:
        """After the step's attention: the current token is kept (``remember`` None or True) or is forgotten."""
        for bucket in self.buckets:
            count = bucket.upper * len(bucket.rows) if bucket.equal else bucket.lens.sum()
            self.attended = self.attended + count + len(bucket.rows)
            grown = 1
            if remember is None:
                bucket.lens = bucket.lens + 1
            else:
                kept = remember[bucket.rows].to(bucket.lens)
                bucket.lens = bucket.lens + kept
                said = set(kept.tolist()) if bucket.equal and kept.device.type in READABLE else ()
                if len(said) == 1:  # all alike: no mask is needed
                    (grown,) = said
                else:
                    bucket.equal = False
            bucket.upper += grown

    def _allocate(self, lengths: list[int], keys: torch.Tensor, values: torch.Tensor) -> Storage:
        """Empty buckets for rows of these lengths, in one storage."""
        order = sorted(range(len(lengths)), key=lambda r: -lengths[r])
        groups: list[list[int]] = []
        for row in order:
            if groups and lengths[row] >= SIMILAR * lengths[groups[-1][0]]:
                groups[-1].append(row)
            else:
                groups.append([row])
        self.buckets, self.place, self._order = [], {}, None
        capacities = [self._capacity(max(lengths[row] for row in rows)) for rows in groups]
        sizes = [len(rows) * capacity for rows, capacity in zip(groups, capacities, strict=True)]
        storage = Storage.like(keys, values, sum(sizes), self.window is not None)
        at = 0
        for rows, capacity, size in zip(groups, capacities, sizes, strict=True):
            rows.sort()
            bucket = storage.bucket(rows, at, capacity)
            self.buckets.append(bucket)
            self.place.update({row: (bucket, i) for i, row in enumerate(rows)})
            at += size
        return storage

    def _reserve(self, lengths: list[int]) -> None:
        for bucket in self.buckets:
            need = max(lengths[r] for r in bucket.rows)
            if need > bucket.keys.shape[2]:
                bucket.grow(need + block(need))

    def _set_lengths(self, lengths: list[int]) -> None:
        for bucket in self.buckets:
            here = [lengths[r] for r in bucket.rows]
            bucket.lens = torch.tensor(here, dtype=torch.int64).to(bucket.keys.device, non_blocking=True)
            bucket.upper, bucket.equal = max(here), len(set(here)) == 1

    def _take(self, sources: list[int]) -> None:
        """New row i is old row ``sources[i]`` (beam search reorders, batches are selected and repeated)."""
        if self.index == 0:
            self.state.take(sources)
        if not self.place:
            return
        same = len(sources) == len(self.place) and all(
            self.place[i][0] is self.place[s][0] for i, s in enumerate(sources)
        )
        if same:
            for bucket in self.buckets:
                local = [self.place[sources[row]][1] for row in bucket.rows]
                index = torch.tensor(local, device=bucket.keys.device)
                bucket.keys, bucket.values = bucket.keys.index_select(0, index), bucket.values.index_select(0, index)
                bucket.lens = bucket.lens.index_select(0, index)
                if bucket.positions is not None:
                    bucket.positions = bucket.positions.index_select(0, index)
            return
        old, lengths = self.place, self.lengths()
        first = self.buckets[0]
        self._allocate([lengths[s] for s in sources], first.keys, first.values)
        for row, source in enumerate(sources):
            (bucket, i), (was, j), n = self.place[row], old[source], lengths[source]
            bucket.keys[i, :, :n], bucket.values[i, :, :n] = was.keys[j, :, :n], was.values[j, :, :n]
            if bucket.positions is not None and was.positions is not None:
                bucket.positions[i, :n] = was.positions[j, :n]
        self._set_lengths([lengths[s] for s in sources])


def is_ragged(cache: Any) -> bool:
    """True for a cache whose layers are vtr's."""
    layers = getattr(cache, "layers", None) or [None]
    return isinstance(layers[0], RaggedLayer)
