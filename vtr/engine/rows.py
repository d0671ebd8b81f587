"""One row of the batch, packed: which of its tokens are still there, and where they came from.

A row is text and vision tokens, each with their row-local indices: places in the row's part of the packed sequence,
counted anew whenever something is cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from vtr.base import Policy, Tokens
from vtr.engine.captures import Place
from vtr.engine.checks import GuardedFields
from vtr.engine.trace import RowTrace, Sources
from vtr.image import Layout

FIELDS = ("tile", "y", "x", "newline")


@dataclass(frozen=True, eq=False)
class RowInput:
    """What a call says of one row, before anything is reduced; tensors are on the CPU.

    Attributes:
        index: which row of the batch. policy: what reduces it, or None.
        slots: int64 [n], logical slots of the row's tokens (padding left out), ascending.
        is_vision: bool [n].
        layouts, places: the row's images, in order; empty where the row is treated as text only.
        answer_start: logical slot from which on text was decoded, or given as the answer (it ranks nothing).
    """

    index: int
    policy: Policy | None
    slots: torch.Tensor
    is_vision: torch.Tensor
    layouts: list[Layout]
    places: list[Place]
    answer_start: int


class TextTokens:
    """The text of a row.

    Attributes:
        index: int64 [t], row-local, ascending. prompt: how many of them, the first ones, are no answer.
        queries: int64 [q], which of the text tokens may rank vision tokens.
        rankable: False if some vision token has no such query after it.
        answer_slots: int64 [a], logical slots of the answer.
        decoded: int64, row-local: the answer but for its newest token, which a run without a cache meets again.
    """

    def __init__(self, given: RowInput, vision: torch.Tensor) -> None:
        text = (~given.is_vision).nonzero().squeeze(1)
        first, last = (int(vision[0]), int(vision[-1])) if len(vision) else (0, -1)
        in_prompt = given.slots[text] < given.answer_start
        answer = text[~in_prompt]
        self.index, self.prompt = text, len(text) - len(answer)
        self.queries = ((text > first) & in_prompt).nonzero().squeeze(1)
        self.rankable = bool(((text > last) & in_prompt).any())
        self.answer_slots, self.decoded = given.slots[answer], answer[:-1]

    def ranking(self, kind: str) -> torch.Tensor:
        """Row-local indices of the text tokens that rank: the last one, or all after the first vision token."""
        chosen = self.queries[-1:] if kind.startswith("last") else self.queries
        return self.index.index_select(0, chosen)

    def renumber(self, kept: torch.Tensor) -> None:
        """Only the row's tokens ``kept`` (row-local, ascending; all of the text among them) are left."""
        self.index, self.decoded = torch.searchsorted(kept, self.index), torch.searchsorted(kept, self.decoded)


@dataclass(eq=False)
class VisionTokens:
    """The vision tokens of a row, as they entered the text model and as they are now.

    Attributes:
        index: int64 [count], row-local, ascending: those still there.
        fields: tile, y, x, newline and image of all that entered the text model: int64 [total] each.
        per_image: how many of them each image has.
        origin: int64 [total] on the CPU: logical slots, -1 for a pooled one.
        original: how many there were before ``compress``.
        sources: of a compressed row, what the new tokens of each image were made from.
        layer_features: [total, D] each: what is added to them behind the first layers.
        alive: int64 [count], which of the ``total`` are still there; None for all.
    """

    index: torch.Tensor
    fields: dict[str, torch.Tensor]
    per_image: tuple[int, ...]
    origin: torch.Tensor
    original: int
    sources: list[Sources] | None = None
    layer_features: list[torch.Tensor] = field(default_factory=list)
    alive: torch.Tensor | None = None
    total: int = field(init=False)
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = self.count = len(self.index)

    @classmethod
    def from_input(cls, given: RowInput) -> VisionTokens:
        index, layouts, fields = given.is_vision.nonzero().squeeze(1), given.layouts, {}
        if layouts:
            fields = {name: torch.cat([getattr(layout, name) for layout in layouts]) for name in FIELDS}
            fields["image"] = torch.cat([torch.full((len(layout),), i) for i, layout in enumerate(layouts)])
        return cls(index, fields, tuple(map(len, layouts)), given.slots[index], len(index))

    def values(self, name: str) -> torch.Tensor:
        """int64 [count]: the field ``name`` of the tokens still there."""
        found = self.fields[name]
        return found if self.alive is None else found.index_select(0, self.alive)

    def alive_after(self, keep: torch.Tensor) -> torch.Tensor:
        """``keep``, an index into the tokens still there, as one into those that entered the text model."""
        return keep if self.alive is None else self.alive.index_select(0, keep)


