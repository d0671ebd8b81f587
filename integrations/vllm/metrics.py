"""Counters for Prometheus, beside vLLM's own at ``/metrics``: vision tokens that were there, kept and saved."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from vtr.integrations.vllm.specs import made_of

REFUSED = "vtr_requests_refused_total"
BUCKETS = (1, 4, 9, 16, 36, 64, 144, 256, 576, 1024, 2048, 4096)


@lru_cache(maxsize=1)
def _collectors() -> tuple[Any, Any, Any] | None:
    """(vision tokens saved, vision tokens per image, refused requests); None where prometheus_client is missing."""
    try:
        from prometheus_client import Counter, Histogram
    except ImportError:
        return None
    return (
        Counter("vtr_vision_tokens_saved", "Vision tokens that policies took out before the decoder", ["policy"]),
        Histogram("vtr_vision_tokens", "Vision tokens per image that enter the decoder", ["policy"], buckets=BUCKETS),
        Counter(REFUSED, "Requests the gateway refused", ["reason"]),
    )


def seen(spec: str, full: int, kept: int) -> None:
    """An image of ``full`` tokens enters the decoder as ``kept``. Labels are names of policies, so they stay few."""
    collectors, made = _collectors(), made_of(spec)
    if collectors is not None:
        name = "none" if made is None else made.name
        collectors[0].labels(name).inc(full - kept)
        collectors[1].labels(name).observe(kept)


def refused(reason: str) -> None:
    """The gateway refused a request."""
    if (collectors := _collectors()) is not None:
        collectors[2].labels(reason).inc()
