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

from vtr.base import Keep, Scores
from vtr.engine.midway import Midway, enter
from vtr.policies.gsearch import GSearch
from vtr.schedule import Schedule
from vtr.search.data import Example
from vtr.search.metrics import Objective
from vtr.search.prompts import Prompts, prompts_of

Reuse = Literal["batched", "prefix", "naive"]
REUSES: tuple[Reuse, ...] = get_args(Reuse)
QUESTIONS = 8
"""Questions in one call at most; more rows are more candidates."""


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
    """A model, prepared calibration questions, and the states that the layers decided so far leave.

    Args:
        batch_size: rows (questions × candidates) in one call at most.
        reuse: "batched"; "prefix" (a candidate a call, all questions); "naive" (a candidate a call, the whole model).
        tick: called with the number of prompts scored.

    Raises:
        ValueError: settings out of range; data without the answers that the objective needs; see :func:`prompts_of`.
    """

    def __init__(
        self, model: Any, processor: Any, data: Sequence[Example], objective: Objective, queries: Scores,
        batch_size: int = 32, max_new_tokens: int = 16, reuse: Reuse = "batched",
        tick: Callable[[int], Any] = lambda count: None,
    ) -> None:  # fmt: skip
        if reuse not in REUSES:
            raise ValueError(f"reuse={reuse!r}: choose one of {', '.join(map(repr, REUSES))}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a call has at least one row")
        self.model, self.objective, self.queries, self.reuse = model, objective, queries, reuse
        self.depth = len(model.get_decoder().layers)
        self.tick, self.batch_size, self.spent = tick, batch_size, Spent()
        self.per_call = max(1, batch_size // min(QUESTIONS, batch_size)) if reuse == "batched" else 1
        self.batches: list[Prompts] = []
        self.base: list[float] = []
        self.sizes: list[tuple[int, int]] = []
        self._starts: list[Midway] = []
        self._prefix: tuple[Keep, ...] = ()
        size = min(QUESTIONS, batch_size)
        whole = GSearch([1.0] * self.depth, queries=queries)
        with torch.inference_mode():
            for start in range(0, len(data), size):
                batch = prompts_of(model, processor, data[start : start + size], objective, max_new_tokens)
                state = enter(model, batch.inputs, whole, batch.length)
                self._starts.append(state)
                end = state.go([(row, None) for row in range(len(batch))], self.depth)
                logits = self._logits(end, batch.counts)
                if objective.compares:
                    batch.full = [one.log_softmax(-1) for one in logits]
                self.base += self._values(batch, logits, range(len(batch)))
                self.sizes += state.sizes
                self.batches.append(batch)
                tick(len(batch))
        self._states = self._starts
        if objective.best == 1.0 and not any(self.base):
            raise ValueError(
                f"the unreduced model answers none of {len(self.base)} questions as the data does, so nothing can be "
                'lost: use objective="agreement" or "kl", which need no answers'
            )

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
            return [sum(self._values(batch, logits, rows))]
        state = self._states[number]
        end = state.go([(row, policy) for policy in policies for row in rows], self.depth)
        layers = self.depth - state.layer
        self._count(len(batch) * len(policies) * layers, end.tokens_run(), layers)
        logits = self._logits(end, batch.counts * len(policies))
        values = self._values(batch, logits, [*rows] * len(policies))
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

    def _logits(self, end: Midway, counts: Sequence[int]) -> list[torch.Tensor]:
        head = self.model.get_output_embeddings()
        return list(head(end.last(counts)).float().split(list(counts)))

    def _values(self, batch: Prompts, logits: Sequence[torch.Tensor], rows: Sequence[int]) -> list[float]:
        """The score of each piece of logits, which belong to these rows of the batch."""
        values = [
            self.objective.score(one, batch.targets[row], batch.full[row] if batch.full else None)
            for one, row in zip(logits, rows, strict=True)
        ]
        return torch.stack(values).tolist()

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
