"""What the rows' policies are asked at each decoder layer of a packed forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from vtr.base import Best, Route, Tokens, UnsupportedError
from vtr.engine import ranking
from vtr.engine.attention import Probe
from vtr.engine.cache import RaggedLayer
from vtr.engine.checks import GuardedFields, check_best, check_count, check_route, checked_keep
from vtr.engine.decoder import Decoder
from vtr.engine.once import from_host
from vtr.engine.packed import Packed, less, on_device, sums
from vtr.engine.positions import Positions
from vtr.engine.rows import Row
from vtr.engine.scores import Queries, ahead
from vtr.engine.trace import Trace


class Passing(NamedTuple):
    """Who of all rows passes a layer.

    Attributes:
        lengths, counts: per row, the tokens that pass, and the vision tokens among them.
        alive: int64 [sum of counts], which of all vision tokens these are.
        through: int64 [t], packed indices of those that pass; None: all do.
        weights: float [T] of all tokens, or None.
    """

    lengths: list[int]
    counts: list[int]
    alive: torch.Tensor
    through: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class Questions:
    """Asks ``prune`` and ``route``, and says which attention scores they need.

    Args:
        rows, packed, positions: of the packed tokens as they are now. layers: of the ragged cache, or None.

    Attributes:
        scores: float32 [T], attention that the packed tokens got in the layer before; None where nobody asked.
        ranked: the rows that asked for it.
        taken: what the attention function puts there: which probe → float32, what it found.
        pruned, routed: per row, whether its policy answers ``prune`` and ``route``.
    """

    def __init__(
        self, rows: list[Row], packed: Packed, positions: Positions, layers: list[RaggedLayer] | None,
        decoder: Decoder, trace: Trace,
    ) -> None:  # fmt: skip
        self.rows, self.packed, self.positions, self.layers = rows, packed, positions, layers
        self.decoder, self.trace = decoder, trace
        self.scores: torch.Tensor | None = None
        self.ranked: set[int] = set()
        self.taken: dict[int, torch.Tensor] = {}
        self.pruned = [row.asks("prune") for row in rows]
        self.routed = [row.asks("route") for row in rows]
        self._probes: tuple[Probe, ...] = ()
        self._through: torch.Tensor | None = None
        self._queries: dict[tuple[bool, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor | None, bool]] = {}

    def to(self, device: torch.device) -> None:
        self.taken = {probe: found.to(device) for probe, found in self.taken.items()}
        self._through = None if self._through is None else self._through.to(device)
        self._queries = {}

    # -- prune -----------------------------------------------------------------------------------------------------
    def prune(self, index: int, layer: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        """Cut the rows; packed indices of the tokens that enter layer ``index``, None for all. hidden: [1, T, D]."""
        if not any(self.pruned):
            return None
        answers = self._ask("prune", index, hidden, self.pruned, layer)
        kept = self._kept("prune", answers)
        self.scores, self.ranked = None, set()
        counts = self.packed.counts
        cut = [i for i, k in enumerate(kept) if k is not None]
        if not cut:
            return None
        chosen, left = ranking.keep(kept, counts, hidden.device)
        for i in cut:
            if self.rows[i].policy.renumbers:  # type: ignore[union-attr]
                self.positions.lose(i, counts[i] - left[i])
        return self.packed.cut(chosen, left)

    def _kept(self, question: str, answers: dict[int, Any]) -> list[ranking.Kept]:
        """What each row keeps, checked; None for all of it."""
        looking = sorted(i for i, a in answers.items() if isinstance(a, Best) and isinstance(a.scores, _LookAhead))
        found = answers[looking[0]].scores.together(looking) if looking else {}
        kept: list[ranking.Kept] = [None] * len(self.rows)
        for i, answer in answers.items():
            if answer is None:
                continue
            n, policy = self.packed.counts[i], self.rows[i].policy
            assert policy is not None
            if isinstance(answer, Best):
                scores: Any = answer.scores
                scores = found[i] if i in looking else scores() if callable(scores) else scores
                check_best(scores, answer.count, n, question, policy)
                kept[i] = (scores, answer.count) if answer.count < n else None
            else:
                chosen = checked_keep(answer, n, question, policy, self.packed.vision.device)
                kept[i] = chosen if len(chosen) < n else None
        return kept

    # -- route -----------------------------------------------------------------------------------------------------
    def route(self, index: int, hidden: torch.Tensor) -> Passing:
        """Who passes layer ``index``; the rows stay as they are. hidden: [1, T, D]."""
        packed = self.packed
        passing = Passing(packed.lengths, packed.counts, packed.alive)
        if not any(self.routed):
            return passing
        answers = {i: a for i, a in self._ask("route", index, hidden, self.routed).items() if a is not None}
        if not answers:
            return passing
        for i, answer in answers.items():
            check_route(answer, packed.counts[i], self.rows[i].policy)  # type: ignore[arg-type]
        kept = self._kept("route", {i: answer.keep for i, answer in answers.items()})
        weights = self._weights(answers, hidden)
        if all(k is None for k in kept):
            everything = torch.arange(hidden.shape[1], device=hidden.device)
            return passing._replace(through=everything, weights=weights)
        chosen, counts = ranking.keep(kept, packed.counts, hidden.device)
        lengths = less(packed.lengths, packed.counts, counts)
        alive = packed.alive.index_select(0, chosen)
        return Passing(lengths, counts, alive, packed.passing(chosen), weights)

    def _weights(self, answers: dict[int, Route], hidden: torch.Tensor) -> torch.Tensor | None:
        """float [T]: what the rows' routes weigh their vision tokens by, 1 for all others; None if none weighs any."""
        weighed = sorted(i for i, answer in answers.items() if answer.weights is not None)
        if not weighed:
            return None
        spans = self.packed.vision_spans()
        at = self.packed.of_rows(self.packed.vision, weighed, spans)
        given = [answers[i].weights.to(hidden) for i in weighed]  # type: ignore[union-attr]
        return hidden.new_ones(hidden.shape[1]).index_copy(0, at, given[0] if len(given) == 1 else torch.cat(given))

    # -- attention that ranks --------------------------------------------------------------------------------------
    def probes(self, index: int, past: Sequence[int], passing: Passing) -> tuple[Probe, ...]:
        """What of layer ``index``'s attention ranks tokens for the next one. past: cached tokens of each row."""
        self._probes, self._through, self.taken = (), passing.through, {}
        if index + 1 >= self.decoder.depth or not any(self.pruned):
            return ()
        asked: dict[str, list[int]] = {}
        g = self.decoder.geometry
        for i, row in enumerate(self.rows):
            wanted = row.policy.needs(index + 1) if row.policy is not None and row.vision.count else None
            if wanted is not None:
                asked.setdefault(wanted, []).append(i)
        probes: list[Probe] = []
        for kind, rows in asked.items():
            if past:
                probes += [Probe(self._asked(kind, [i], passing), i) for i in rows]
            else:
                probes.append(Probe(self._asked(kind, rows, passing)))
        for probe in probes:
            before = 0 if probe.row is None else past[probe.row]
            self.trace.selector_flops += probe.asked.flops(g.heads, g.head_dim, before)
        self._probes = tuple(probes)
        return self._probes

    def _asked(self, kind: str, rows: list[int], passing: Passing) -> Queries:
        """The queries of some rows, where they stand among the tokens that pass the layer."""
        last = kind.startswith("last")
        index, weight, behind = self._text_queries(last, tuple(rows))
        places, starts = self.packed.text.index_select(0, index), self._starts(rows)
        if passing.through is not None:  # text passes every layer
            places, starts = (torch.searchsorted(passing.through, t) for t in (places, starts))
        made = _queries(rows, places, starts, passing.lengths)
        open_to_all = self._open(last, rows, passing.lengths) if behind else 0
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
            behind = all(text.last_behind if last else text.behind for text in texts) and not any(self.decoder.windows)
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
    ) -> Questions:  # fmt: skip
        """Of rows that go on from these (``old``), without a cache. index: int64, see :meth:`Packed.fork`."""
        made = Questions(rows, packed, positions, None, self.decoder, trace)
        self.take_scores(index.device)
        if self.scores is not None:
            made.scores = self.scores.index_select(0, index)
            made.ranked = {new for new, row in enumerate(old) if row in self.ranked}
        return made

    def select(self, kept: torch.Tensor) -> None:
        """Only the packed tokens ``kept`` are left, not all of the text among them."""
        self._queries = {}
        self.scores = None if self.scores is None else self.scores.index_select(0, kept)

    def take_scores(self, device: torch.device) -> None:
        """Make what the layer before found into scores of the packed tokens."""
        if not self.taken:
            return
        sizes, total = self.packed.spans(), sum(self.packed.lengths)
        found: torch.Tensor | None = None
        alone = {self._probes[n].row: t for n, t in self.taken.items() if self._probes[n].row is not None}
        if alone:
            zero = torch.zeros(max(self.packed.lengths), device=device)
            rows = [alone.get(i, zero[: here.stop - here.start]) for i, here in enumerate(sizes)]
            found = torch.cat(rows)
        for n, part in self.taken.items():
            if self._probes[n].row is None:
                if self._through is not None:
                    part = part.new_zeros(total).index_copy(0, self._through, part)
                found = part if found is None else found + part
        self.scores = found
        self.ranked = {row for n in self.taken for row in self._probes[n].asked.rows}
        self.taken = {}

    # -- asking ----------------------------------------------------------------------------------------------------
    def _ask(
        self, question: str, index: int, hidden: torch.Tensor, asks: Sequence[bool], layer: Any = None
    ) -> dict[int, Any]:
        """row → what its policy answers about its tokens entering layer ``index``; rows of one policy in one go."""
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            if asks[i] and row.vision.count:
                groups.setdefault(id(row.policy), []).append(i)
        if not groups:
            return {}
        scores: Sequence[torch.Tensor | None] = [None] * len(self.rows)
        if self.scores is not None and question == "prune":
            scores = self.scores.index_select(0, self.packed.vision).split(self.packed.counts)
        answers: dict[int, Any] = {}
        for rows in groups.values():
            policy = self.rows[rows[0]].policy
            assert policy is not None
            shown = Shown(self.packed, rows, hidden)
            look = partial(_LookAhead, self, index, layer, hidden) if question == "prune" else _NoLookAhead
            tokens = []
            for i in rows:
                vision = self.rows[i].vision
                fields = GuardedFields(partial(shown.of, i))
                ranked = scores[i] if i in self.ranked else None
                depth, length = self.decoder.depth, self.rows[i].length
                tokens.append(
                    Tokens(index, depth, vision.total, vision.count, fields, ranked, look(i), vision.per_image, length)
                )
            said = getattr(policy, f"{question}_all")(index, tokens)
            check_count(said, len(rows), question, policy)
            for i, one, answer in zip(rows, tokens, said, strict=True):
                one._field.check(policy, question, "tokens")  # type: ignore[attr-defined]
                self.trace.selector_flops += one.flops
                answers[i] = answer
        return answers

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
            rope = tuple(torch.cat([t[:, spans[i]] for i in rows], 1) for t in rope)
            ids = torch.cat([ids[spans[i]] for i in rows])
        asked = _queries(rows, places, starts, [lengths[i] for i in rows], begin)
        asked = replace(asked, behind=behind, open=self._open(True, rows, lengths) if behind else 0)
        window, keys = self.decoder.windows[index], None
        if any(past):
            assert self.layers is not None
            cache, (row,) = self.layers[index], rows
            keys = cache.row(row, past[row])[0]
            if window is not None:
                ids = torch.cat([cache.positions(row, past[row]), ids])
        found = ahead(layer, hidden, rope, asked, keys, ids, window)
        g, width = self.decoder.geometry, hidden.shape[-1]
        projected = hidden.shape[1] * g.kv_heads + len(rows) * g.heads
        self.trace.selector_flops += 2 * g.head_dim * width * projected
        self.trace.selector_flops += asked.flops(g.heads, g.head_dim, 0 if keys is None else keys.shape[2])
        parts = found.index_select(0, vision).split([packed.counts[i] for i in rows])
        return dict(zip(rows, parts, strict=True))


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


