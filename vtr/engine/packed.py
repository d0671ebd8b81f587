"""Where the tokens of all rows lie in the packed sequence, as they are now: cut for all rows in one go.

A place is an index into the packed sequence, row behind row. Everything here is held once for all rows, so that a cut
launches as many kernels for thirty-two rows as for one, and comes from the host in one copy a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from vtr.base import UnsupportedError
from vtr.engine.rows import FIELDS, Row

NAMES = (*FIELDS, "image")


class Packed:
    """The rows' tokens on the device.

    Attributes:
        lengths, counts: per row, the tokens and the vision tokens still there. texts: its text tokens.
        vision: int64 [v], places of the vision tokens, ascending. text: int64 [t], of the text, ascending.
        starts: int64 [rows + 1], places at which the rows begin, and the end.
        alive: int64 [v], which of all vision tokens that entered the text model these are, counted through the rows.
        fields: name → int64 [vision tokens that entered]: tile, group, y, x, newline, frame and image.
        slots: int64 [tokens], of each token on entering the text model: row * logical columns + slot.
        first_vision: per row, where its vision tokens begin in that count.
        features: [vision tokens that entered, D] each: what is added to them behind the first layers.
        grown: whether tokens have been merged; the new ones are counted behind all that entered.
    """

    def __init__(self, rows: Sequence[Row], logical: int, device: torch.device) -> None:
        self.rows = rows
        self.lengths, self.counts = [row.length for row in rows], [row.vision.count for row in rows]
        self.texts = [len(row.text.index) for row in rows]
        starts, self.first_vision = sums(self.lengths), sums(self.counts)[:-1]
        total = sum(self.counts)
        fields = [_field_of(row, name) for name in NAMES for row in rows]
        text = [row.text.index + start for row, start in zip(rows, starts, strict=False)]
        self.vision, self._anchors, self.alive, self.slots, fields_of_all = on_device(
            [
                torch.cat([row.vision.index + start for row, start in zip(rows, starts, strict=False)]),
                torch.cat([*text, torch.tensor(starts)]),
                torch.arange(total),
                torch.cat([row.slots + i * logical for i, row in enumerate(rows)]),
                torch.cat(fields),
            ],
            device,
        )
        self.fields = dict(zip(NAMES, fields_of_all.split(total), strict=True)) if total else {}
        self.features: list[torch.Tensor] = []
        self.grown = False
        given = [row.vision.layer_features for row in rows if row.vision.total]
        for behind in zip(*given, strict=True) if given else ():
            self.features.append(torch.cat(behind))

    @property
    def text(self) -> torch.Tensor:
        return self._anchors[: -len(self.rows) - 1]

    @property
    def starts(self) -> torch.Tensor:
        return self._anchors[-len(self.rows) - 1 :]

    def to(self, device: torch.device) -> None:
        """Go on with layers on another device."""
        self.vision, self.alive, self.slots, self._anchors = (
            t.to(device) for t in (self.vision, self.alive, self.slots, self._anchors)
        )
        self.fields = {name: t.to(device) for name, t in self.fields.items()}
        self.features = [t.to(device) for t in self.features]

    # -- parts of it -----------------------------------------------------------------------------------------------
    def spans(self) -> list[slice]:
        """Where each row lies in the packed sequence."""
        return _slices(self.lengths)

    def vision_spans(self) -> list[slice]:
        """Where each row's vision tokens lie in ``vision`` and ``alive``."""
        return _slices(self.counts)

    def text_spans(self) -> list[slice]:
        """Where each row's text lies in ``text``."""
        return _slices(self.texts)

    def of_rows(self, values: torch.Tensor, rows: Sequence[int], spans: Sequence[slice]) -> torch.Tensor:
        """What of ``values`` (along dimension 0) lies in the spans of these rows."""
        if len(rows) == len(spans):
            return values
        parts = [values[spans[row]] for row in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decoded(self) -> list[slice]:
        """Of each row the places in ``text`` of what was decoded, but for its newest token."""
        found = []
        for row, here in zip(self.rows, self.text_spans(), strict=True):
            first = here.start + row.text.prompt
            found.append(slice(first, max(here.stop - 1, first)))
        return found

    # -- cuts ------------------------------------------------------------------------------------------------------
    def passing(self, kept: torch.Tensor) -> torch.Tensor:
        """Places of the text and of the vision tokens ``kept`` (indices into ``vision``), ascending."""
        return torch.cat([self.vision.index_select(0, kept), self.text]).sort().values

    def cut(self, kept: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Drop all vision tokens but ``kept`` (indices into ``vision``, ascending); returns the places that are kept.

        Args:
            counts: how many of them each row keeps.
        """
        marks = torch.cat([self.vision.index_select(0, kept), self._anchors])
        places = marks[: -len(self.rows) - 1].sort().values
        marks = torch.searchsorted(places, marks)
        self.vision, self._anchors = marks[: len(kept)], marks[len(kept) :]
        self.alive = self.alive.index_select(0, kept)
        self.lengths = less(self.lengths, self.counts, counts)
        self.counts = counts
        self._tell_rows()
        return places

    def grow(self, at: torch.Tensor, new: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for new vision tokens of some rows (row → how many), each row's behind one of its tokens.

        They have been described before.

        Args:
            at: int64 [len(new)], places of the tokens that they follow.

        Returns:
            int64 [tokens]: which token each of the packed ones was, where it is new the one in front of it; and int64
            [new tokens]: their places.
        """
        many, device = sum(new.values()), self.vision.device
        total, entered = sum(self.lengths), self.entered() - many
        counts = torch.tensor(list(new.values()))
        each, behind = on_device([counts, torch.cat([torch.arange(1, n + 1) for n in new.values()])], device)
        repeats = torch.ones(total, dtype=torch.int64, device=device).index_add(0, at, each)
        index = torch.arange(total, device=device).repeat_interleave(repeats, output_size=total + many)
        first = torch.cat([repeats.new_zeros(1), repeats.cumsum(0)])
        made = first.index_select(0, at).repeat_interleave(each, output_size=many) + behind
        marks = first.index_select(0, torch.cat([self.vision, self._anchors]))
        self._anchors = marks[len(self.vision) :]
        self.vision, order = torch.cat([marks[: len(self.vision)], made]).sort()
        numbers = torch.arange(entered, entered + many, device=device)
        self.alive = torch.cat([self.alive, numbers]).index_select(0, order)
        self.counts = [n + new.get(row, 0) for row, n in enumerate(self.counts)]
        self.lengths = [n + new.get(row, 0) for row, n in enumerate(self.lengths)]
        self.grown = True
        self._tell_rows()
        return index, made

    def describe(self, first: torch.Tensor, means: Sequence[torch.Tensor]) -> None:
        """Say of new vision tokens, counted behind all that entered, where they lie: where their ``first`` sources do.

        Args:
            first: int64 [new], which of the tokens that entered. means: [new, D] for each of ``features``.
        """
        self.fields = {name: torch.cat([t, t.index_select(0, first)]) for name, t in self.fields.items()}
        self.features = [torch.cat([t, more]) for t, more in zip(self.features, means, strict=True)]

    def entered(self) -> int:
        """Vision tokens that entered, and those made since."""
        return len(next(iter(self.fields.values()))) if self.fields else 0

    def forget(self, kept: torch.Tensor, texts: list[int]) -> torch.Tensor:
        """Drop all text but ``kept`` (indices into ``text``, ascending); returns the places that are kept.

        Args:
            texts: how many of them each row keeps.
        """
        text = self.text.index_select(0, kept)
        places = torch.cat([self.vision, text]).sort().values
        marks = torch.searchsorted(places, torch.cat([self.vision, text, self.starts]))
        self.vision, self._anchors = marks[: len(self.vision)], marks[len(self.vision) :]
        self.lengths = less(self.lengths, self.texts, texts)
        self.texts = texts
        self._tell_rows()
        return places

    def _tell_rows(self) -> None:
        for row, length, count in zip(self.rows, self.lengths, self.counts, strict=True):
            row.length, row.vision.count = length, count

    # -- the same rows again ---------------------------------------------------------------------------------------
    def fork(self, picks: Sequence[int], rows: Sequence[Row]) -> tuple[Packed, torch.Tensor]:
        """What goes on from here as ``rows``, of which each continues one of these (``picks``).

        Returns:
            It, and int64 [tokens]: which of the packed tokens of this one each of its tokens is.

        Raises:
            UnsupportedError: tokens have been merged.
        """
        if self.grown:
            raise UnsupportedError("rows whose tokens have been merged cannot be forked: leave the merging policy out")
        made = object.__new__(Packed)
        made.rows, made.grown = rows, False
        made.lengths, made.counts, made.texts = (
            [per_row[old] for old in picks] for per_row in (self.lengths, self.counts, self.texts)
        )
        totals = [row.vision.total for row in self.rows]
        made.first_vision = sums([totals[old] for old in picks])[:-1]
        device = self.vision.device
        tokens = _ranges([self.spans()[old] for old in picks])
        vision = _ranges([self.vision_spans()[old] for old in picks])
        text = _ranges([self.text_spans()[old] for old in picks])
        entered = _ranges([slice(self.first_vision[old], self.first_vision[old] + totals[old]) for old in picks])
        old_starts, starts = sums(self.lengths), sums(made.lengths)
        moved = torch.tensor([new - old_starts[old] for old, new in zip(picks, starts, strict=False)])
        counted = torch.tensor(
            [new - self.first_vision[old] for old, new in zip(picks, made.first_vision, strict=True)]
        )
        counts, texts = torch.tensor(made.counts), torch.tensor(made.texts)
        tokens, vision, text, entered, by_vision, by_text, by_entered, ends = on_device(
            [
                tokens, vision, text, entered, moved.repeat_interleave(counts), moved.repeat_interleave(texts),
                counted.repeat_interleave(counts), torch.tensor(starts),
            ],
            device,
        )  # fmt: skip
        made.vision = self.vision.index_select(0, vision) + by_vision
        made._anchors = torch.cat([self.text.index_select(0, text) + by_text, ends])
        made.alive = self.alive.index_select(0, vision) + by_entered
        made.fields = {name: t.index_select(0, entered) for name, t in self.fields.items()}
        made.features = [t.index_select(0, entered) for t in self.features]
        return made, tokens


def sums(numbers: Sequence[int]) -> list[int]:
    """0, and the sums of the first, the first two, … of them."""
    return [0, *accumulate(numbers)]


def less(lengths: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Of rows of these lengths, what is left when some of their tokens, so many before, are so many after."""
    return [n - (old - new) for n, old, new in zip(lengths, before, after, strict=True)]


def on_device(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """int64 tensors [n] each from the host, in one copy that nobody waits for."""
    if device.type == "cpu" or not parts:
        return list(parts)
    moved = torch.cat(list(parts)).to(device, non_blocking=True)
    return list(moved.split([len(part) for part in parts]))


def _slices(sizes: Sequence[int]) -> list[slice]:
    """Where things of these sizes lie, one behind the other."""
    return [slice(a, b) for a, b in pairwise(sums(sizes))]


def _ranges(spans: Sequence[slice]) -> torch.Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])


def _field_of(row: Row, name: str) -> torch.Tensor:
    found = row.vision.fields.get(name)
    return torch.zeros(row.vision.total, dtype=torch.int64) if found is None else found
