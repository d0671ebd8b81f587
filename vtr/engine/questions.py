"""What the rows' policies are asked at each decoder layer of a packed forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from vtr.base import Best, Merged, Route, Tokens, UnsupportedError
from vtr.engine import ranking
from vtr.engine.attending import Taking, check_attend, taking
from vtr.engine.cache import RaggedLayer
from vtr.engine.checks import GuardedFields, check_best, check_count, check_route, checked_keep
from vtr.engine.decoder import Decoder, norm_of
from vtr.engine.merging import Growth, Merging, checked_merge, merges_of
from vtr.engine.packed import Packed, less
from vtr.engine.positions import Positions
from vtr.engine.probes import Probes
from vtr.engine.rows import Row
from vtr.engine.trace import RowTrace, Trace
from vtr.tokens import STATES


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
        probes: what ranks the tokens. pruned, routed, attending: per row, whether its policy answers ``prune``,
            ``route`` and ``attend``.
    """

    def __init__(
        self, rows: list[Row], packed: Packed, positions: Positions, layers: list[RaggedLayer] | None,
        decoder: Decoder, trace: Trace,
    ) -> None:  # fmt: skip
        self.rows, self.packed, self.positions = rows, packed, positions
        self.decoder, self.trace = decoder, trace
        self.probes = Probes(rows, packed, positions, layers, decoder, trace)
        self.pruned = [row.asks("prune") for row in rows]
        self.routed = [row.asks("route") for row in rows]
        self.attending = [row.asks("attend") for row in rows]

    def fork(self, rows: list[Row], probes: Probes, packed: Packed, positions: Positions, trace: Trace) -> Questions:
        """Of rows that go on from these, by whose ``probes`` they are ranked."""
        made = Questions(rows, packed, positions, None, self.decoder, trace)
        made.probes = probes
        return made

    # -- prune -----------------------------------------------------------------------------------------------------
    def prune(
        self, index: int, layer: Any, hidden: torch.Tensor, traces: list[RowTrace]
    ) -> tuple[torch.Tensor | None, Growth | None]:
        """Cut the rows. hidden: [1, T, D].

        Returns:
            Packed indices of the tokens that enter layer ``index``, None for all; and what is new among them.
        """
        if not any(self.pruned):
            return None, None
        answers = self._ask("prune", index, hidden, self.pruned, layer)
        kept = self._kept("prune", answers, hidden.shape[-1])
        counts = self.packed.counts
        cut = [i for i, k in enumerate(kept) if k is not None]
        if not cut:
            self.probes.done()
            return None, None
        merges = merges_of(answers)
        chosen, left = ranking.keep(kept, counts, hidden.device)
        self.probes.gauge.cut(index, cut, chosen, left, traces)
        self.probes.done()
        for i in cut:
            if self.rows[i].policy.renumbers:  # type: ignore[union-attr]
                self.positions.lose(i, counts[i] - left[i] - (len(merges[i].states) if i in merges else 0))
        merging = Merging(self.packed, merges, traces) if merges else None
        places = self.packed.cut(chosen, left)
        return places, None if merging is None else merging.grow(places)

    def _kept(self, question: str, answers: dict[int, Any], width: int) -> list[ranking.Kept]:
        """What each row keeps, checked; None for all of it. width: of hidden states."""
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
                check_best(scores, answer.count, n, question, policy, answer.groups)
                kept[i] = (scores, answer.count, answer.groups) if answer.count < n else None
            elif isinstance(answer, Merged) and question == "prune":
                chosen = checked_merge(answer, n, width, policy, self.packed.vision.device)
                kept[i] = chosen if len(chosen) < n else None
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
        kept = self._kept("route", {i: answer.keep for i, answer in answers.items()}, hidden.shape[-1])
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

    # -- attend ----------------------------------------------------------------------------------------------------
    def attend(self, index: int, layer: Any, hidden: torch.Tensor, passing: Passing) -> Taking | None:
        """Who takes part in layer ``index``'s attention, of those that pass it; None: all. hidden: [1, T, D]."""
        if not any(self.attending):
            return None
        answers = {i: a for i, a in self._ask("attend", index, hidden, self.attending, layer).items() if a is not None}
        if not answers:
            return None
        for i, answer in answers.items():
            check_attend(answer, self.rows[i].policy, layer)  # type: ignore[arg-type]
        return taking(self.packed, answers, [row.policy for row in self.rows], passing.lengths, passing.counts)

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
        answers: dict[int, Any] = {}
        for rows in groups.values():
            policy = self.rows[rows[0]].policy
            assert policy is not None
            shown = Shown(self.packed, self.positions, rows, hidden)
            look = partial(_LookAhead, self.probes, index, layer, hidden) if question == "prune" else _NoLookAhead
            tokens = [self._tokens(index, i, partial(shown.of, i), look(i), question == "prune") for i in rows]
            if question == "attend":
                said: Any = [
                    policy.attend(index, one, _ThisLayer(self.probes, index, layer, hidden, i))
                    for i, one in zip(rows, tokens, strict=True)
                ]
            else:
                said = getattr(policy, f"{question}_all")(index, tokens)
            check_count(said, len(rows), question, policy)
            for i, one, answer in zip(rows, tokens, said, strict=True):
                one._field.check(policy, question, "tokens")  # type: ignore[attr-defined]
                self.trace.selector_flops += one.flops
                answers[i] = answer
        return answers

    def _tokens(self, index: int, i: int, field: Any, look: Any, ranked: bool) -> Tokens:
        """What row ``i``'s policy sees. ranked: with the scores that it asked for."""
        row, depth = self.rows[i], self.decoder.depth
        vision = row.vision
        scores, text_scores = self.probes.of_row(i) if ranked else (None, None)
        return Tokens(
            index, depth, vision.total, vision.count, GuardedFields(field), scores, look, vision.per_image,
            row.length, row.memo, norm_of(self.decoder.text), text_scores,
        )  # fmt: skip