class Row:
    """A row of a packed forward.

    Attributes:
        given: what the call says of it. index: which row of the packed batch. policy: what reduces it, or None.
        slots: int64 [n] on the CPU: logical slots of the tokens that entered the text model.
        kept: int64 [length], which of ``slots`` are still there; None for all.
        length: tokens still there, text and vision.
    """

    def __init__(self, given: RowInput) -> None:
        self.given, self.index, self.policy = given, given.index, given.policy
        self.slots, self.length = given.slots, len(given.slots)
        self.kept: torch.Tensor | None = None
        self.vision = VisionTokens.from_input(given)
        self.text = TextTokens(given, self.vision.index)

    def forked(self, index: int, policy: Policy | None) -> Row:
        """This row as it is now, as row ``index`` under ``policy``; cutting one of them leaves the other alone."""
        row = copy.copy(self)  # no tensor of a row is changed in place
        row.index, row.policy = index, policy
        row.text, row.vision = copy.copy(self.text), copy.copy(self.vision)
        return row

    def asks(self, question: str) -> bool:
        """Whether the row has a policy that answers ``question``."""
        return self.policy is not None and self.policy.asks(question)

    def to(self, device: torch.device) -> None:
        """Move the index tensors to the device, once, before the first layer; nobody waits for them to arrive."""

        def moved(t: torch.Tensor) -> torch.Tensor:
            return t.to(device, non_blocking=device.type == "cuda")  # back to the CPU one would have to wait

        text, vision = self.text, self.vision
        text.index, text.queries, text.decoded = moved(text.index), moved(text.queries), moved(text.decoded)
        vision.index, vision.fields = moved(vision.index), {name: moved(t) for name, t in vision.fields.items()}
        vision.alive = vision.alive if vision.alive is None else moved(vision.alive)
        self.kept = self.kept if self.kept is None else moved(self.kept)

    # -- what policies see -----------------------------------------------------------------------------------------
    def tokens(
        self, layer: int, depth: int, hidden: torch.Tensor, scores: torch.Tensor | None,
        ahead: Callable[[], torch.Tensor],
    ) -> Tokens:  # fmt: skip
        """What the policy sees. hidden: [n, D], the row's tokens entering the layer; scores: [n] or None."""
        vision = self.vision
        ranked = None if scores is None else scores.index_select(0, vision.index)
        fields = GuardedFields(partial(self._field, hidden))
        return Tokens(layer, depth, vision.total, vision.count, fields, ranked, ahead, vision.per_image, self.length)

    def _field(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        if name == "hidden":
            return hidden.index_select(0, self.vision.index)
        if name == "place":
            return self.vision.index
        if name == "text":
            return hidden.index_select(0, self.text.index[: self.text.prompt])
        return self.vision.values(name)

    # -- what becomes of it ----------------------------------------------------------------------------------------
    def shorten(self, vision: VisionTokens) -> torch.Tensor:
        """Before the decoder: ``vision`` (indices as before) instead of the row's; returns what is kept, as `cut`."""
        kept = self.with_text(vision.index)
        vision.index = torch.searchsorted(kept, vision.index)
        self.text.renumber(kept)
        self.vision, self.slots, self.length = vision, self.slots[kept], len(kept)
        return kept

    def cut(self, keep: torch.Tensor) -> torch.Tensor:
        """Drop all vision tokens but ``keep`` (ascending); returns the row-local indices that are kept, ascending."""
        vision = self.vision
        index = vision.index.index_select(0, keep)
        kept = self.with_text(index)
        self.text.renumber(kept)
        vision.index, vision.alive, vision.count = torch.searchsorted(kept, index), vision.alive_after(keep), len(keep)
        self._keep(kept)
        return kept

    def forget(self, remembered: torch.Tensor) -> torch.Tensor:
        """Drop the ``decoded`` tokens that are not ``remembered`` (bool [n]); returns what is kept, as :meth:`cut`."""
        text, vision = self.text, self.vision
        gone = torch.zeros(self.length, dtype=torch.bool, device=text.index.device)
        gone[text.decoded] = ~remembered
        kept = (~gone).nonzero().squeeze(1)
        text.index, text.decoded = text.index[~gone[text.index]], text.decoded[remembered]
        text.renumber(kept)
        vision.index = torch.searchsorted(kept, vision.index)
        self._keep(kept)
        return kept

    def _keep(self, kept: torch.Tensor) -> None:
        self.kept = kept if self.kept is None else self.kept.index_select(0, kept)
        self.length = len(kept)

    def with_text(self, vision: torch.Tensor) -> torch.Tensor:
        """Row-local indices of the text and of ``vision``, ascending."""
        return torch.cat([self.text.index, vision]).sort().values

    # -- out of the decoder ----------------------------------------------------------------------------------------
    def carriers(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every slot the row had: the slot, and the row-local index of the last surviving token up to it."""
        slots = self.given.slots.to(device, non_blocking=True)
        alive = self.slots.to(device, non_blocking=True)
        if self.kept is not None:
            alive = alive.index_select(0, self.kept)
        return slots, (torch.searchsorted(alive, slots, right=True) - 1).clamp_(min=0)

    def trace(self, offset: int) -> RowTrace:
        """What the report needs; ``offset`` is where this forward's slots start in the row the caller passed."""
        vision, spec = self.vision, self.policy.spec if self.policy else None
        slots = torch.where(vision.origin >= 0, vision.origin + offset, vision.origin) if offset else vision.origin
        sources = vision.sources and [Sources(s.slots + offset, s.made_of) for s in vision.sources]
        return RowTrace(spec, slots, sources, original=vision.original)


def spans(rows: Sequence[Row]) -> list[tuple[Row, slice]]:
    """Each row and where it lies in the packed sequence."""
    found, start = [], 0
    for row in rows:
        end = start + row.length
        found.append((row, slice(start, end)))
        start = end
    return found


def packed_indices(parts: Sequence[torch.Tensor | None], before: list[int], device: torch.device) -> torch.Tensor:
    """Row-local indices (None = the whole row) as indices into the packed sequence."""
    out, start = [], 0
    for part, n in zip(parts, before, strict=True):
        out.append(torch.arange(start, start + n, device=device) if part is None else part + start)
        start += n
    return out[0] if len(out) == 1 else torch.cat(out)
