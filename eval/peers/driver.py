"""Runs peers beside vtr: every call of theirs has a neighbour of ours, so that a slow moment hits both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vtr.eval.accuracy.stats import paired
from vtr.eval.cost.interleave import median_ratio
from vtr.eval.peers.catalogue import Method, Peer
from vtr.eval.peers.channel import PeerError, Worker

from vtr.keep import keep_count

NONE = "none"


@dataclass
class Row:
    """One method of a peer beside one policy of ours; times in milliseconds, ratios are ours ÷ theirs."""

    peer: str
    method: str
    ours: str
    note: str
    batch: int
    accuracy: float | None = None
    ours_accuracy: float | None = None
    difference: dict[str, float] | None = None
    none_accuracy: float | None = None
    kv_tokens: float | None = None
    ours_kv_tokens: float | None = None
    same_as_alone: float | None = None
    ours_same_as_alone: float | None = None
    prefill_ms: dict[str, float] | None = None
    ours_prefill_ms: dict[str, float] | None = None
    prefill_ratio: dict[str, float] | None = None
    decode_ms: dict[str, float] | None = None
    ours_decode_ms: dict[str, float] | None = None
    decode_ratio: dict[str, float] | None = None
    none_prefill_ms: dict[str, float] | None = None
    ours_none_prefill_ms: dict[str, float] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Budget:
    """What ours keeps, said in the ways peers are told it.

    Attributes:
        vision_tokens: of a prompt. kept_tokens: of these, mean over layers.
        context_share: of the tokens before the question (start and picture) that a cache of as many tokens holds.
    """

    vision_tokens: int
    kept_tokens: float
    context_share: float


def budget_of(depth: int, vision_tokens: int, keep: float, layer: int, text_before: int = 1) -> Budget:
    """Of a single cut to ``keep`` on entering ``layer``."""
    kept = (layer * vision_tokens + (depth - layer) * keep_count(keep, vision_tokens)) / depth
    share = (kept + text_before + 1e-6) / (vision_tokens + text_before)  # peers round down
    return Budget(vision_tokens, kept, share)


@dataclass
class Plan:
    """What is run.

    Attributes:
        folder: what ``data.export`` wrote. ids: token id of each question's answer; probes follow the questions.
        timed: how many of them are timed, rounds: how often each, steps: tokens decoded then.
        timeout: seconds a worker has for one answer. done: called after every call, for a progress bar.
    """

    folder: Path
    weights: Path
    ids: Sequence[int]
    budget: Budget
    keep: float
    layer: int
    timed: int
    rounds: int
    steps: int
    timeout: float
    done: Callable[[], Any] = lambda: None
    threads: int = 1


class Side:
    """A worker of one side, started again if it has died; remembers right answers by method and batch."""

    def __init__(self, plan: Plan, python: Path, script: Path) -> None:
        self.plan, self.python, self.script = plan, python, script
        self.worker: Worker | None = None
        self.versions: dict[str, str] = {}
        self.answers: dict[tuple[str, int], tuple[list[bool], float | None]] = {}

    def ask(self, do: str, **request: Any) -> Any:
        budget = asdict(self.plan.budget)
        if self.worker is None or not self.worker.alive:
            log = self.plan.folder / f"{self.script.stem}.log"
            self.worker = Worker(self.python, self.script, log, self.plan.threads)
            where = {"folder": str(self.plan.folder), "weights": str(self.plan.weights)}
            try:
                self.versions = self.worker.ask("start", self.plan.timeout, **where, budget=budget)
            except PeerError:
                self.close()
                raise
        try:
            return self.worker.ask(do, self.plan.timeout, **request, budget=budget)
        finally:
            self.plan.done()

    def right(self, method: str, batch: int = 1) -> tuple[list[bool], float | None]:
        """Which questions it answers, and the cached tokens of a prompt (mean over layers and questions)."""
        if (method, batch) not in self.answers:
            right: list[bool] = []
            cached: list[float] = []
            for start in range(0, len(self.plan.ids), batch):
                indexes = list(range(start, min(start + batch, len(self.plan.ids))))
                reply = self.ask("answer", method=method, indexes=indexes)
                right += [
                    bool(ids) and ids[0] == self.plan.ids[i] for ids, i in zip(reply["ids"], indexes, strict=True)
                ]
                cached += [reply["kv_tokens"]] if reply["kv_tokens"] is not None else []
            self.answers[method, batch] = right, statistics.fmean(cached) if cached else None
        return self.answers[method, batch]

    def same_as_alone(self, method: str, batch: int) -> float:
        """Share of the rows of a batch of probes whose decoded tokens are those of the row alone."""
        indexes = list(range(len(self.plan.ids), len(self.plan.ids) + batch))
        together = self.ask("answer", method=method, indexes=indexes, steps=self.plan.steps)["ids"]
        alone = [self.ask("answer", method=method, indexes=[i], steps=self.plan.steps)["ids"][0] for i in indexes]
        return statistics.fmean(a == b for a, b in zip(together, alone, strict=True))

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


def compare(peer: Peer, method: Method, theirs: Side, ours: Side, plan: Plan) -> Row:
    """Fill a row; where the peer fails, the row holds its error and what was measured before."""
    spec = method.ours.format(keep=plan.keep, layer=plan.layer)
    row = Row(peer.name, method.name, spec, method.note, method.batch)
    row.ours_accuracy, row.ours_kv_tokens = _accuracy(ours.right(spec, method.batch))
    try:
        if method.batch > 1:
            row.ours_same_as_alone = ours.same_as_alone(spec, method.batch)
            row.same_as_alone = theirs.same_as_alone(method.name, method.batch)
        right, row.kv_tokens = theirs.right(method.name, method.batch)
        row.accuracy = statistics.fmean(right)
        row.difference = asdict(paired(ours.right(spec, method.batch)[0], right))
        if method.batch == 1:
            row.none_accuracy = statistics.fmean(theirs.right(NONE)[0])
            time_both(row, method.name, spec, theirs, ours, plan)
    except PeerError as error:
        row.error = str(error)
    row.versions = theirs.versions
    return row


def _accuracy(found: tuple[list[bool], float | None]) -> tuple[float, float | None]:
    return statistics.fmean(found[0]), found[1]


def time_both(row: Row, method: str, spec: str, theirs: Side, ours: Side, plan: Plan) -> None:
    """Theirs, ours, and both without reduction take turns, every other time backwards; the first of each warms up."""
    runs = {"theirs": (theirs, method), "ours": (ours, spec), "theirs none": (theirs, NONE), "ours none": (ours, NONE)}
    prefill: dict[str, list[float]] = {name: [] for name in runs}
    decode: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 + plan.rounds * plan.timed):
        names = list(runs) if turn % 2 else list(runs)[::-1]
        for name in names:
            side, what = runs[name]
            found = side.ask("time", method=what, index=turn % plan.timed, steps=plan.steps)
            if turn:
                prefill[name].append(found["prefill_ms"])
                decode[name].append(statistics.median(found["decode_ms"]))
    row.prefill_ms, row.ours_prefill_ms = spread(prefill["theirs"]), spread(prefill["ours"])
    row.decode_ms, row.ours_decode_ms = spread(decode["theirs"]), spread(decode["ours"])
    row.none_prefill_ms, row.ours_none_prefill_ms = spread(prefill["theirs none"]), spread(prefill["ours none"])
    row.prefill_ratio, row.decode_ratio = ratio(prefill), ratio(decode)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the smallest and the largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def neighbours(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """a ÷ b, of neighbouring calls: the median with the smallest and the largest."""
    found = median_ratio(a, b)
    return {"median": found.value, "low": found.low, "high": found.high}


def ratio(times: dict[str, list[float]]) -> dict[str, float]:
    """Ours ÷ theirs, of neighbouring calls."""
    return neighbours(times["ours"], times["theirs"])


def failed(peer: Peer, error: PeerError, plan: Plan) -> list[Row]:
    """The rows of a peer that cannot even be installed."""
    specs = [(m, m.ours.format(keep=plan.keep, layer=plan.layer)) for m in peer.methods]
    return [Row(peer.name, m.name, spec, m.note, m.batch, error=str(error)) for m, spec in specs]


def calls(peers: Sequence[Peer], plan: Plan) -> int:
    """How many calls there are if nothing fails (for a progress bar)."""
    n, total = len(plan.ids), 0
    for peer in peers:
        for method in peer.methods:
            answers = 2 * -(-n // method.batch)
            total += answers + (2 * (1 + method.batch) if method.batch > 1 else 4 * (1 + plan.rounds * plan.timed))
        total += n
    return total
