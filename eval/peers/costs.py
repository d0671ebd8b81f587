"""What whole models cost as other packages reduce them, beside ours: CPU time in turns, memory, and eight prompts.

Both sides are processes with one thread and the same weights (``random_models.MIDDLE``: 576 vision tokens). A round
asks both for each of eight prompts, one after the other, and then ours for all eight in one call. The packages are made
for one prompt a call; what they do with eight is tried once.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from vtr.eval.cost.peak_memory import available, let_peak_fall, resident
from vtr.eval.peers.cases import Case
from vtr.eval.peers.channel import PeerError, Worker
from vtr.eval.peers.driver import neighbours, ratio

PROMPTS, STEPS = 8, 16
"""Prompts of a batch, and words decoded behind each."""
PREPARES, ANSWERS = 120.0, 300.0
"""Seconds."""
WHAT = "random models of 8 layers × 512, 576 vision tokens, float32; CPU ms, one thread each"
SPANS = ("prefill", "first", "decode")
"""As ``meter.generate`` has them, in milliseconds."""


def measure(case: Case, theirs: Worker, ours: Worker, rounds: int) -> dict[str, Any]:
    """Costs of a case that runs.

    ``prefill``, ``first``, ``decode``: CPU ms of both (medians) and the ratio ours ÷ theirs of neighbouring calls.
    ``peak``: MB that a call adds to the process. ``batch``: throughput, ours (eight prompts in a call) ÷ theirs (eight
    calls): of prompts until their first word, of further words, and of prompts with all their words. ``together``:
    share of rows that theirs answers in a batch as it does alone, or why it does not; ``ours_together`` likewise.

    Raises:
        PeerError: a side failed, or theirs answers the same prompt otherwise when asked again.
    """
    settings = {"settings": dict(case.settings)} if case.settings else {}
    theirs.ask("prepare", PREPARES, kind=case.kind, method=case.method, **settings)
    ours.ask("prepare", PREPARES, kind=case.kind, method=case.ours)
    sides = {"theirs": theirs, "ours": ours}
    for side in sides.values():
        _time(side, [0])  # warms up
    peak = {name: grown(side) for name, side in sides.items()} if available() else None
    times: dict[str, dict[str, list[float]]] = {span: {name: [] for name in sides} for span in SPANS}
    alone: dict[str, dict[int, list[int]]] = {name: {} for name in sides}
    batches: list[dict[str, Any]] = []
    for turn in range(rounds * PROMPTS):
        seed = turn % PROMPTS
        for name in list(sides) if turn % 2 else list(sides)[::-1]:
            found = _time(sides[name], [seed])
            if alone[name].setdefault(seed, found["ids"][0]) != found["ids"][0] and not case.drawn:
                raise PeerError(f"{name}: prompt {seed} is answered otherwise when asked again")
            for span in SPANS:
                times[span][name].append(found[f"{span}_ms"])
        if seed == PROMPTS - 1:
            batches.append(_time(ours, range(PROMPTS)))
    out: dict[str, Any] = {span: side_by_side(times[span]) for span in SPANS}
    return out | {
        "peak": peak, "batch": throughput(times, batches), "together": together(theirs, alone["theirs"], case),
        "ours_together": None if case.drawn else same(batches[-1], alone["ours"]),
    }  # fmt: skip


def _time(side: Worker, seeds: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = side.ask("time", ANSWERS, seeds=list(seeds), steps=STEPS)
    return found


def grown(side: Worker) -> float:
    """MB by which one prompt raises the resident memory of the worker."""
    side.ask("give_back", ANSWERS)
    let_peak_fall(side.process.pid)
    before = resident("VmRSS", side.process.pid)
    _time(side, [0])
    return (resident("VmHWM", side.process.pid) - before) / 1e6


def side_by_side(times: dict[str, list[Any]]) -> dict[str, Any] | None:
    """None where a span could not be told apart."""
    if any(None in values for values in times.values()):
        return None
    return {name: statistics.median(values) for name, values in times.items()} | {"ratio": ratio(times)}


def throughput(times: dict[str, dict[str, list[float]]], batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each round: theirs eight calls over ours in one."""
    first, decode = (
        [sum(times[span]["theirs"][i * PROMPTS : (i + 1) * PROMPTS]) for i in range(len(batches))]
        for span in ("first", "decode")
    )
    mine = {span: [one[f"{span}_ms"] for one in batches] for span in ("first", "decode")}
    pairs = (first, decode), (mine["first"], mine["decode"])
    whole = [[a + STEPS * b for a, b in zip(*pair, strict=True)] for pair in pairs]
    found = {"first": (first, mine["first"]), "decode": (decode, mine["decode"]), "all": (whole[0], whole[1])}
    return {name: neighbours(a, b) for name, (a, b) in found.items()}


def same(found: dict[str, Any], alone: dict[int, list[int]]) -> float:
    """Share of the rows of a batch that say what they say alone."""
    return statistics.fmean(ids == alone[i] for i, ids in enumerate(found["ids"]))


def together(theirs: Worker, alone: dict[int, list[int]], case: Case) -> float | str | None:
    try:
        found = _time(theirs, range(PROMPTS))
    except PeerError as error:
        return str(error)
    return None if case.drawn else same(found, alone)


def table(rows: Sequence[tuple[str, str, dict[str, Any]]]) -> Table:
    """What the terminal shows of models, methods and their costs."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    made.add_column("model", no_wrap=True)
    made.add_column("method", no_wrap=True)
    for head in ("prefill", "first\nword", "further\nword", "peak", "8 prompts:\nfirst", "\nfurther", "\nall"):
        made.add_column(head, justify="right", no_wrap=True)
    for model, method, found in rows:
        ratios = [found[span] and found[span]["ratio"]["median"] for span in SPANS]
        peak = found["peak"]["ours"] / found["peak"]["theirs"] if found["peak"] and found["peak"]["theirs"] else None
        times = [found["batch"][name]["median"] for name in ("first", "decode", "all")]
        shown = ["–" if one is None else f"{one:.2f}" for one in (*ratios, peak, *times)]
        made.add_row(model, method.removesuffix("_r0.75"), *shown)
    return made
