"""Scores candidate schedules on calibration questions, running only what differs between them.

Candidates that agree on the layers before l enter layer l with the same tokens: their hidden states there, and the
attention scores that the cut at l ranks by, are computed once and kept; every candidate runs the layers from l on. Many
candidates share one call, as rows with different policies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from vtr.base import Scores
from vtr.keep import Keep
from vtr.policies.decoder.gsearch import GSearch
from vtr.schedule import Schedule
from vtr.search.prompts import Prepared, answer_logits

Reuse = Literal["batched", "prefix", "naive"]
REUSES: tuple[Reuse, ...] = get_args(Reuse)


@dataclass
class Spent:
    """What a search ran. ``naive_…``: the same candidates, each by itself on every question through the whole decoder.

    Attributes:
        calls: calls of a decoder layer, whatever the rows. rows: prompts that passed a layer, summed over layers.
        tokens: tokens that did. seconds: of scoring.
    """

    calls: int = 0
    rows: int = 0
    tokens: int = 0
    naive_calls: int = 0
    naive_rows: int = 0
    naive_tokens: int = 0
    candidates: int = 0
    seconds: float = 0.0

    def table(self) -> str:
        """Three lines of plain text."""
        lines = [f"{self.candidates} candidates, {self.seconds:.1f} s of scoring"]
        for name, mine, naive in (
            ("layer-forwards (prompt × layer)", self.rows, self.naive_rows),
            ("token-layer-forwards", self.tokens, self.naive_tokens),
            ("calls of a decoder layer", self.calls, self.naive_calls),
        ):
            lines.append(f"{name}: {mine:,} instead of {naive:,} ({naive / max(mine, 1):.1f}×)")
        return "\n".join(lines)

    def to_json(self) -> dict[str, float]:
        return asdict(self)


class Scorer:
    """Prepared calibration questions, and the states that the layers decided so far leave.

    Args:
        queries: the ranking of the candidates' policies.
        reuse: "batched"; "prefix" (a candidate a call, all questions); "naive" (a candidate a call, the whole model).
        tick: called with the number of prompts scored.

    Raises:
        ValueError: an unknown way of reuse.
    """

    def __init__(
        self, prepared: Prepared, queries: Scores, reuse: Reuse = "batched",
        tick: Callable[[int], Any] = lambda count: None,
    ) -> None:  # fmt: skip
        if reuse not in REUSES:
            raise ValueError(f"reuse={reuse!r}: choose one of {', '.join(map(repr, REUSES))}")
        self.model, self.objective, self.depth = prepared.model, prepared.objective, prepared.depth
        self.batches, self.base, self.sizes = prepared.batches, prepared.base, prepared.sizes
        self.queries, self.reuse, self.tick, self.spent = queries, reuse, tick, Spent()
        self.per_call = max(1, prepared.batch_size // prepared.together) if reuse == "batched" else 1
        self._starts = self._states = prepared.starts
        self._prefix: tuple[Keep, ...] = ()

    def __len__(self) -> int:
        return len(self.base)

    @property
    def base_mean(self) -> float:
        """The unreduced model's score."""
        return sum(self.base) / len(self)

    def policy(self, keeps: Sequence[Keep]) -> GSearch:
        """The policy of a schedule under this search's ranking."""
        return GSearch(Schedule(keeps), queries=self.queries)

    @torch.inference_mode()
    def means(
        self, prefix: Sequence[Keep], candidates: Sequence[Sequence[Keep]], floor: float | None = None
    ) -> list[float | None]:
        """The mean score of each candidate over all questions.

        Args:
            prefix: the keeps of the first layers, the same in all candidates; what they leave is computed once.
            floor: candidates that cannot reach this mean any more are dropped, if candidates are batched; theirs is
                None.
        """
        begun = time.perf_counter()
        policies, sums = [self.policy(keeps) for keeps in candidates], [0.0] * len(candidates)
        alive = set(range(len(candidates)))
        if self.reuse != "naive":
            self._advance(tuple(prefix))
        done = 0
        for number, batch in enumerate(self.batches):
            order = sorted(alive)
            for first in range(0, len(order), self.per_call):
                some = order[first : first + self.per_call]
                for i, value in zip(some, self._run(number, [policies[i] for i in some]), strict=True):
                    sums[i] += value
            done += len(batch)
            self.tick(len(batch) * len(candidates))
            if floor is not None and self.reuse == "batched":
                left = self.objective.best * (len(self) - done)
                alive -= {i for i in alive if (sums[i] + left) / len(self) < floor - 1e-9}
        self._count_naive(candidates)
        self.spent.seconds += time.perf_counter() - begun
        return [sums[i] / len(self) if i in alive else None for i in range(len(candidates))]

    def _run(self, number: int, policies: Sequence[GSearch]) -> list[float]:
        """The sum of scores of each policy over the questions of one batch, in one call."""
        batch, rows = self.batches[number], range(len(self.batches[number]))
        if self.reuse == "naive":
            out = self.model(**batch.inputs, policy=policies[0], vtr_queries_end=batch.length, use_cache=False)
            first = batch.length - 1
            logits = [out.logits[row, first : first + batch.counts[row]].float() for row in rows]
            tokens = sum(self._tokens(policies[0].schedule, size) for size in self._starts[number].sizes)
            self._count(len(batch) * self.depth, tokens, self.depth)
            return [sum(batch.values(self.objective, logits))]
        state = self._states[number]
        end = state.go([(row, policy) for policy in policies for row in rows], self.depth)
        layers = self.depth - state.layer
        self._count(len(batch) * len(policies) * layers, end.tokens_run(), layers)
        values = batch.values(self.objective, answer_logits(self.model, end, batch.counts * len(policies)))
        return [sum(values[i : i + len(batch)]) for i in range(0, len(values), len(batch))]

    def _advance(self, prefix: tuple[Keep, ...]) -> None:
        """Bring the kept states to the layer behind ``prefix``."""
        if prefix == self._prefix:
            return
        if prefix[: len(self._prefix)] != self._prefix:
            self._states, self._prefix = self._starts, ()
        # the first keep that is not decided yet is another one, so that the scores it needs are taken
        last = prefix[-1]
        policy = self.policy([*prefix, *[last / 2] * (self.depth - len(prefix))])
        moved = []
        for state in self._states:
            state = state.go([(row, policy) for row in range(len(state.session.rows))], len(prefix))
            layers = state.layer - len(self._prefix)
            self._count(len(state.session.rows) * layers, state.tokens_run(), layers)
            moved.append(state)
        self._states, self._prefix = moved, prefix

    def _count(self, rows: int, tokens: int, calls: int) -> None:
        self.spent.rows += rows
        self.spent.tokens += tokens
        self.spent.calls += calls

    def _count_naive(self, candidates: Sequence[Sequence[Keep]]) -> None:
        self.spent.candidates += len(candidates)
        self.spent.naive_calls += len(candidates) * len(self.batches) * self.depth
        self.spent.naive_rows += len(candidates) * len(self) * self.depth
        for keeps in candidates:
            self.spent.naive_tokens += sum(self._tokens(keeps, size) for size in self.sizes)

    def _tokens(self, keeps: Sequence[Keep], size: tuple[int, int]) -> int:
        """Tokens of a prompt of ``size`` that pass a layer under a schedule, summed over layers."""
        return sum(Schedule(keeps).counts(size[0])) + size[1] * self.depth
