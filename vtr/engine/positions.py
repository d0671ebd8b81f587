"""Where the packed tokens of a forward stand: their position ids, and the rotary embedding made of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch


class Positions:
    """Kept in step with which tokens are still there, from the first decoder layer to the last.

    Args:
        rotary: the text model's rotary embedding. rows: how many there are.

    Attributes:
        ids: int64 [1, T], or [axes, T] for positions of several axes. rope: cosine and sine, [1, T, d] each; empty
            until the text model has made them.
        first: per row, int64 [1] (or [axes, 1]): the position of its first token.
        shift: per row, what earlier turns' renumbering cuts took off the positions of this layer.
        lost: per row, tokens that cuts of this forward dropped and that its positions closed up over.
    """

    def __init__(self, rotary: Any, rows: int) -> None:
        self.rotary = rotary
        self.ids = torch.empty(0)
        self.rope: tuple[torch.Tensor, ...] = ()
        self.first: list[torch.Tensor] = []
        self.shift, self.lost = [0] * rows, [0] * rows

    def take_rope(self, kwargs: dict[str, Any]) -> None:
        """What the text model hands its first layer is rope of all packed tokens."""
        if not self.rope:
            self.rope = kwargs["position_embeddings"]

    def select(self, kept: torch.Tensor) -> None:
        """Only the packed tokens ``kept`` (int64 [t]) are left."""
        self.rope = tuple(t.index_select(1, kept) for t in self.rope)
        self.ids = self.ids.index_select(1, kept)

    def to(self, device: torch.device) -> None:
        self.rope, self.ids = tuple(t.to(device) for t in self.rope), self.ids.to(device)

    def step_down(self, shift: list[int], lengths: Sequence[int], hidden: torch.Tensor) -> None:
        """Enter a layer at which earlier turns' cuts have taken ``shift`` off every row. hidden: [1, T, D]."""
        by = torch.tensor([new - old for new, old in zip(shift, self.shift, strict=True)])
        per_token = by.repeat_interleave(torch.tensor(lengths))
        self.shift = shift
        self._become(self.ids - per_token.to(hidden.device, non_blocking=True), hidden)

    def close_up(self, lengths: Sequence[int], hidden: torch.Tensor) -> None:
        """Renumber rows over what cuts of a policy that renumbers took out of them. hidden: [1, T, D]."""
        parts = list(self.ids.split(list(lengths), 1))
        for i, n in enumerate(lengths):
            if self.lost[i]:
                closed = torch.arange(n, device=hidden.device) + self.first[i].to(hidden.device) - self.shift[i]
                parts[i] = closed[None]
        self._become(torch.cat(parts, 1), hidden)

    def _become(self, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        self.ids, self.rope = ids, tuple(t.to(hidden.device) for t in self.rotary(hidden, position_ids=ids))

    def fork(self, index: torch.Tensor, rows: Sequence[int]) -> Positions:
        """Those of the packed tokens ``index``, which are the given ``rows`` of these, without a cache."""
        made = copy.copy(self)
        made.shift = [0] * len(rows)
        made.first, made.lost = [self.first[row] for row in rows], [self.lost[row] for row in rows]
        if made.rope:
            made.select(index)
        return made


def many_axes(rotary: Any) -> bool:
    """Whether positions have several axes (M-RoPE)."""
    return getattr(rotary, "mrope_section", None) is not None
