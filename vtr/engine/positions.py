"""Where the packed tokens of a forward stand: their position ids, and the rotary embedding made of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from vtr.engine.once import from_host
from vtr.engine.rotary import Rotary, cut, moved


class Positions:
    """Kept in step with which tokens are still there, from the first decoder layer to the last.

    Args:
        rotary: of the text model. rows: how many there are.

    Attributes:
        ids: int64 [1, T], or [axes, T] for positions of several axes. slots: int64 [T], see :class:`Packed`.
        rope: what the layer about to run gets: as a rule cosine and sine, [1, T, d] each; None for a layer without
            rope; empty until the text model has made it.
        first: int64 [rows], the position of each row's first token; None where no row can close up.
        shift: per row, what earlier turns' renumbering cuts took off the positions of this layer.
        lost: per row, tokens that cuts of this forward dropped and that its positions close up over.
        closes: per row, whether a policy that renumbers has cut it in this forward; a merge may leave nothing lost.
        open: whether some row has been cut so since positions were closed up.
    """

    def __init__(self, rotary: Rotary, rows: int) -> None:
        self.rotary = rotary
        self.first: torch.Tensor | None = None
        self.shift, self.lost, self.closes = [0] * rows, [0] * rows, [False] * rows
        self.open = False
        self._table = torch.empty(2, 0, dtype=torch.int64)  # ids, and below them the slots
        self._entered = self._table[-1]
        self.rope: Any = ()
        self._given: Any = ()  # what the text model made, of which ``rope`` is a part
        self._whole, self._renewed = True, False  # no token has gone; positions have changed
        self._kind: str | None = None
        self._both: torch.Tensor | None = None  # cosine and sine once more, one behind the other: they are cut together

    @property
    def ids(self) -> torch.Tensor:
        return self._table[:-1]

    @property
    def slots(self) -> torch.Tensor:
        return self._table[-1]

    def start(self, ids: torch.Tensor, slots: torch.Tensor) -> None:
        """The packed tokens as they enter the text model. ids: int64 [axes, T]. slots: int64 [T]."""
        self._table, self._entered = torch.cat([ids, slots[None]]), slots

    def take_rope(self, index: int, kwargs: dict[str, Any], hidden: torch.Tensor) -> None:
        """Layer ``index`` gets rope as the text model means it to, which made it for all layers or for some.

        Args:
            hidden: [1, T, D], the tokens that are left.
        """
        given, kind = kwargs["position_embeddings"], self.rotary.kinds[index]
        if self._renewed:  # what the text model made is of other positions
            if given is None or self.rope is None or kind != self._kind:
                self._take(None if given is None else self.rotary.of(kind, hidden, self.ids), kind, hidden.device)
        elif given is not self._given:
            self._given = given
            self._take(self.cut(given, hidden.device), kind, hidden.device)

    def _take(self, rope: Any, kind: str | None, device: torch.device) -> None:
        self.rope, self._kind, self._both = moved(rope, device), kind, None

    def cut(self, given: Any, device: torch.device) -> Any:
        """Of what is given for the tokens that entered the text model ([1, T, …]), that of those left; None of None.

        A made token has that of the one in front of it.
        """
        if self._whole or given is None:
            return given
        return cut(moved(given, device), torch.searchsorted(self._entered, self.slots))

    def select(self, kept: torch.Tensor) -> None:
        """Only the packed tokens ``kept`` (int64 [t]) are left."""
        self._whole = False
        if isinstance(self.rope, tuple) and len(self.rope) == 2:
            both = torch.stack(self.rope) if self._both is None else self._both
            self._both = both.index_select(2, kept)
            self.rope = self._both.unbind(0)
        else:
            self.rope = cut(self.rope, kept)
        self._table = self._table.index_select(1, kept)

    def to(self, device: torch.device) -> None:
        self.rope, self._both = moved(self.rope, device), None
        self._table, self._entered = self._table.to(device), self._entered.to(device)
        self.first = None if self.first is None else self.first.to(device)

    def step_down(self, shift: list[int], lengths: Sequence[int], hidden: torch.Tensor) -> None:
        """Enter a layer at which earlier turns' cuts have taken ``shift`` off every row. hidden: [1, T, D]."""
        by = torch.tensor([new - old for new, old in zip(shift, self.shift, strict=True)])
        per_token = by.repeat_interleave(torch.tensor(lengths))
        self.shift = shift
        self._become(self.ids - per_token.to(hidden.device, non_blocking=True), hidden)

    def lose(self, row: int, tokens: int) -> None:
        """A policy that renumbers has dropped so many of a row."""
        self.lost[row] += tokens
        self.closes[row] = self.open = True

    def close_up(self, starts: torch.Tensor, columns: int, hidden: torch.Tensor) -> None:
        """Renumber rows over what cuts of a policy that renumbers took out of them.

        Args:
            starts: int64 [rows + 1], where the rows begin in the packed sequence. columns: logical ones of a row.
            hidden: [1, T, D].
        """
        assert self.first is not None
        self.open = False
        offset = self.first - starts[:-1]
        if any(self.shift):
            offset = offset - from_host(self.shift, hidden.device)
        row = self.slots // columns if len(self.lost) > 1 else None
        offset = offset if row is None else offset.index_select(0, row)
        closed = torch.arange(self.slots.shape[0], device=hidden.device) + offset
        if row is not None and not all(self.closes):
            closes = from_host([int(one) for one in self.closes], hidden.device)
            closed = torch.where(closes.index_select(0, row) > 0, closed, self.ids[0])
        self._become(closed[None], hidden)

    def _become(self, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        self._table, self._renewed = torch.cat([ids, self._table[-1:]]), True
        rope = None if self.rope is None else self.rotary.of(self._kind, hidden, ids)
        self._take(rope, self._kind, hidden.device)

    def fork(self, index: torch.Tensor, moved: torch.Tensor, old: Sequence[int]) -> Positions:
        """Those of the packed tokens ``index``, which are the rows ``old`` of these, without a cache.

        Args:
            moved: int64 [T'], by how many slots each of them moves, being part of another row now.
        """
        made = copy.copy(self)
        made.select(index)
        made._table = torch.cat([made.ids, (made.slots + moved)[None]])
        if made.first is not None:
            made.first = made.first.index_select(0, from_host(old, index.device))
        made.shift, made.lost = [0] * len(old), [self.lost[row] for row in old]
        made.closes = [self.closes[row] for row in old]
        return made
