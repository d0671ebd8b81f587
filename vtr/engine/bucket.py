"""Dense storage of keys and values of rows of similar length."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def block(length: int) -> int:
    """By how many tokens a bucket of ``length`` grows."""
    return max(8, length // 10)


@dataclass(eq=False)
class Bucket:
    """Rows of similar length. keys, values: [b, kv_heads, capacity, head_dim], left aligned."""

    rows: list[int]
    keys: torch.Tensor
    values: torch.Tensor
    lens: torch.Tensor
    """int64 [b] on the device: tokens really there."""
    upper: int
    """An upper bound of ``lens`` known without asking the device."""
    equal: bool
    """True if every row has exactly ``upper`` tokens."""
    positions: torch.Tensor | None = None
    """int64 [b, capacity]: of the cached tokens; only where a sliding window asks for them."""

    def grow(self, capacity: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.upper] = old[:, :, : self.upper]
            setattr(self, name, new)
        if self.positions is not None:
            missing = capacity - self.positions.shape[1]
            self.positions = torch.nn.functional.pad(self.positions, (0, missing))

    def unseen(self, coming: torch.Tensor, window: int, slack: int = 0) -> torch.Tensor:
        """int64 [b]: how many tokens at each row's beginning none from position ``coming`` ([b]) on can see.

        Args:
            slack: so many positions behind the window are to be seen too.
        """
        assert self.positions is not None
        seen = self.positions[:, : self.upper] > (coming - window - slack)[:, None]
        there = torch.arange(self.upper, device=self.lens.device) < self.lens[:, None]
        return (there & (seen.cumsum(1) == 0)).sum(1)

    def shift(self, by: torch.Tensor, lens: list[int], capacity: int) -> None:
        """Take ``by`` ([b]) tokens off each row's beginning, which leaves ``lens``, into a storage of ``capacity``."""
        assert self.positions is not None
        device, last = self.keys.device, self.keys.shape[2] - 1
        index = (torch.arange(capacity, device=device) + by[:, None]).clamp_(max=last)
        for name in ("keys", "values"):
            old = getattr(self, name)
            setattr(self, name, old.gather(2, index[:, None, :, None].expand(*old.shape[:2], -1, old.shape[3])))
        self.positions = self.positions.gather(1, index)
        self.lens, self.upper, self.equal = self.lens - by, max(lens), len(set(lens)) == 1


@dataclass(eq=False)
class Storage:
    """What the buckets of one layer are parts of, so that a prefill writes them all at once.

    Attributes:
        keys, values: [cells, kv_heads, head_dim]. positions: int64 [cells]; None without a sliding window.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor | None

    @classmethod
    def like(cls, keys: torch.Tensor, values: torch.Tensor, cells: int, windowed: bool) -> Storage:
        """Zeros for so many tokens. keys, values: [1, kv_heads, T, head_dim], their sizes and dtypes."""
        made = [t.new_zeros(cells, t.shape[1], t.shape[3]) for t in (keys, values)]
        at = torch.zeros(cells, dtype=torch.int64, device=keys.device) if windowed else None
        return cls(made[0], made[1], at)

    def bucket(self, rows: list[int], first: int, capacity: int) -> Bucket:
        """An empty bucket of these rows, from cell ``first`` on."""
        here = slice(first, first + len(rows) * capacity)

        def part(t: torch.Tensor) -> torch.Tensor:
            return t[here].unflatten(0, (len(rows), capacity))

        lens = torch.zeros(len(rows), dtype=torch.int64, device=self.keys.device)
        at = None if self.positions is None else part(self.positions)
        return Bucket(rows, part(self.keys).transpose(1, 2), part(self.values).transpose(1, 2), lens, 0, True, at)
