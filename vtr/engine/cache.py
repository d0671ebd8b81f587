"""The ragged cache layer: every row has its own physical length, while transformers sees the logical one.

Rows of similar length share a dense bucket ``[b, kv_heads, capacity, head_dim]``, so that one unreduced row does not
make every row's cache long. Buckets grow in blocks of about a tenth, never by a copy per token. Of a layer with a
sliding window they hold no token that none to come can see, give or take such a block while a call is running.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from transformers.cache_utils import DynamicLayer

from vtr.base import UnsupportedError
from vtr.engine.bucket import Bucket, Cells, Longest, Storage, alike_in_shape, block, grouped, roomy
from vtr.engine.cache_state import CacheState
from vtr.engine.once import from_host

READABLE = ("cpu",)
"""Devices whose tensors can be read without waiting for them."""


class RaggedLayer(DynamicLayer):
    """One decoder layer's keys and values, a length per row. Only ever updated under a plan of a patched model.

    Attributes:
        window: the layer's sliding window or chunk, or None. latent: whether keys and values are yet to be made of what
            it holds, by the attention module.
    """

    is_croppable = True

    def __init__(self, state: CacheState, index: int, window: int | None = None, latent: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state, self.index, self.window, self.latent = state, index, window, latent
        self.record_past, self._committed = False, 0
        self.staged: Any = None
        self.buckets: list[Bucket] = []
        self._order: list[int] | None = None
        self._back: list[int] = []
        self.place: dict[int, tuple[Bucket, int]] = {}
        self.attended: Any = 0
        self.is_initialized = True

    # -- what transformers asks ------------------------------------------------------------------------------------
    def get_seq_length(self) -> int:
        taken: int = 0 if self.state.decoding is None else self.state.decoding.taken()
        return self.state.logical + taken

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.state.logical + query_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values as the staged plan says; returns them as they came."""
        if self.state.decoding is not None:
            if self.latent:
                self.state.decoding.latents = key_states, value_states
            return key_states, value_states  # attention writes them, where it knows into which cells
        plan, self.staged = self.staged, None
        if plan is None:
            raise UnsupportedError(
                "this cache was filled by a model patched with vtr and holds rows of different lengths, so only that "
                "model can go on with it: vtr.patch(model) again, or start with a new cache"
            )
        if self.index == 0:
            self.state.once.clear()
        if plan.decode:
            self._append_one(key_states, value_states, self.here(plan.positions, key_states))
        else:
            self.lazy_initialization(key_states, value_states)
            self._append_packed(*_seen(plan, key_states, value_states))
        return key_states, value_states

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i goes on from what row ``beam_idx[i]`` has.

        Rows of one bucket are reordered on the device. Where there are several, or policies that differ, the host has
        to know which row comes from where: it waits for ``beam_idx`` then, once for all layers.
        """
        once = self.state.once
        if self.state.decoding is not None:
            if self.index == 0:
                self.state.decoding.reorder(beam_idx)
            return
        if self.index == 0:
            once.clear()
        readable, same = beam_idx.device.type in READABLE, len(beam_idx) == len(self.place)
        if self.one_bucket and same and not readable and self.state.alike():
            (bucket,) = self.buckets
            at = self.here(beam_idx, bucket.keys)
            bucket.take(at)
            if not bucket.equal:
                lens = once.of("taken", bucket.ragged, at, make=lambda: bucket.lens.index_select(0, at))
                bucket.hold(lens, None, bucket.upper)
        else:
            self._take(once.of("sources", beam_idx, make=beam_idx.tolist))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        rows = len(self.place)
        wanted = indices.tolist()
        if wrong := [i for i in wanted if not -rows <= i < rows]:
            raise IndexError(f"row {wrong[0]} of a cache of {rows}: rows are counted from 0")
        self._take([i % rows for i in wanted])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take([row for row in range(len(self.place)) for _ in range(repeats)])

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedLayer:
        """Rows of its own, on a storage that both layers read until either writes."""
        self.thaw()
        made = copy.copy(self)
        made.state, made.staged = copy.deepcopy(self.state, memo), None
        made.buckets, made._back = [bucket.forked() for bucket in self.buckets], self._back[:]
        made._find_rows()
        return made

    def reset(self) -> None:
        self.buckets, self.place, self.attended = [], {}, 0
        self._committed = 0
        if self.index == 0:
            self.state.reset()

    def activate_past_recording(self) -> None:
        """From now on, what comes in can be taken back: until ``crop``, no token is dropped that it may need."""
        self.record_past, self._committed = True, self.state.logical

    def crop(self, tokens_to_remove: int) -> None:
        self.thaw()
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
            sizes = bucket.known()
            lens = None if bucket.equal else bucket.lens - n
            bucket.hold(lens, sizes and [size - n for size in sizes], bucket.upper - n)
        if self.index == 0:
            self.state.crop(n)
        self._committed = self.state.logical
        self.tidy()

    # -- what the engine asks --------------------------------------------------------------------------------------
    @property
    def one_bucket(self) -> bool:
        """True if one bucket holds all rows, in order."""
        return len(self.buckets) == 1

    def here(self, t: Any, beside: torch.Tensor) -> Any:
        """A tensor of the whole forward on the device of ``beside``, sent there once for all layers; None as None."""
        if t is None or t.device == beside.device:
            return t
        return self.state.once.of("here", t, beside.device, make=lambda: t.to(beside.device))

    def parted(self, t: torch.Tensor) -> Sequence[torch.Tensor]:
        """[rows, …] → [b, …] of each bucket's rows."""
        if len(self.buckets) == 1:
            return (t,)
        if self._order is not None:
            t = t.index_select(0, self.state.on_device(self._order, t.device))
        return t.split([len(bucket.rows) for bucket in self.buckets])

    def in_order(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Put per-bucket results ([b, …] each) back into the order of the rows."""
        if len(parts) == 1:
            return parts[0]
        joined = torch.cat(list(parts))
        if self._order is None:
            return joined
        return joined.index_select(0, self.state.on_device(self._back, joined.device))

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
            for row, n in zip(bucket.rows, bucket.known() or bucket.lens.tolist(), strict=True):
                out[row] = n
        return out

    def live(self) -> Any:
        """Tokens held, all rows: an int, or a 0-d tensor where only the device knows."""
        return sum(map(Bucket.live, self.buckets))

    def allocated(self) -> int:
        """Bytes of key and value storage."""
        return sum(t.numel() * t.element_size() for b in self.buckets for t in (b.keys, b.values))

    def tidy(self, new: int = 0) -> None:
        """:meth:`drop_unseen` where it is worth a copy."""
        if self.window is not None and any(b.upper >= self.window + block(self.window) for b in self.buckets):
            self.drop_unseen(new)

    def drop_unseen(self, new: int = 0) -> None:
        """Drop what is behind the sliding window for every token to come.

        Args:
            new: tokens of each row that are cached and not yet counted in ``state.logical``.
        """
        if self.window is None or self.state.logical + new < self.window:
            return
        for bucket in self.buckets:
            assert bucket.positions is not None
            last = bucket.positions.gather(1, (bucket.lens - 1).clamp(min=0)[:, None])[:, 0]
            self._drop(bucket, last + 1, new)

    def _drop(self, bucket: Bucket, coming: torch.Tensor, new: int, room: int = 0) -> None:
        """:meth:`drop_unseen` of one bucket, for tokens from positions ``coming`` ([b]) on; leaves ``room`` for more.

        How many a window still holds depends on the gaps between them, which only the device knows. Where reading it
        would be waited for, room is left for as many as there can be.
        """
        assert self.window is not None
        slack = self.state.logical + new - self._committed if self.record_past else 0
        by = bucket.unseen(coming, self.window, slack)
        left: list[int] | int = min(bucket.upper, self.window - 1 + slack)
        some = True
        if by.device.type in READABLE:
            gone, left = torch.stack([by, bucket.lens - by]).tolist()
            some = any(gone)
        longest = left if isinstance(left, int) else max(left)
        capacity = longest + room + block(longest) if room else self._capacity(longest)
        if some or room or bucket.keys.shape[2] > capacity:
            bucket.shift(by, left, capacity)
        if some:
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
        self._set_lengths(kept)
        if self.one_bucket and self.buckets[0].equal and list(lengths) == kept:
            self.buckets[0].fill(keys, values, positions)
            return
        sizes, device = tuple(bucket.keys.shape[2] for bucket in self.buckets), keys.device
        cells = self.state.once.of(  # most layers hold what the layer before holds
            "cells", tuple(lengths), tuple(kept), sizes, device,
            make=lambda: Cells.of(self.buckets, lengths, kept, device),
        )  # fmt: skip
        storage.write(cells, keys, values, positions)

    def _seen_later(self, n: int, end: int, positions: torch.Tensor | None) -> int:
        """How many of a row's first ``n`` tokens, which end at ``end``, any token to come can see."""
        if self.window is None or self.record_past or positions is None or n == 0:
            return n
        at, later = positions[end - n : end], min(n, self.window - 1)
        if at.device.type in READABLE:  # with gaps between them they are fewer
            later = n - int(((at > at[-1] + 1 - self.window).cumsum(0) == 0).sum())
        if later < n:
            self.state.floor = max(self.state.floor, self.state.logical + n)
        return later

    def _make_room(self, bucket: Bucket, coming: torch.Tensor | None) -> None:
        """A full bucket gets room for a token more a row, at positions ``coming`` ([b]; None without a window)."""
        seen = 0 if self.window is None or coming is None else self.window
        if seen and self.record_past:
            seen += self.state.logical - self._committed
        if seen and self.state.logical >= seen:
            assert coming is not None
            return self._drop(bucket, coming, 0, room=1)
        if not bucket.equal and bucket.sizes is None:
            if bucket.asked is not None:
                bucket.upper, bucket.asked = bucket.asked.bound(bucket), None
            elif bucket.keys.device.type != "cuda":
                bucket.upper = int(bucket.lens.max())
        if bucket.upper + 1 > bucket.keys.shape[2]:
            bucket.grow(bucket.upper + 1 + block(bucket.upper))

    def _capacity(self, longest: int) -> int:
        """Tokens a bucket gets storage for, whose longest row has ``longest``; no more than a window has."""
        growing = self._with_room(longest)
        if self.window is None or self.state.constant is not None:
            return growing
        return max(longest, min(growing, self.window - 1))

    def _with_room(self, tokens: int) -> int:
        """Storage for so many tokens and some more."""
        constant = self.state.constant
        return tokens + block(tokens) if constant is None else roomy(tokens, constant.room)

    def _append_one(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None) -> None:
        """One token per row, [b, kv_heads, 1, head_dim]. Always written; it counts as cached only if remembered."""
        if len(self.buckets) == 1:
            return self._append(self.buckets[0], keys, values, positions)
        at = [None] * len(self.buckets) if positions is None else self.parted(positions)
        for each in zip(self.buckets, self.parted(keys), self.parted(values), at, strict=True):
            self._append(*each)

    def _append(
        self, bucket: Bucket, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None
    ) -> None:  # fmt: skip
        """:meth:`_append_one` of one bucket."""
        room = bucket.keys.shape[2] - bucket.upper
        if room < 1:
            self._make_room(bucket, positions)
        elif room <= 2 and bucket.asked is None and bucket.known() is None and keys.device.type == "cuda":
            bucket.asked = Longest(bucket)
        bucket.append(keys, values, positions, self.state.once)

    def attend_done(self, remember: torch.Tensor | None, said: Sequence[bool] | None = None) -> None:
        """After the step's attention: the current token is kept (``remember`` None or True) or is forgotten.

        Args:
            said: ``remember``, where the host knows it.
        """
        once = self.state.once
        if said is None and remember is not None and remember.device.type in READABLE:
            said = once.of("said", remember, make=remember.tolist)
        for i, bucket in enumerate(self.buckets):
            count = len(bucket.rows)
            if remember is None and bucket.ragged is None:
                bucket.upper += 1
                self.attended = self.attended + bucket.upper * count
                continue
            sizes = bucket.known()
            held = once.of("sum", bucket.ragged, make=bucket.live) if sizes is None else sum(sizes)
            self.attended = self.attended + held + count
            more = [True] * count if remember is None else said and [said[row] for row in bucket.rows]
            known = [n + m for n, m in zip(sizes, more, strict=True)] if sizes and more else None
            same = known is not None and min(known) == max(known)
            bucket.hold(None if same else self._grown(bucket, i, remember), known, bucket.upper + 1)

    def _grown(self, bucket: Bucket, number: int, remember: torch.Tensor | None) -> torch.Tensor:
        """int64 [b]: the rows' lengths when their new tokens are counted; the same tensor for layers alike."""

        def make() -> torch.Tensor:
            return bucket.lens + (1 if remember is None else self.parted(remember)[number])

        alike = (bucket.ragged, bucket.upper, tuple(bucket.rows), bucket.keys.device)
        return cast(torch.Tensor, self.state.once.of("grown", *alike, remember, make=make))

    def _allocate(self, lengths: list[int], keys: torch.Tensor, values: torch.Tensor) -> Storage:
        """Empty buckets for rows of these lengths, in one storage."""
        token = sum(t.shape[1] * t.shape[3] * t.element_size() for t in (keys, values))
        constant = self.state.constant
        if constant is not None and constant.compiles:
            groups = alike_in_shape(lengths, self.state.apart)
            self.state.apart = len(groups) > 1
        else:
            groups = [sorted(rows) for rows in grouped(lengths, token, keys.device)]
        rows_in_order = [row for rows in groups for row in rows]
        self._back = sorted(range(len(lengths)), key=rows_in_order.__getitem__)
        self._order = None if self._back == rows_in_order == sorted(rows_in_order) else rows_in_order
        storage = self._lay_out(
            groups, [self._capacity(max(lengths[row] for row in rows)) for rows in groups], keys, values
        )
        storage.clear(self.buckets, [min(lengths[row] for row in rows) for rows in groups])
        return storage

    def _lay_out(
        self, groups: Sequence[list[int]], capacities: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> Storage:  # fmt: skip
        """New buckets of these rows and capacities, parts of one storage. keys, values: their sizes and dtypes."""
        sizes = [len(rows) * capacity for rows, capacity in zip(groups, capacities, strict=True)]
        storage = Storage.like(keys, values, sum(sizes), self.window is not None)
        starts = accumulate(sizes, initial=0)
        self.buckets = [storage.bucket(rows, at, c) for rows, at, c in zip(groups, starts, capacities, strict=False)]
        self._find_rows()
        return storage

    def _find_rows(self) -> None:
        self.place = {row: (bucket, i) for bucket in self.buckets for i, row in enumerate(bucket.rows)}

    def whole_storage(self) -> Storage:
        """The one storage that all of its buckets are parts of, with room for what is to come."""
        assert self.state.constant is not None
        room, storage = self.state.constant.room, self.buckets[0].part_of
        if storage is not None and all(
            b.part_of is storage and b.keys.shape[2] >= b.upper + room for b in self.buckets
        ):
            return storage
        old, first = self.buckets, self.buckets[0]
        storage = self._lay_out([b.rows for b in old], [roomy(b.upper, room) for b in old], first.keys, first.values)
        storage.keys.zero_()
        storage.values.zero_()
        for bucket, made in zip(old, self.buckets, strict=True):
            n = bucket.upper
            made.keys[:, :, :n], made.values[:, :, :n] = bucket.keys[:, :, :n], bucket.values[:, :, :n]
            if made.positions is not None and bucket.positions is not None:
                made.positions[:, :n] = bucket.positions[:, :n]
            made.hold(bucket.ragged, bucket.known(), n)
        return storage

    @property
    def may_freeze(self) -> bool:
        """Whether its rows may go on with constant shapes; drafts, which are taken back, go on in the ragged layers."""
        constant = self.state.constant
        return constant is not None and constant.room > 1 and not self.record_past

    def thaw(self) -> None:
        """Take the rows back from whoever decodes them with constant shapes."""
        if self.state.decoding is not None:
            self.state.decoding.thaw()

    def _reserve(self, lengths: list[int]) -> None:
        for bucket in self.buckets:
            need = max(lengths[r] for r in bucket.rows)
            if need > bucket.keys.shape[2] or bucket.shared:
                bucket.grow(self._with_room(need))

    def _set_lengths(self, lengths: list[int]) -> None:
        for bucket in self.buckets:
            here, device = [lengths[r] for r in bucket.rows], bucket.keys.device
            bucket.hold(None if len(set(here)) == 1 else self._lens(here, device), here)

    def _lens(self, lengths: list[int], device: torch.device) -> torch.Tensor:
        """int64 [b]: the same tensor for layers of the same lengths, so that they go on sharing what is made of it."""
        key = tuple(lengths)
        return cast(torch.Tensor, self.state.once.of("lens", key, device, make=lambda: from_host(key, device)))

    def _take(self, sources: list[int]) -> None:
        """New row i is old row ``sources[i]`` (beam search reorders, batches are selected and repeated)."""
        self.thaw()
        if self.index == 0:
            self.state.take(sources)
        if not self.place:
            return
        same = len(sources) == len(self.place) and all(
            self.place[i][0] is self.place[s][0] for i, s in enumerate(sources)
        )
        if same:
            for bucket in self.buckets:
                self._take_within(bucket, [self.place[sources[row]][1] for row in bucket.rows])
            return
        if len(self.place) == 1:
            self.buckets, self._order = [self.buckets[0].spread(len(sources))], None
            return self._find_rows()
        old, lengths = self.place, self.lengths()
        first = self.buckets[0]
        self._allocate([lengths[s] for s in sources], first.keys, first.values)
        for row, source in enumerate(sources):
            self.copy_row(row, *old[source], lengths[source])
        self._set_lengths([lengths[s] for s in sources])

    def copy_row(self, row: int, was: Bucket, j: int, n: int) -> None:
        """Row ``row`` gets the first ``n`` tokens of row ``j`` of another bucket; lengths are left to the caller."""
        bucket, i = self.place[row]
        bucket.keys[i, :, :n], bucket.values[i, :, :n] = was.keys[j, :, :n], was.values[j, :, :n]
        if bucket.positions is not None and was.positions is not None:
            bucket.positions[i, :n] = was.positions[j, :n]

    def _take_within(self, bucket: Bucket, local: list[int]) -> None:
        """Row i of the bucket is what its row ``local[i]`` was."""
        if local == list(range(len(local))):
            return
        key, device, once = tuple(local), bucket.keys.device, self.state.once
        at = once.of("local", key, device, make=lambda: from_host(key, device))
        bucket.take(at)
        if not bucket.equal:
            lens = once.of("taken", bucket.ragged, at, make=lambda: bucket.lens.index_select(0, at))
            bucket.hold(lens, bucket.sizes and [bucket.sizes[i] for i in local], bucket.upper)


def _seen(plan: Any, keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    """Of a prefill's keys and values what is cached, how much of it is each row's, and where it stands."""
    now = plan.taking
    if now is None:
        return keys, values, plan.lengths, plan.positions
    positions = None if plan.positions is None else plan.positions.index_select(0, now.seen)
    return keys.index_select(2, now.seen), values.index_select(2, now.seen), now.seen_lengths, positions


def is_ragged(cache: Any) -> bool:
    """True for a cache whose layers are vtr's."""
    layers = getattr(cache, "layers", None) or [None]
    return isinstance(layers[0], RaggedLayer)
