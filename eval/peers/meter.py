"""Times of running models in CPU time; the same code on both sides. Needs torch only."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any


@contextmanager
def spans(model: Any, text: Any) -> Iterator[list[float]]:
    """CPU milliseconds of each forward of ``text``, with what the hooks of ``model`` and ``text`` do for it.

    Embeddings go in, hidden states come out: vision tower, projector, head and sampling are not in it.
    """
    found: list[float] = []
    started, asked = [0.0], [0.0]

    def begin(*_: Any) -> None:
        started[0] = time.process_time()

    def begun(*_: Any) -> None:
        asked[0] = time.process_time() - started[0]

    def end(*_: Any) -> None:
        found.append(1e3 * (asked[0] + time.process_time() - started[0]))
        asked[0] = 0.0

    hooks = [
        model.register_forward_pre_hook(begin, prepend=True),
        model.register_forward_pre_hook(begun),
        text.register_forward_pre_hook(begin, prepend=True),
        text.register_forward_hook(end),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def generate(model: Any, tower: Any, inputs: dict[str, Any], steps: int, **options: Any) -> dict[str, Any]:
    """Greedy ids of each row, and CPU milliseconds of a whole ``generate``.

    ``first_ms``: to the first word's logits. ``prefill_ms``: of these what is spent outside of ``tower``: projector,
    choosing, text model, head; None if the tower was not called as a module. ``decode_ms``: a further word's median.
    """
    marks: list[float] = []
    looked: list[float] = []

    def look(*_: Any) -> None:
        looked.append(time.process_time())

    def note(ids: Any, scores: Any) -> Any:
        marks.append(time.process_time())
        return scores

    hooks = [tower.register_forward_pre_hook(look, prepend=True), tower.register_forward_hook(look)]
    began = time.process_time()
    try:
        out = model.generate(
            **inputs, max_new_tokens=1 + steps, min_new_tokens=1 + steps, do_sample=False, logits_processor=[note],
            **options,
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    looked = [at for at in looked if at < marks[0]]  # without a cache the tower looks again for every word
    seen = sum(looked[1::2]) - sum(looked[::2])
    first, words = marks[0] - began, [b - a for a, b in pairwise(marks)]
    return {
        "ids": out[:, -1 - steps :].tolist(), "first_ms": 1e3 * first,
        "prefill_ms": 1e3 * (first - seen) if looked else None, "decode_ms": 1e3 * statistics.median(words),
    }  # fmt: skip


def give_back() -> None:
    """Return freed memory to the system, so that what a call adds can be seen (glibc)."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
