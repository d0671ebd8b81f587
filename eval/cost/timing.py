"""How long a call takes: the text model's prefill (selection included), the first token, each decoded token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds of ``repeats`` runs after one warm-up.

    Attributes:
        prefill_ms: the text model on the prompt, selection included, vision tower not.
        first_token_ms: the whole first forward: vision tower, projector, text model, head.
        decode_ms: one decoded token, or None where none was asked for.
    """

    prefill_ms: float
    first_token_ms: float
    decode_ms: float | None
    repeats: int


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def mark(device: torch.device) -> Any:
    """A point in time for :func:`between`: a CUDA event, recorded without waiting, or a reading of the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one mark to another (waits for the GPU)."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(seconds) * 1e3, "low": min(seconds) * 1e3, "high": max(seconds) * 1e3}


def median_ms(run: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 1) -> float:
    """Median time of ``run()`` in milliseconds."""
    times = []
    for i in range(warmup + repeats):
        start = now(device)
        run()
        if i >= warmup:
            times.append(now(device) - start)
    return statistics.median(times) * 1e3


@contextmanager
def forwards(model: Any) -> Iterator[list[float]]:
    """Seconds of each forward of the text model in the block, in order: selection included, vision tower not."""
    device, spans = model.device, list[float]()

    def enter(*_: Any) -> None:
        spans.append(now(device))

    def leave(*_: Any) -> None:
        spans[-1] = now(device) - spans[-1]

    text = model.get_decoder()
    hooks = [text.register_forward_pre_hook(enter, prepend=True), text.register_forward_hook(leave)]
    try:
        yield spans
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def time_call(
    model: Any, inputs: Mapping[str, Any], policy: Any = None, *, repeats: int = 5, new_tokens: int = 0
) -> Timing:
    """Time one prompt batch under ``policy`` on a patched model.

    Args:
        inputs: what the processor returned. new_tokens: how many tokens to decode for ``decode_ms`` (0: none).
    """
    device = model.device
    with forwards(model) as spans:
        first = median_ms(lambda: model(**inputs, policy=policy, logits_to_keep=1, use_cache=True), repeats, device)
    decode = None
    if new_tokens:
        once = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False, "policy": policy}
        more = {**once, "max_new_tokens": 1 + new_tokens, "min_new_tokens": 1 + new_tokens}
        short = median_ms(lambda: model.generate(**inputs, **once), repeats, device)
        long = median_ms(lambda: model.generate(**inputs, **more), repeats, device)
        decode = max(long - short, 0.0) / new_tokens
    return Timing(statistics.median(spans[1:]) * 1e3, first, decode, repeats)
