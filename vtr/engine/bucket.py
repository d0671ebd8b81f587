"""Dense storage of keys and values of rows of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from vtr.engine.once import Once, from_host

SIMILAR = 0.92
"""Rows at least this fraction of a bucket's longest row may share the bucket."""

SPARE = 0.12
"""Buckets are joined as long as their rows, each as long as its bucket's longest, take no more than this beyond what
they hold."""

CALL = {"cpu": 2**19}
"""What a bucket of its own costs a decoded token, in bytes of keys and values that could be read instead."""

CALL_ELSEWHERE = 2**25


def block(length: int) -> int:
    """By how many tokens a bucket of ``length`` grows."""
    return max(8, length // 10)


def roomy(length: int, room: int) -> int:
    """Storage for ``length`` tokens and ``room`` more, on a coarse grid, so that other prompts find the same shapes."""
    step = max(8, 1 << max(length.bit_length() - 4, 0))  # eight to sixteen of them are the length
    return -(-length // step) * step + -(-room // 8) * 8


def grouped(lengths: Sequence[int], token_bytes: int, device: torch.device) -> list[list[int]]:
    """Which rows share a bucket, the longest first.

    Args:
        lengths: tokens of each row. token_bytes: of one token's keys and values.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if groups and lengths[row] >= SIMILAR * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    live, most = sum(lengths), CALL.get(device.type, CALL_ELSEWHERE)
    spare = (1 + SPARE) * live - sum(lengths[rows[0]] * len(rows) for rows in groups)
    while len(groups) > 1:
        adds = [(lengths[a[0]] - lengths[b[0]]) * len(b) for a, b in pairwise(groups)]
        least = min(adds)
        if least > spare or least * token_bytes > most:
            break
        spare, i = spare - least, adds.index(least)
        groups[i : i + 2] = [groups[i] + groups[i + 1]]
    return groups


def alike_in_shape(lengths: Sequence[int], apart: bool) -> list[list[int]]:
    """Rows that share a bucket where the steps are compiled: all of them, or each has its own.

    How rows are grouped is part of what is compiled, so that grouping them by their lengths would compile most batches
    anew. Together they lie where padding costs at most a quarter, unless they have been ``apart`` in a layer before.
    """
    rows = range(len(lengths))
    together = not apart and len(rows) * max(lengths) <= 1.25 * sum(lengths)
    return [list(rows)] if together or len(rows) == 1 else [[row] for row in rows]


@dataclass(eq=False)
class Bucket:
    """Rows of similar length. keys, values: [b, kv_heads, capacity, head_dim], left aligned."""

    rows: list[int]
    keys: torch.Tensor
    values: torch.Tensor
    upper: int = 0
    """An upper bound of the rows' lengths known without asking the device."""
    sizes: list[int] | None = None
    """Tokens of each row, where the host knows them and they differ."""
    ragged: torch.Tensor | None = None
    """int64 [b] on the device: tokens of each row; None where every row has exactly ``upper``."""
    positions: torch.Tensor | None = None
    """int64 [b, capacity]: of the cached tokens; only where a sliding window asks for them."""
    part_of: Storage | None = None
    """The storage of the whole layer that it still is a part of."""
    shared: bool = False
    """Whether forks read the same storage: who writes first takes a copy."""
    asked: Longest | None = None
    """Of rows whose lengths only the device knows, the longest, once it has been asked for."""

    @property
    def equal(self) -> bool:
        """True if every row has exactly ``upper`` tokens."""
        return self.ragged is None

    @property
    def lens(self) -> torch.Tensor:
        """int64 [b] on the device: tokens really there."""
        if self.ragged is None:
            return torch.full((len(self.rows),), self.upper, dtype=torch.int64, device=self.keys.device)
        return self.ragged

    def known(self) -> list[int] | None:
        """Tokens of each row; None where only the device knows."""
        return [self.upper] * len(self.rows) if self.equal else self.sizes

    def live(self) -> Any:
        """Tokens of all rows: an int, or a 0-d tensor where only the device knows."""
        if self.ragged is None:
            return self.upper * len(self.rows)
        return self.ragged.sum() if self.sizes is None else sum(self.sizes)

    def hold(self, lens: torch.Tensor | None, sizes: list[int] | None, upper: int = 0) -> None:
        """The rows have so many tokens now. ``lens`` may be None where ``sizes`` are all the same.

        Args:
            upper: a bound where the host does not know the sizes.
        """
        if sizes is None:
            self.ragged, self.sizes, self.upper = lens, None, upper
            return
        same = len(set(sizes)) == 1
        self.ragged, self.sizes, self.upper = (None if same else lens), (None if same else sizes), max(sizes)
        self.asked = None

    def fill(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None) -> None:
        """Write all that its rows have, of ``upper`` tokens each: [1, kv_heads, T, head_dim], row behind row."""
        rows, n = len(self.rows), self.upper
        for store, new in ((self.keys, keys), (self.values, values)):
            store[:, :, :n] = new[0].unflatten(1, (rows, n)).transpose(0, 1)
        if self.positions is not None and positions is not None:
            self.positions[:, :n] = positions.view(rows, n)

    def forked(self) -> Bucket:
        """The same rows once more. Both read one storage from now on, until either writes."""
        self.part_of, self.shared = None, True
        return replace(self, rows=self.rows[:], asked=None)

    def spread(self, rows: int) -> Bucket:
        """Its only row as so many rows, which read what there is of it."""
        many = [
            None if t is None else t.expand(rows, *t.shape[1:])
            for t in (self.keys, self.values, self.ragged, self.positions)
        ]
        return Bucket(list(range(rows)), many[0], many[1], self.upper, None, many[2], many[3], shared=True)  # type: ignore[arg-type]

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None, once: Once) -> None:
        """Write one token more behind each row's last: [b, kv_heads, 1, head_dim] each; positions: int64 [b]."""
        if self.shared:
            self.grow(self.keys.shape[2])
        if self.ragged is None:
            self.keys.narrow(2, self.upper, 1).copy_(keys)
            self.values.narrow(2, self.upper, 1).copy_(values)
            if positions is not None and self.positions is not None:
                self.positions[:, self.upper] = positions
            return
        where = self.ragged
        k, v = once.of(
            "where", where, keys.shape, values.shape,
            make=lambda: [where[:, None, None, None].expand(t.shape) for t in (keys, values)],
        )  # fmt: skip
        self.keys.scatter_(2, k, keys)
        self.values.scatter_(2, v, values)
        if positions is not None and self.positions is not None:
            self.positions.scatter_(1, where[:, None], positions[:, None])

    def grow(self, capacity: int) -> None:
        """Move to a storage of its own with room for ``capacity`` tokens a row."""
        self.part_of, self.shared = None, False
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.upper] = old[:, :, : self.upper]
            new[:, :, self.upper :].zero_()  # a mask hides what is there, but not if it is no number
            setattr(self, name, new)
        if self.positions is not None:
            missing = capacity - self.positions.shape[1]
            self.positions = torch.nn.functional.pad(self.positions, (0, missing))

    def take(self, index: torch.Tensor) -> None:
        """Row i of the bucket is what row ``index[i]`` (int64 [b]) was; the lengths are left to the caller."""
        self.part_of, self.shared = None, False
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, index)

    def unseen(self, coming: torch.Tensor, window: int, slack: int = 0) -> torch.Tensor:
        """int64 [b]: how many tokens at each row's beginning none from position ``coming`` ([b]) on can see.

        Args:
            slack: so many positions behind the window are to be seen too.
        """
        assert self.positions is not None
        seen = self.positions[:, : self.upper] > (coming - window - slack)[:, None]
        there = torch.arange(self.upper, device=self.keys.device) < self.lens[:, None]
        return (there & (seen.cumsum(1) == 0)).sum(1)

    def shift(self, by: torch.Tensor, left: list[int] | int, capacity: int) -> None:
        """Take ``by`` ([b]) tokens off each row's beginning into a storage of ``capacity``.

        Args:
            left: how many that leaves each row, or a bound where only the device knows.
        """
        assert self.positions is not None
        self.part_of, self.shared = None, False
        device, last = self.keys.device, self.keys.shape[2] - 1
        index = (torch.arange(capacity, device=device) + by[:, None]).clamp_(max=last)
        for name in ("keys", "values"):
            old = getattr(self, name)
            setattr(self, name, old.gather(2, index[:, None, :, None].expand(*old.shape[:2], -1, old.shape[3])))
        self.positions = self.positions.gather(1, index)
        self.asked, known = None, left if isinstance(left, list) else None
        self.hold(self.lens - by, known, 0 if isinstance(left, list) else left)