class Shown:
    """What the policies of some rows see of their tokens by name, gathered for all of them when one reads it."""

    def __init__(self, packed: Packed, positions: Positions, rows: Sequence[int], hidden: torch.Tensor) -> None:
        self.packed, self.positions, self.rows, self.hidden = packed, positions, rows, hidden
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
        if name == "behind":
            texts = [packed.rows[row].text for row in rows]
            return [torch.arange(t.prompt, device=packed.text.device) >= t.first_behind for t in texts]
        if name in ("text", "text_place", "text_cos", "text_sin"):
            sizes = [packed.rows[row].text.prompt for row in rows]
            first = [span.start for span in packed.text_spans()]
            several = [packed.text[first[row] : first[row] + n] for row, n in zip(rows, sizes, strict=True)]
            if name == "text_place":
                return [places - packed.spans()[row].start for places, row in zip(several, rows, strict=True)]
            return self._states(name.removeprefix("text_")).index_select(0, torch.cat(several)).split(sizes)
        if name in STATES:
            places = packed.of_rows(packed.vision, rows, spans)
            return self._states(name).index_select(0, places).split(counts)
        alive = packed.of_rows(packed.alive, rows, spans)
        return packed.fields[name].index_select(0, alive).split(counts)

    def _states(self, name: str) -> torch.Tensor:
        """[T, size]: hidden states, or cosine or sine of the positions."""
        if name in ("cos", "sin"):
            rope = self.positions.rope
            if not isinstance(rope, tuple) or len(rope) != 2:
                raise UnsupportedError(
                    "tokens.rope is a cosine and a sine, which this layer does not get: rank by hidden states"
                )
            return rope[name == "sin"][0]
        return self.hidden[0]


class _LookAhead:
    """``tokens.ahead``: called, it looks ahead for one row; handed back in a Best, for all rows at once."""

    def __init__(self, probes: Probes, index: int, layer: Any, hidden: torch.Tensor, row: int) -> None:
        self.probes, self.args, self.row = probes, (index, layer, hidden), row

    def __call__(self) -> torch.Tensor:
        return self.together([self.row])[self.row]

    def together(self, rows: list[int]) -> dict[int, torch.Tensor]:
        return self.probes.look_ahead(*self.args, rows)


class _ThisLayer:
    """The attention of the layer about to run, for one row; see ``LayerAttention``."""

    def __init__(self, probes: Probes, index: int, layer: Any, hidden: torch.Tensor, row: int) -> None:
        self.probes, self.args, self.row = probes, (index, layer, hidden), row

    def received(self, rows: torch.Tensor) -> torch.Tensor:
        return self.probes.received(*self.args, self.row, rows)


class _NoLookAhead:
    def __init__(self, row: int) -> None:
        pass

    def __call__(self) -> torch.Tensor:
        raise UnsupportedError(
            "tokens.ahead() is there for prune alone: rank by hidden states, or in attend by attention.received()"
        )
