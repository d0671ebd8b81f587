"""A prefill in instructions or CPU time over its limit: ``vtr bench engine --count``, for machines that others use too.

Wall-clock times of a busy machine differ by tenths from run to run. What one thread has executed does not: policy and
limit take turns, and the median of the turns' ratios is taken until its 95 % interval is narrow.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
import statistics
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vtr.eval.cost import midsize
from vtr.eval.cost.engine import Bench, every_layer, facts, kept_lengths, limit, merged
from vtr.eval.cost.interleave import keep_freed_memory, text_times
from vtr.eval.cost.midsize import Size

import vtr

KINDS = ("auto", "instructions", "cpu")
NARROW = 0.005
"""Half the width of an interval that is narrow enough, as a share of the ratio."""
STEP, FEWEST, MOST = 10, 20, 600
"""Turns between two looks at the interval, before the first one, and at most."""
SYSCALLS = {"x86_64": 298, "aarch64": 241}
"""The number of perf_event_open."""
ATTRIBUTES = struct.pack("<IIQQQQQ", 0, 112, 1, 0, 0, 0, 1 << 5 | 1 << 6).ljust(112, b"\0")
"""A ``perf_event_attr``: hardware, instructions; not those of the kernel (bit 5) and of a hypervisor (bit 6)."""


@dataclass(frozen=True)
class Counter:
    """Something that grows with the work that this thread does.

    Attributes:
        name: "instructions" or "CPU time". read: its value now.
    """

    name: str
    read: Callable[[], float]


def instructions() -> Counter:
    """Instructions that this thread has executed outside of the kernel.

    Raises:
        RuntimeError: the machine does not count them, or does not let this process see the count.
    """
    number = SYSCALLS.get(platform.machine())
    if sys.platform != "linux" or number is None:
        raise RuntimeError(f"instructions are counted on Linux (x86-64, ARM64) alone, not on {platform.platform()}")
    libc = ctypes.CDLL(None, use_errno=True)
    file = libc.syscall(number, ATTRIBUTES, 0, -1, -1, 0)
    if file < 0:
        raise RuntimeError(
            f"this machine does not count instructions ({os.strerror(ctypes.get_errno())}): it is a virtual one, or "
            "/proc/sys/kernel/perf_event_paranoid is above 2"
        )

    def read() -> float:
        return float(int.from_bytes(os.read(file, 8), sys.byteorder))

    before = read()
    if read() <= before:
        os.close(file)
        raise RuntimeError("this machine's counter of instructions stands still")
    return Counter("instructions", read)


def counter(kind: str) -> Counter:
    """What to count in turns. "auto": instructions where the machine counts them, else this thread's CPU time.

    Raises:
        ValueError: an unknown kind. RuntimeError: instructions were asked for, and there are none.
    """
    if kind not in KINDS:
        raise ValueError(f"count={kind!r}: choose one of {', '.join((*KINDS, 'callgrind'))}")
    if kind != "cpu":
        try:
            return instructions()
        except RuntimeError as error:
            if kind == "instructions":
                raise RuntimeError(f"{error}. Take --count callgrind or --count cpu") from error
    return Counter("CPU time", time.thread_time)


@dataclass(frozen=True)
class Compared:
    """One amount of work over another.

    Attributes:
        ratio: the median of the turns' ratios. low, high: its 95 % interval. quartiles: of the turns' ratios.
        turns: how many there were. over, under: medians of both sides.
    """

    ratio: float
    low: float
    high: float
    quartiles: tuple[float, float]
    turns: int
    over: float
    under: float

    @property
    def narrow(self) -> bool:
        return self.high - self.low <= 2 * NARROW * self.ratio


def interval_of_median(values: Sequence[float], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the median, by bootstrap."""
    drawn = random.Random(seed)
    medians = sorted(statistics.median(drawn.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-1 - draws // 40]


def summary(over: Sequence[float], under: Sequence[float]) -> Compared:
    """Of the two sides of every turn."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, high = interval_of_median(ratios)
    first, _, third = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    medians = statistics.median(over), statistics.median(under)
    return Compared(statistics.median(ratios), low, high, (first, third), len(ratios), *medians)


def compare(
    over: Callable[[], float], under: Callable[[], float], fewest: int = FEWEST, most: int = MOST
) -> Compared:  # fmt: skip
    """Both in turns, every other turn the other way round, until the interval is narrow or there were ``most``."""
    spent: tuple[list[float], list[float]] = ([], [])
    over()
    under()
    while True:
        first = len(spent[0]) % 2
        for side in (first, 1 - first):
            spent[side].append((over, under)[side]())
        turns = len(spent[0])
        if turns >= most or (turns >= fewest and (turns - fewest) % STEP == 0 and summary(*spent).narrow):
            return summary(*spent)


# -- what is compared --------------------------------------------------------------------------------------------------
def prefill_work(count: Counter, model: Any, inputs: dict[str, torch.Tensor], **policy: Any) -> float:
    """Of the text model on the prompt, choosing included."""
    with text_times(model, count.read) as spans:
        model(**inputs, **policy, use_cache=True, logits_to_keep=1)
    return sum(spans)


def limit_work(count: Counter, text: Any, embeds: torch.Tensor, lengths: list[int]) -> float:
    """Of the stock layers on exactly these lengths."""
    before = count.read()
    limit(text, embeds, lengths)
    return count.read() - before


def policies(layers: int) -> dict[str, vtr.Policy]:
    """One cut, a cut at every layer, and stages that look ahead."""
    return {"fastv": vtr.FastV(0.25, layer=2), "gsearch": every_layer(layers), "pyramid": vtr.Pyramid()}


@torch.no_grad()
def measure(
    size: Size,
    kind: str = "auto",
    fewest: int = FEWEST,
    most: int = MOST,
    seed: int = 0,
    done: Callable[[dict[str, Any]], Any] = lambda found: None,
) -> dict[str, Any]:
    """Ratios over the limit on the CPU in float32, as flat data: key, ``key_min``, ``key_max`` (95 %), ``key_turns``.

    One thread runs while it is measured.

    Args:
        kind: see :func:`counter`.
        done: is given each ratio as it is there, flat as in the result, with what was counted.

    Raises:
        ValueError, RuntimeError: see :func:`counter`.
    """
    count, threads = counter(kind), torch.get_num_threads()
    keep_freed_memory()
    torch.set_num_threads(1)
    try:
        out = facts(size, "cpu", torch.float32, fewest, seed) | {"counted": count.name}
        for name, (over, under) in sides(count, bench_of(size, fewest, seed)).items():
            found = flat(f"counted_{name}", compare(over, under, fewest, most))
            out |= found
            done({"counted": count.name, **found})
        return out
    finally:
        torch.set_num_threads(threads)


def bench_of(size: Size, repeats: int, seed: int) -> Bench:
    """The two models, in float32 on the CPU."""
    stock = midsize.build(size, "cpu", torch.float32, seed=seed)
    return Bench(size, stock, vtr.patch(midsize.twin(stock)), repeats, seed)


def sides(count: Counter, bench: Bench) -> dict[str, tuple[Callable[[], float], Callable[[], float]]]:
    """What is compared, by name: (policy, its limit), and what the patch costs without one."""
    inputs, text = bench.prompt(), bench.stock.get_decoder()
    embeds = merged(bench.stock, inputs)
    unpatched = partial(prefill_work, count, bench.stock, inputs)
    out: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "no_policy": (partial(prefill_work, count, bench.patched, inputs), unpatched)
    }
    for name, policy in policies(bench.size.layers).items():
        lengths = kept_lengths(bench, policy)
        over = partial(prefill_work, count, bench.patched, inputs, policy=policy)
        out[name] = (over, partial(limit_work, count, text, embeds, lengths))
    return out


def flat(key: str, found: Compared) -> dict[str, Any]:
    """For a result file."""
    return {
        key: found.ratio, f"{key}_min": found.low, f"{key}_max": found.high, f"{key}_quartiles": list(found.quartiles),
        f"{key}_turns": found.turns, f"{key}_over": found.over, f"{key}_under": found.under,
    }  # fmt: skip