class Longest:
    """The longest row of a bucket on a GPU, on its way to the host: asked for before it is needed, waited for never."""

    def __init__(self, bucket: Bucket) -> None:
        assert bucket.ragged is not None
        self.upper = bucket.upper
        self.value = bucket.ragged.max().to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event()
        self.arrived.record(torch.cuda.current_stream(bucket.keys.device))

    def bound(self, bucket: Bucket) -> int:
        """An upper bound of the bucket's lengths as they are now: exact to the tokens that have come since."""
        return int(self.value) + bucket.upper - self.upper if self.arrived.query() else bucket.upper


@dataclass(frozen=True, eq=False)
class Cells:
    """Where the packed tokens of a prefill are stored.

    Attributes:
        into: int64 [n], the cell of each token that is kept.
        source: int64 [n], which packed tokens these are; None: all.
    """

    into: torch.Tensor
    source: torch.Tensor | None

    @classmethod
    def of(cls, buckets: Sequence[Bucket], lengths: Sequence[int], kept: Sequence[int], device: torch.device) -> Cells:
        """Of each row the last ``kept`` of its ``lengths`` tokens, from its first cell on."""
        first_cell, at = [0] * len(kept), 0
        for bucket in buckets:
            for row in bucket.rows:
                first_cell[row], at = at, at + bucket.keys.shape[2]
        here = [cell - before for cell, before in zip(first_cell, accumulate([0, *kept]), strict=False)]
        gone = [n - k for n, k in zip(lengths, kept, strict=True)]
        table, total = from_host([here, list(accumulate(gone)), list(kept)], device), sum(kept)
        each = torch.arange(total, device=device)
        into = each + table[0].repeat_interleave(table[2], output_size=total)
        return cls(into, each + table[1].repeat_interleave(table[2], output_size=total) if any(gone) else None)

    def pick(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of all packed tokens, [T] or [kv_heads, T, head_dim], those that are kept."""
        return tokens if self.source is None else tokens.index_select(max(tokens.dim() - 2, 0), self.source)


@dataclass(eq=False)
class Storage:
    """What the buckets of one layer are parts of, so that a prefill writes them all at once.

    Attributes:
        keys, values: [kv_heads, cells, head_dim], so that a head reads a row's tokens in one piece.
        positions: int64 [cells]; None without a sliding window.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor | None

    @classmethod
    def like(cls, keys: torch.Tensor, values: torch.Tensor, cells: int, windowed: bool) -> Storage:
        """Room for so many tokens. keys, values: [1, kv_heads, T, head_dim], their sizes and dtypes."""
        made = [t.new_empty(t.shape[1], cells, t.shape[3]) for t in (keys, values)]
        at = torch.zeros(cells, dtype=torch.int64, device=keys.device) if windowed else None
        return cls(made[0], made[1], at)

    def write(self, cells: Cells, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None) -> None:
        """Store packed tokens, [1, kv_heads, T, head_dim] each; positions: int64 [T]."""
        for store, new in ((self.keys, keys), (self.values, values)):
            store.index_copy_(1, cells.into, cells.pick(new[0]))
        if self.positions is not None and positions is not None:
            self.positions.index_copy_(0, cells.into, cells.pick(positions))

    def clear(self, buckets: Sequence[Bucket], shortest: Sequence[int]) -> None:
        """Zeros where no token will be written: a mask hides what is there, but not if it is no number.

        Args:
            shortest: of each bucket, the tokens of its shortest row.
        """
        if self.keys.device.type != "cpu":  # a launch for all is cheaper than one a bucket
            self.keys.zero_()
            self.values.zero_()
            return
        for bucket, n in zip(buckets, shortest, strict=True):
            bucket.keys[:, :, n:].zero_()
            bucket.values[:, :, n:].zero_()

    def bucket(self, rows: list[int], first: int, capacity: int) -> Bucket:
        """An empty bucket of these rows, from cell ``first`` on."""
        b = len(rows)

        def part(t: torch.Tensor, dim: int) -> torch.Tensor:
            return t.narrow(dim, first, b * capacity).unflatten(dim, (b, capacity))

        at = None if self.positions is None else part(self.positions, 0)
        keys, values = part(self.keys, 1).transpose(0, 1), part(self.values, 1).transpose(0, 1)
        return Bucket(rows, keys, values, positions=at, part_of=self)
