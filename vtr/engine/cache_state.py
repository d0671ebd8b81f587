"""What the layers of a ragged cache have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch

from vtr.base import Policy
from vtr.engine.once import Once, from_host


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
    """Who has the rows while they decode with constant shapes, see ``vtr/engine/static.py``; else None."""
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
