"""One row of the batch before the decoder: which of its tokens enter it, and where they came from.

A row is text and vision tokens, each with their row-local indices. What becomes of the tokens of all rows from layer to
layer is kept in :class:`~vtr.engine.packed.Packed`.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from vtr.base import Policy
from vtr.engine.captures import Place
from vtr.engine.trace import RowTrace, Sources
from vtr.image import Layout

FIELDS = ("tile", "group", "y", "x", "newline", "frame")


@dataclass(frozen=True, eq=False)
class RowInput:
    """What a call says of one row, before anything is reduced; tensors are on the CPU.

    Attributes:
        index: which row of the batch. policy: what reduces it, or None.
        slots: int64 [n], logical slots of the row's tokens (padding left out), ascending.
        is_vision: bool [n].
        layouts, places: the row's images, in order; empty where the row is treated as text only.
        answer_start: logical slot from which on text was decoded, or given as the answer (it ranks nothing).
        ids: int64 [n], the row's tokens; None where they are not known.
    """

    index: int
    policy: Policy | None
    slots: torch.Tensor
    is_vision: torch.Tensor
    layouts: list[Layout]
    places: list[Place]
    answer_start: int
    ids: torch.Tensor | None = None


class TextTokens:
    """The text of a row.

    Attributes:
        index: int64 [t], row-local, ascending. prompt: how many of them, the first ones, are no answer.
        queries: int64 [q], which of the text tokens may rank vision tokens.
        rankable: False if some vision token has no such query after it.
        first, last: the numbers of the first and the last of the queries; -1 where there is none.
        first_behind: the number of the first text token behind the last vision token.
        behind, last_behind: whether all of them, or the last one, stand behind all vision tokens.
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
        self.first, self.last = (int(self.queries[0]), int(self.queries[-1])) if len(self.queries) else (-1, -1)
        self.first_behind = int((text < last).sum())
        self.behind = self.first >= 0 and int(text[self.first]) > last
        self.last_behind = self.last >= 0 and int(text[self.last]) > last
        self.rankable = bool(((text > last) & in_prompt).any())
        self.answer_slots, self.decoded = given.slots[answer], answer[:-1]

    def renumber(self, kept: torch.Tensor) -> None:
        """Only the row's tokens ``kept`` (row-local, ascending; all of the text among them) are left."""
        self.index, self.decoded = torch.searchsorted(kept, self.index), torch.searchsorted(kept, self.decoded)


@dataclass(eq=False)
class VisionTokens:
    """The vision tokens of a row, as they entered the text model and as they are now.

    Attributes:
        index: int64 [count], row-local, ascending: those still there.
        fields: tile, group, y, x, newline, frame and image of all that entered the text model: int64 [total] each.
        per_image: how many of them each image has.
        origin: int64 [total] on the CPU: logical slots, -1 for a pooled one.
        original: how many there were before ``compress``.
        sources: of a compressed row, what the new tokens of each image were made from.
        layer_features: [total, D] each: what is added to them behind the first layers.
    """

    index: torch.Tensor
    fields: dict[str, torch.Tensor]
    per_image: tuple[int, ...]
    origin: torch.Tensor
    original: int
    sources: list[Sources] | None = None
    layer_features: list[torch.Tensor] = field(default_factory=list)
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


class Row:
    """A row of a packed forward.

    Attributes:
        given: what the call says of it. index: which row of the packed batch. policy: what reduces it, or None.
        slots: int64 [n] on the CPU: logical slots of the tokens that entered the text model.
        length: tokens still there, text and vision.
        memo: what the policy keeps for itself while the forward runs.
        gauged: whether its cuts are gauged (``vtr/engine/gauging.py``).
    """

    def __init__(self, given: RowInput, gauged: bool = False) -> None:
        self.gauged = gauged
        self.given, self.index, self.policy = given, given.index, given.policy
        self.slots, self.length = given.slots, len(given.slots)
        self.vision = VisionTokens.from_input(given)
        self.text = TextTokens(given, self.vision.index)
        self.memo: dict[str, Any] = {}

    def forked(self, index: int, policy: Policy | None) -> Row:
        """This row as it is now, as row ``index`` under ``policy``; cutting one of them leaves the other alone."""
        row = copy.copy(self)  # no tensor of a row is changed in place
        row.index, row.policy = index, policy
        row.text, row.vision = copy.copy(self.text), copy.copy(self.vision)
        row.memo = dict(self.memo) if policy is self.policy else {}
        return row

    def move_memo(self, device: torch.device) -> None:
        """Tensors the policy keeps (in lists, tuples and dataclasses too) go where the row's tokens are now."""
        for name, value in self.memo.items():
            self.memo[name] = _moved(value, device)

    def asks(self, question: str) -> bool:
        """Whether the row has a policy that answers ``question``."""
        return self.policy is not None and self.policy.asks(question)

    # -- what becomes of it ----------------------------------------------------------------------------------------
    def shorten(self, vision: VisionTokens) -> torch.Tensor:
        """Before the decoder: ``vision`` (indices as before) instead of the row's; returns what is kept."""
        kept = self.with_text(vision.index)
        vision.index = torch.searchsorted(kept, vision.index)
        self.text.renumber(kept)
        self.vision, self.slots, self.length = vision, self.slots[kept], len(kept)
        return kept

    def with_text(self, vision: torch.Tensor) -> torch.Tensor:
        """Row-local indices of the text and of ``vision``, ascending."""
        return torch.cat([self.text.index, vision]).sort().values

    def trace(self, offset: int, first: int) -> RowTrace:
        """What the report needs.

        Args:
            offset: where this forward's slots start in the row the caller passed. first: see ``RowTrace``.
        """
        vision, spec = self.vision, self.policy.spec if self.policy else None
        slots = torch.where(vision.origin >= 0, vision.origin + offset, vision.origin) if offset else vision.origin
        sources = vision.sources and [Sources(s.slots + offset, s.made_of) for s in vision.sources]
        return RowTrace(spec, slots, first, sources, original=vision.original)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _moved(one, device) for name, one in fields.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(one, device) for one in value))
    return type(value)(_moved(one, device) for one in value) if type(value) in (list, tuple) else value
