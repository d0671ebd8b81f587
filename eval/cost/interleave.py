"""Comparing times on a machine that others use as well: runs take turns, and only ratios of neighbours count."""

from __future__ import annotations

import ctypes
import platform
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from vtr.eval.cost.timing import between, mark, now

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


@dataclass(frozen=True)
class Ratio:
    """One time over another. low, high: the smallest and the largest ratio of two neighbouring runs."""

    value: float
    low: float
    high: float


def median_ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """The median of the ratios of runs that were neighbours."""
    pairs = [a / b for a, b in zip(over, under, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


def total_ratio(over: Sequence[float], under: Sequence[float], parts: int = 8) -> Ratio:
    """The ratio of the sums, so that what happens once in a while counts; low and high are those of eighths."""
    size = max(len(over) // parts, 1)
    starts = range(0, len(over) - size + 1, size)
    pairs = [sum(over[i : i + size]) / sum(under[i : i + size]) for i in starts]
    return Ratio(sum(over) / sum(under), min(pairs), max(pairs))


def in_turns(
    runs: Mapping[str, Callable[[], float]],
    repeats: int,
    done: Callable[[], Any] = lambda: None,
    warmup: bool = True,
) -> dict[str, list[float]]:
    """Every run once to warm up, then all of them ``repeats`` times, every other round backwards.

    Args:
        runs: each returns the seconds it took. done: called after every run. warmup: False leaves the first round out.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(0 if warmup else 1, repeats + 1):
        for name in sorted(runs, key=list(runs).index, reverse=i % 2 == 0):
            seconds = runs[name]()
            if i:
                times[name].append(seconds)
            done()
    return times


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in this process, where it would give it back to the system now and then.

    Getting it again costs a page fault for every 4 KiB: up to a fifth of a prefill, on whichever side it hits.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest it takes


@contextmanager
def text_times(model: Any, read: Callable[[], float] | None = None) -> Iterator[list[float]]:
    """Seconds of each forward of the text model, and of what a patched model does before it on behalf of a policy.

    Merged embeddings go in, hidden states come out: vision tower, projector and head are not in it.

    Args:
        read: counts something else, e.g. instructions; None: time.
    """
    spans: list[float] = []
    text, marks = model.get_decoder(), list[Any]()
    here = partial(mark, model.device) if read is None else read

    def begin(*_: Any) -> None:
        marks[:] = [here()]

    def note(*_: Any) -> None:
        marks.append(here())

    def end(*_: Any) -> None:
        asked, began, starts = marks
        spans.append(between(asked, began) + between(starts, here()))

    hooks = [
        model.register_forward_pre_hook(begin, prepend=True),
        model.register_forward_pre_hook(note),
        text.register_forward_pre_hook(note, prepend=True),
        text.register_forward_hook(end),
    ]
    try:
        yield spans
    finally:
        for hook in hooks:
            hook.remove()


class Turns(StoppingCriteria):
    """Handed to a ``generate``: notes what every decoded token took, waits while the others have their turns."""

    def __init__(self, index: int, ring: Ring) -> None:
        self.index, self.ring = index, ring
        self.spent: list[Any] = []
        self.started: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.started is not None:
            self.spent.append(self.ring.read() - self.started)
        self.ring.hand_over(self.index)  # also after the prompt's forward: all prompts come first
        self.ring.wait(self.index)
        self.ring.done()
        stop = torch.full((input_ids.shape[0],), self.ring.broken, dtype=torch.bool, device=input_ids.device)
        self.started = self.ring.read()
        return stop


class Ring:
    """Whose turn it is: several threads, of which one runs."""

    def __init__(self, count: int, read: Callable[[], Any], done: Callable[[], Any]) -> None:
        self.read, self.done, self.broken = read, done, False
        self._turn = [threading.Semaphore(0) for _ in range(count)]
        self._gone: set[int] = set()

    def wait(self, index: int) -> None:
        self._turn[index].acquire()

    def hand_over(self, index: int) -> None:
        """The next one of those who still run has its turn."""
        count = len(self._turn)
        after = (one % count for one in range(index + 1, index + 1 + count))
        next_one = next((one for one in after if one not in self._gone), None)
        if next_one is not None:
            self._turn[next_one].release()

    def stop(self) -> None:
        """One has failed: the others end at their next token."""
        self.broken = True
        for turn in self._turn:
            turn.release()

    def run(self, index: int, generate: Callable[[StoppingCriteriaList], Any]) -> list[Any]:
        turns = Turns(index, self)
        self.wait(index)
        try:
            if not self.broken:
                generate(StoppingCriteriaList([turns]))
        except BaseException:
            self.stop()
            raise
        self._gone.add(index)
        self.hand_over(index)
        return turns.spent


def decode_in_turns(
    generates: Mapping[str, Callable[[StoppingCriteriaList], Any]],
    device: torch.device,
    done: Callable[[], Any] = lambda: None,
    read: Callable[[], Any] | None = None,
) -> dict[str, list[Any]]:
    """Run ``generate`` calls side by side, a token each: seconds of each decoded token.

    All of what a token costs is in it: the text model, the head, and generate's own work. Whoever ends early leaves
    the turns to the others.

    Args:
        generates: each takes the stopping criteria it must pass on. done: called after every token.
        read: what is read before and after each token, whose difference is noted (a number or an array); None: time.
    """
    ring = Ring(len(generates), partial(now, device) if read is None else read, done)
    with ThreadPoolExecutor(len(generates)) as pool:
        tasks = [pool.submit(ring.run, i, generate) for i, generate in enumerate(generates.values())]
        ring.hand_over(-1)
        try:
            return {name: task.result() for name, task in zip(generates, tasks, strict=True)}
        except BaseException:  # also Ctrl-C, which reaches this thread alone
            ring.stop()
            raise


def decode_one_by_one(
    generates: Mapping[str, Callable[[StoppingCriteriaList], Any]],
    done: Callable[[], Any],
    read: Callable[[], Any],
) -> dict[str, list[Any]]:
    """The same, each ``generate`` from its first token to its last, in the thread that calls.

    For CUDA graphs, which torch keeps for the thread that captured them, on a device that nobody else uses.
    """
    spent = {}
    for name, generate in generates.items():
        ring = Ring(1, read, done)
        ring.hand_over(-1)
        spent[name] = ring.run(0, generate)
    return spent
