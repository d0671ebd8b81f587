"""Attention that ranks tokens: what policies ask of a layer, taken while it runs, and looks ahead into the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vtr.answers import Attention, KeyNorms
from vtr.base import UnsupportedError
from vtr.engine.asked import Asked, AskedNorms, as_attention
from vtr.engine.attention import Probe
from vtr.engine.cache import RaggedLayer
from vtr.engine.decoder import Decoder
from vtr.engine.gauging import Gauge
from vtr.engine.once import from_host
from vtr.engine.packed import Packed, on_device, sums
from vtr.engine.positions import Positions
from vtr.engine.rows import Row
from vtr.engine.scores import PLAIN, Queries, ahead, looking_costs
from vtr.engine.sight import OwnMask, OwnMasks
from vtr.engine.trace import Trace


class Probes:
    """Says which attention a layer is to note, and hands out what it found.

    Args:
        rows, packed, positions: of the packed tokens as they are now. layers: of the ragged cache, or None.

    Attributes:
        scores: float32 [T], attention that the packed tokens got in the layer before; None where nobody asked.
        ranked: the rows that asked for it by one of the short forms.
        full: row → what it got for its other requests, in their order: [(heads,) (rows,) its vision tokens], and of its
            text where it asked for norms. in_tuples: the rows that asked by a tuple.
        taken: what the attention function puts there: which probe → float32, what it found; or what finds it.
        gauge: by how much attention goes, where cuts are gauged.
        masks: the model's own masks of this forward, or None. call: what the layer about to run is called with.
    """

    def __init__(
        self, rows: list[Row], packed: Packed, positions: Positions, layers: list[RaggedLayer] | None,
        decoder: Decoder, trace: Trace,
    ) -> None:  # fmt: skip
        self.rows, self.packed, self.positions, self.layers = rows, packed, positions, layers
        self.decoder, self.trace = decoder, trace
        self.scores: torch.Tensor | None = None
        self.ranked: set[int] = set()
        self.full: dict[int, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
        self.in_tuples: set[int] = set()
        self._split: Sequence[torch.Tensor] | None = None
        self.taken: dict[int, Any] = {}
        self.gauge = Gauge(self)
        self._flops: list[int] = []
        self.masks: OwnMasks | None = None
        self.call: dict[str, Any] = {}
        self._pruned = any(row.asks("prune") for row in rows)
        self._probes: tuple[Probe, ...] = ()
        self._wanted: dict[int, tuple[Any, ...]] = {}
        self._through: torch.Tensor | None = None
        self._lengths: list[int] = []
        self._queries: dict[tuple[bool, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor | None, bool]] = {}

    def to(self, device: torch.device) -> None:
        self.taken = {n: self.now(n, found).to(device) for n, found in self.taken.items()}
        self._through = None if self._through is None else self._through.to(device)
        self._queries = {}

    def done(self) -> None:
        """What was found has been used."""
        self.scores, self.ranked, self.full, self._split = None, set(), {}, None

    def of_row(self, i: int) -> tuple[Any, torch.Tensor | None]:
        """What row ``i`` asked for, as ``tokens.scores`` and ``tokens.text_scores`` are; (None, None) if nothing."""
        if i in self.full:
            several = self.full[i]
            found = tuple(vision for vision, _ in several)
            text = next((text for _, text in several if text is not None), None)
            return (found if i in self.in_tuples else found[0]), text
        if self.scores is None or i not in self.ranked:
            return None, None
        if self._split is None:
            self._split = self.scores.index_select(0, self.packed.vision).split(self.packed.counts)
        return self._split[i], None

    # -- asked of a layer ------------------------------------------------------------------------------------------
    def probes(
        self, index: int, past: Sequence[int], lengths: list[int], through: torch.Tensor | None
    ) -> tuple[Probe, ...]:  # fmt: skip
        """What of layer ``index``'s attention ranks tokens for the next one.

        Args:
            past: cached tokens of each row. lengths: those of each row that pass the layer. through: int64, which of
                the packed tokens these are; None: all.
        """
        self._probes, self._through, self._lengths, self.taken, self._wanted = (), through, lengths, {}, {}
        if index + 1 >= self.decoder.depth or not self._pruned:
            return ()
        asked: dict[Any, list[int]] = {}
        for i, row in enumerate(self.rows):
            wanted = row.policy.needs(index + 1) if row.policy is not None and row.vision.count else None
            if wanted is None:
                continue
            if isinstance(wanted, str):
                asked.setdefault(wanted, []).append(i)
                continue
            self._wanted[i] = tuple(map(as_attention, wanted if isinstance(wanted, tuple) else (wanted,)))
            self.in_tuples = self.in_tuples | {i} if isinstance(wanted, tuple) else self.in_tuples - {i}
            for number, one in enumerate(self._wanted[i]):
                kind = one if isinstance(one, KeyNorms) else (one.heads, one.over)
                asked.setdefault((number, kind), []).append(i)
        probes: list[Probe] = []
        for kind, rows in asked.items():
            if past:
                probes += [Probe(self._asked_of(kind, [i]), i) for i in rows]
            else:
                probes.append(Probe(self._asked_of(kind, rows)))
        probes += self.gauge.asked(past, asked.get("last", []))
        sizes = self.decoder.geometry.attention(index)
        befores = [0 if probe.row is None else past[probe.row] for probe in probes]
        self._flops = [p.asked.flops(sizes.heads, sizes.key, n) for p, n in zip(probes, befores, strict=True)]
        self.trace.selector_flops += sum(n for p, n in zip(probes, self._flops, strict=True) if not p.later)
        self._probes = tuple(probes)
        return self._probes

    def _asked_of(self, kind: Any, rows: list[int]) -> Queries | Asked | AskedNorms:
        if isinstance(kind, str):
            return self.asked(kind, rows)
        number, reduction = kind
        if isinstance(reduction, KeyNorms):
            each = on_device([torch.tensor(self._lengths)], self.packed.vision.device)[0]
            self._check_turned(rows)
            first = self.packed.starts[:-1].repeat_interleave(each, output_size=sum(self._lengths))
            cos, sin = (t.index_select(1, first) for t in self.positions.rope)
            return AskedNorms(number, tuple(rows), (cos, -sin))
        return self._asked_in_full(number, reduction, rows)

    def _check_turned(self, rows: Sequence[int]) -> None:
        """Refuse norms of keys where how rope has turned them is not known."""
        attn = self.decoder.text.layers[0].self_attn
        if type(attn).__name__ not in PLAIN:
            policy = self.rows[rows[0]].policy
            raise UnsupportedError(
                f"{policy.spec if policy else None!r} ranks by norms of keys before rope, which a "
                f"{type(attn).__name__} does not tell: use a policy that ranks by attention (fastv)"
            )

    def _asked_in_full(self, number: int, reduction: tuple[Any, Any], rows: list[int]) -> Asked:
        """The tokens that some rows' ``number``-th request names, where they stand among those that pass the layer."""
        named = [self._named(i, self._wanted[i][number].rows) for i in rows]
        sizes, device = tuple(map(len, named)), self.packed.vision.device
        most = max(sizes)
        own = [self.packed.text_spans()[i].start for i in rows]
        filled = [
            torch.nn.functional.pad(numbers, (0, most - len(numbers)), value=any_of_it)
            for numbers, any_of_it in zip(named, own, strict=True)
        ]
        counted = None
        if len(set(sizes)) > 1:
            counted = torch.arange(most)[None] < torch.tensor(sizes)[:, None]
            counted = counted.to(device, non_blocking=True)
        away = [i for i, one in enumerate(filled) if one.device != device]
        for i, moved in zip(away, on_device([filled[i] for i in away], device) if away else [], strict=True):
            filled[i] = moved
        marks = torch.cat([self.packed.text, self.packed.vision])
        places, starts = marks.index_select(0, torch.cat(filled)), self._starts(rows)
        if self._through is not None:
            places, starts = (torch.searchsorted(self._through, t) for t in (places, starts))
        places, lengths = places.view(len(rows), most), tuple(self._lengths[i] for i in rows)
        return Asked(Attention("named", *reduction), number, tuple(rows), sizes, places, counted, starts, lengths)

    def _named(self, i: int, which: str) -> torch.Tensor:
        """int64 [q]: the tokens of row ``i`` that a request calls so, as indices into all text and vision tokens.

        Raises:
            TypeError, ValueError: what the policy put into the memo is no such thing.
        """
        row, packed = self.rows[i], self.packed
        first, text = packed.text_spans()[i].start, row.text
        if which == "last":
            return text.queries[-1:] + first
        if which == "text":
            return text.queries + first
        if which == "behind":
            return torch.arange(text.first_behind, text.prompt) + first
        if which == "vision":
            here = packed.vision_spans()[i]
            if self._lengths[i] < packed.lengths[i]:  # those that go around the layer ask nothing
                raise UnsupportedError(
                    "vision tokens cannot be asked for their attention in a layer that some go around"
                )
            return torch.arange(here.start, here.stop) + sum(packed.texts)
        numbers = row.memo.get(which, text.queries[:0])
        if not isinstance(numbers, torch.Tensor) or numbers.dtype != torch.int64 or numbers.dim() != 1:
            raise TypeError(
                f"{type(row.policy).__name__}: tokens.memo[{which!r}] must hold int64 indices into tokens.text, since "
                f"needs() names them, got {numbers!r}"
            )
        return numbers + first

    def asked(self, kind: str, rows: list[int]) -> Queries:
        """The queries of some rows, where they stand among the tokens that pass the layer."""
        last = kind.startswith("last")
        index, weight, behind = self._text_queries(last, tuple(rows))
        places, starts = self.packed.text.index_select(0, index), self._starts(rows)
        if self._through is not None:  # text passes every layer
            places, starts = (torch.searchsorted(self._through, t) for t in (places, starts))
        made = _queries(rows, places, starts, self._lengths)
        open_to_all = self._open(last, rows, self._lengths) if behind else 0
        return replace(made, weight=weight, behind=behind, open=open_to_all, strongest=kind.endswith("-max"))

    def _open(self, last: bool, rows: Sequence[int], lengths: Sequence[int]) -> int:
        """How many tokens in front of every row's first query there are, where no vision token is behind one."""
        found = []
        for i in rows:
            text = self.rows[i].text
            first = text.last if last else text.first
            found.append(lengths[i] - (self.packed.texts[i] - first) + 1)
        return min(found)

    def _starts(self, rows: Sequence[int]) -> torch.Tensor:
        starts = self.packed.starts[:-1]
        if len(rows) == len(self.rows):
            return starts
        if rows[-1] - rows[0] == len(rows) - 1:
            return starts[rows[0] : rows[-1] + 1]
        return starts.index_select(0, from_host(rows, starts.device))

    def _text_queries(self, last: bool, rows: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """Which of the packed text ranks (int64 [rows * q], filled up), and ``Queries.weight`` and ``behind``."""
        if (last, rows) not in self._queries:
            first, device = sums(self.packed.texts), self.packed.text.device
            texts = [self.rows[i].text for i in rows]
            picked = [text.queries[-1:] if last else text.queries for text in texts]
            most = max(map(len, picked))
            behind = all(text.last_behind if last else text.behind for text in texts)
            behind = behind and not any(self.decoder.windows) and self.masks is None
            filled = [
                torch.nn.functional.pad(q, (0, most - len(q))) + first[i] for q, i in zip(picked, rows, strict=True)
            ]
            counted = torch.cat([torch.arange(most) < len(q) for q in picked]).long()
            sizes = torch.tensor([len(q) for q in picked])
            index, counted, sizes = on_device([torch.cat(filled), counted, sizes], device)
            weight = None
            if len(set(map(len, picked))) > 1:
                weight = counted.float().view(len(rows), 1, most)
                weight = weight / sizes[:, None, None] if behind else weight
            self._queries[last, rows] = index, weight, behind
        return self._queries[last, rows]

    def fork(
        self, rows: list[Row], packed: Packed, positions: Positions, index: torch.Tensor, old: Sequence[int],
        trace: Trace,
    ) -> Probes:  # fmt: skip
        """Of rows that go on from these (``old``), without a cache. index: int64, see :meth:`Packed.fork`."""
        made = Probes(rows, packed, positions, None, self.decoder, trace)
        self.take_scores()
        if self.scores is not None:
            made.scores = self.scores.index_select(0, index)
            made.ranked = {new for new, row in enumerate(old) if row in self.ranked}
        made.full = {new: self.full[row] for new, row in enumerate(old) if row in self.full}
        made.in_tuples = {new for new, row in enumerate(old) if row in self.in_tuples}
        return made

    def select(self, kept: torch.Tensor) -> None:
        """Only the packed tokens ``kept`` are left, not all of the text among them."""
        self._queries, self._split = {}, None
        self.scores = None if self.scores is None else self.scores.index_select(0, kept)

    def take_scores(self) -> None:
        """Make what the layer before found into scores of the packed tokens."""
        self.gauge.take({n: t for n, t in self.taken.items() if self._probes[n].later})
        self.taken = {n: t for n, t in self.taken.items() if not self._probes[n].later}
        if not self.taken:
            return
        short = {n: t for n, t in self.taken.items() if isinstance(self._probes[n].asked, Queries)}
        self.scores, self._split = self.of_all(short), None
        self.ranked = {row for n in short for row in self._probes[n].asked.rows}
        for n, part in self.taken.items():
            if n not in short:
                self._take_full(self._probes[n], part)
        self.taken = {}

    def of_all(self, short: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """float32 [T] of what some probes found, each in rows of its own; None of none."""
        found: torch.Tensor | None = None
        if any(self._probes[n].row is not None for n in short):
            zero = torch.zeros(max(self.packed.lengths), device=self.packed.vision.device)
            alone = {self._probes[n].row: t for n, t in short.items()}
            found = torch.cat([alone.get(i, zero[:n]) for i, n in enumerate(self.packed.lengths)])
        for n, part in short.items():
            if self._probes[n].row is None:
                part = self._among_all(part)
                found = part if found is None else found + part
        return found

    def of(self, n: int) -> Probe:
        """The ``n``-th of what the layer that has just run was to note."""
        return self._probes[n]

    def now(self, n: int, found: Any) -> torch.Tensor:
        """What probe ``n`` found, worked out if it has not been."""
        if callable(found):
            self.trace.selector_flops += self._flops[n]
            found = found()
        made: torch.Tensor = found
        return made

    def _among_all(self, part: torch.Tensor) -> torch.Tensor:
        """[tokens that passed] → [T], 0 for those that went around."""
        if self._through is None:
            return part
        return part.new_zeros(sum(self.packed.lengths)).index_copy(0, self._through, part)

    def _take_full(self, probe: Probe, found: torch.Tensor) -> None:
        """Of each row that asked, what its vision tokens (and its text, where norms were asked for) got."""
        asked, packed = probe.asked, self.packed
        assert not isinstance(asked, Queries)
        norms = isinstance(asked, AskedNorms)
        if isinstance(asked, AskedNorms):
            if probe.row is None:
                parts = dict(enumerate(self._among_all(found).split(packed.lengths)))
            else:
                parts = {probe.row: found}
        else:
            parts = asked.of_rows(found)
        for row in asked.rows:
            start = packed.spans()[row].start
            vision = packed.vision[packed.vision_spans()[row]]
            mine = parts[row]
            if not norms and self._through is not None:
                vision, there = self._passed(row, vision)
                mine = mine.index_select(-1, vision) * there
            else:
                mine = mine.index_select(-1, vision - start)
            text = None
            if norms:
                at = packed.text_spans()[row].start
                text = parts[row].index_select(0, packed.text[at : at + self.rows[row].text.prompt] - start)
            several = self.full.setdefault(row, [(mine, None)] * len(self._wanted[row]))
            several[asked.number] = mine, text

    def _passed(self, row: int, vision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where vision tokens of a row stand among its tokens that passed the layer, and which did (0 or 1)."""
        assert self._through is not None
        at = torch.searchsorted(self._through, vision).clamp_(max=len(self._through) - 1)
        there = self._through.index_select(0, at) == vision
        first = sum(self._lengths[:row])
        return torch.where(there, at - first, 0), there.float()

    # -- looked ahead ----------------------------------------------------------------------------------------------
    def look_ahead(self, index: int, layer: Any, hidden: torch.Tensor, rows: list[int]) -> dict[int, torch.Tensor]:
        """row → float32 [its vision tokens]: what its last text token is about to pay in layer ``index``."""
        packed, past = self.packed, [] if self.layers is None else self.layers[index].lengths()
        if any(past) and len(rows) > 1:
            return {i: one for row in rows for i, one in self.look_ahead(index, layer, hidden, [row]).items()}
        spans, lengths = packed.spans(), packed.lengths
        begin = sums([lengths[i] for i in rows])
        index_of, _, behind = self._text_queries(True, tuple(rows))
        places = packed.text.index_select(0, index_of)
        vision = packed.of_rows(packed.vision, rows, packed.vision_spans())
        rope, ids = self.positions.rope, self.positions.ids[0]
        starts = packed.starts[:-1]
        if len(rows) < len(self.rows):  # the other rows need no keys
            nearer = torch.tensor([spans[i].start - b for i, b in zip(rows, begin, strict=False)])
            counts = torch.tensor([packed.counts[i] for i in rows])
            gone, each = on_device([nearer, nearer.repeat_interleave(counts)], places.device)
            places, vision, starts = places - gone, vision - each, self._starts(rows) - gone
            hidden = torch.cat([hidden[:, spans[i]] for i in rows], 1)
            rope = _joined(rope, [spans[i] for i in rows])
            ids = torch.cat([ids[spans[i]] for i in rows])
        asked = _queries(rows, places, starts, [lengths[i] for i in rows], begin)
        asked = replace(asked, behind=behind, open=self._open(True, rows, lengths) if behind else 0)
        window, keys, own = self.decoder.windows[index], None, self._own(index, rows)
        if any(past):
            assert self.layers is not None
            cache, (row,) = self.layers[index], rows
            keys = cache.row(row, past[row])
            own = None if own is None else own.within(slice(None), past[row])
            if window is not None:
                ids = torch.cat([cache.positions(row, past[row]), ids])
        found = self._ahead(layer, hidden, rope, asked, keys, ids, window, own)
        sizes = self.decoder.geometry.attention(index)
        self.trace.selector_flops += looking_costs(layer, sizes, hidden.shape[-1], hidden.shape[1], len(rows))
        self.trace.selector_flops += asked.flops(sizes.heads, sizes.key, 0 if keys is None else keys[0].shape[2])
        parts = found.index_select(0, vision).split([packed.counts[i] for i in rows])
        return dict(zip(rows, parts, strict=True))

    def received(
        self, index: int, layer: Any, hidden: torch.Tensor, row: int, rows: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        """float32 [tokens of the row]: what they are about to get from some of them (``rows``, places in the row).

        Mean over heads, sum over ``rows``; from the layer's own norm and projections.
        """
        here, cached = self.packed.spans()[row], [] if self.layers is None else self.layers[index].lengths()
        past = cached[row] if cached else 0
        n, window, keys, ids = here.stop - here.start, self.decoder.windows[index], None, self.positions.ids[0][here]
        rows = rows.to(hidden.device, non_blocking=True)
        if past:
            assert self.layers is not None
            keys = self.layers[index].row(row, past)
            ids = ids if window is None else torch.cat([self.layers[index].positions(row, past), ids])
        start = rows.new_zeros(1)
        asked = Asked(Attention("named", over="sum"), 0, (row,), (len(rows),), rows[None], None, start, (n,))
        own, sizes = self._own(index, [row]), self.decoder.geometry.attention(index)
        own = None if own is None else own.within(slice(None), past)
        self.trace.selector_flops += looking_costs(layer, sizes, hidden.shape[-1], n, len(rows))
        self.trace.selector_flops += asked.flops(sizes.heads, sizes.key, past)
        rope = _joined(self.positions.rope, [here])
        return self._ahead(layer, hidden[:, here], rope, asked, keys, ids, window, own)[0]

    def _ahead(
        self, layer: Any, hidden: torch.Tensor, rope: Any, asked: Any, past: Any, positions: torch.Tensor,
        window: int | None, own: OwnMask | None,
    ) -> torch.Tensor:  # fmt: skip
        """What ``asked`` are about to pay in ``layer``; see :func:`~vtr.engine.scores.ahead`."""
        return ahead(layer, hidden, rope, asked, past, positions, window, own, self.call)

    def _own(self, index: int, rows: Sequence[int]) -> OwnMask | None:
        """What the model's own mask of layer ``index`` says of the tokens of these rows, one row behind the other."""
        if self.masks is None:
            return None
        slots = self.packed.of_rows(self.positions.slots, rows, self.packed.spans())
        return self.masks.of_layer(index, slots)


def _joined(rope: Any, spans: Sequence[slice]) -> Any:
    """Rope of the tokens in these spans, whatever form it has; None stays None."""
    if rope is None:
        return None
    if isinstance(rope, torch.Tensor):
        return rope[:, spans[0]] if len(spans) == 1 else torch.cat([rope[:, span] for span in spans], 1)
    return tuple(_joined(one, spans) for one in rope)


def _queries(
    rows: Sequence[int], places: torch.Tensor, starts: torch.Tensor, lengths: Sequence[int],
    begin: Sequence[int] | None = None,
) -> Queries:  # fmt: skip
    """Queries of some rows. lengths: of all rows; with ``begin`` (where they begin), of these rows only."""
    mine = list(lengths) if begin is not None else [lengths[i] for i in rows]
    first = begin[0] if begin is not None else sums(lengths)[rows[0]]
    together = begin is not None or list(rows) == list(range(rows[0], rows[0] + len(rows)))
    run = first if together and len(set(mine)) == 1 else None
    return Queries(tuple(rows), places.view(len(rows), -1), None, starts, max(mine), run)