class Shown:
    """What the policies of some rows see of their tokens by name, gathered for all of them when one reads it."""

    def __init__(self, packed: Packed, rows: Sequence[int], hidden: torch.Tensor) -> None:
        self.packed, self.rows, self.hidden = packed, rows, hidden
        self._left: dict[str, dict[int, torch.Tensor]] = {}

    def of(self, row: int, name: str) -> torch.Tensor:
        """A tensor that nobody else has been given."""
        left = self._left.get(name, {})
        if row not in left:
            left = self._left[name] = dict(zip(self.rows, self._gather(name), strict=True))
        return left.pop(row)

    def _gather(self, name: str) -> Sequence[torch.Tensor]:
        packed, rows, spans = self.packed, self.rows, self.packed.vision_spans()
        counts = [packed.counts[row] for row in rows]
        if name == "place":
            return [packed.vision[spans[row]] - packed.spans()[row].start for row in rows]
        if name == "text":
            sizes = [packed.rows[row].text.prompt for row in rows]
            prompts = [slice(s.start, s.start + packed.rows[i].text.prompt) for i, s in enumerate(packed.text_spans())]
            places = torch.cat([packed.text[prompts[row]] for row in rows])
            return self.hidden[0].index_select(0, places).split(sizes)
        if name == "hidden":
            places = packed.of_rows(packed.vision, rows, spans)
            return self.hidden[0].index_select(0, places).split(counts)
        alive = packed.of_rows(packed.alive, rows, spans)
        return packed.fields[name].index_select(0, alive).split(counts)


class _LookAhead:
    """``tokens.ahead``: called, it looks ahead for one row; handed back in a Best, for all rows at once."""

    def __init__(self, questions: Questions, index: int, layer: Any, hidden: torch.Tensor, row: int) -> None:
        self.questions, self.args, self.row = questions, (index, layer, hidden), row

    def __call__(self) -> torch.Tensor:
        return self.together([self.row])[self.row]

    def together(self, rows: list[int]) -> dict[int, torch.Tensor]:
        return self.questions.look_ahead(*self.args, rows)


class _NoLookAhead:
    def __init__(self, row: int) -> None:
        pass

    def __call__(self) -> torch.Tensor:
        raise UnsupportedError("tokens.ahead() is there for prune, not for route: rank by hidden states instead")
