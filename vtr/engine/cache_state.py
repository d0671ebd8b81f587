"""What the layers of a ragged cache have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch

from vtr.base import Policy
from vtr.engine.once import Once, from_host

UNKNOWN, PADDING = -1, -2
"""In place of a column's token: one that was decoded or came as an embedding; none at all."""


@dataclass(frozen=True)
class Constant:
    """How a ``generate`` decodes with constant shapes.

    Attributes:
        room: tokens that each row may get. compiles: whether transformers compiles its steps.
        captures: whether they are captured as a CUDA graph.
    """

    room: int
    compiles: bool = False
    captures: bool = False


@dataclass(eq=False)
class CacheState:
    """What the engine knows of a ragged cache between calls; shared by the layers, carried by the cache object."""

    policies: list[Policy | None]
    dropped: list[int]
    """Per row: how many positions the prompt really lost before the decoder (compression renumbers positions)."""
    shift: list[list[int]] = field(default_factory=list)
    """Per layer and row: how many positions more were lost by cuts in the decoder that renumber."""
    constant: Constant | None = None
    """How it decodes with constant shapes; None if its storage grows."""
    logical: int = 0
    tail: int = 0
    """Tokens appended since the last reduction, the same for every row: what ``crop`` may take back."""
    exact: bool = True
    """False once ``remember`` has refused a token: rows then end at different places."""
    floor: int = 0
    """Logical length that ``crop`` cannot go below: tokens that a sliding window would need are gone."""
    apart: bool = False
    """Whether rows of compiled steps lie apart, in this layer and all behind it."""
    decoding: Any = None
    """Who has the rows while they decode with constant shapes (``vtr/engine/static.py``), or hold more than has been
    said (``vtr/engine/ahead.py``); else None."""
    seen: torch.Tensor | None = None
    """int64 [rows, n] on the CPU: the tokens of its first columns, ``UNKNOWN`` and ``PADDING`` among them."""
    rope_deltas: torch.Tensor | None = None
    """int64 [rows, 1]: what M-RoPE adds to positions of text to come. The model has those of its last prompt only."""
    attempt: Any = None
    """The trace of the try that fills it, while it is one; None for the cache of a call."""
    memos: list[dict[str, Any]] = field(default_factory=list)
    once: Once = field(default_factory=Once)
    """What the layers share within one forward, or one reordering of the rows."""
    _lists: Once = field(default_factory=Once)

    def on_device(self, values: Sequence[int], device: torch.device) -> torch.Tensor:
        """int64: ``values`` that come again at every step (rows of a bucket, shifts), copied to the device once."""
        key = tuple(values)
        return cast(torch.Tensor, self._lists.of("list", key, device, make=lambda: from_host(key, device)))

    def no_mask(self, device: torch.device) -> torch.Tensor:
        """A 4-D mask, which transformers takes as it is: none is built."""
        make = partial(torch.ones, 1, 1, 1, 1, dtype=torch.bool, device=device)
        return cast(torch.Tensor, self._lists.of("no mask", device, make=make))

    def note(self, ids: torch.Tensor | None, valid: torch.Tensor | None, rows: int, columns: int) -> None:
        """The next ``columns`` hold these tokens. ids: int64, valid: bool [rows, columns or fewer], on the CPU."""
        seen = torch.full((rows, self.logical + columns), UNKNOWN)
        if self.seen is not None:
            old = self.seen[:, : self.logical]  # a forward that failed may have left more
            seen[:, : old.shape[1]] = old
        here = seen[:, self.logical :]
        if ids is not None:
            here[:, : ids.shape[1]] = ids
        if valid is not None:
            here[:, : valid.shape[1]].masked_fill_(~valid, PADDING)
        self.seen = seen

    def gaps(self) -> list[int]:
        """Per row: columns of padding behind its first token."""
        assert self.seen is not None
        there = self.seen != PADDING
        return ((~there) & (there.cumsum(1) > 0)).sum(1).tolist()

    def alike(self) -> bool:
        """Whether nothing is known of one row that is not known of all."""
        first = self.policies[0]
        return all(p is first for p in self.policies) and all(
            len(set(numbers)) == 1 for numbers in (self.dropped, *self.shift)
        )

    def take(self, sources: list[int]) -> None:
        self.policies = [self.policies[s] for s in sources]
        self.dropped = [self.dropped[s] for s in sources]
        self.shift = [[layer[s] for s in sources] for layer in self.shift]
        self.seen = None if self.seen is None else self.seen[sources]
        if self.rope_deltas is not None:
            self.rope_deltas = self.rope_deltas.index_select(0, from_host(sources, self.rope_deltas.device))

    def crop(self, tokens: int) -> None:
        """The last ``tokens`` columns are gone."""
        self.logical -= tokens
        self.tail -= tokens
        self.seen = None if self.seen is None else self.seen[:, : self.logical]

    def reset(self) -> None:
        """No rows are left; the next prompt makes a state of its own."""
        self.decoding = self.seen = None
        self.logical = self.tail = self.floor = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheState:
        """What it says of the rows, for layers that copy them; nothing that is under way."""
        return replace(
            self, policies=self.policies[:], dropped=self.dropped[:], shift=[layer[:] for layer in self.shift],
            decoding=None, memos=[], once=Once(), _lists=Once(),
        )  # fmt: skip
