"""Times the text model of a running model; the same code on both sides. Needs torch only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def spans(model: Any, text: Any) -> Iterator[list[float]]:
    """Milliseconds of each forward of ``text``, with what the hooks of ``model`` and ``text`` do for it.

    Embeddings go in, hidden states come out: vision tower, projector, head and sampling are not in it.
    """
    found: list[float] = []
    started, asked = [0.0], [0.0]

    def begin(*_: Any) -> None:
        started[0] = time.perf_counter()

    def begun(*_: Any) -> None:
        asked[0] = time.perf_counter() - started[0]

    def end(*_: Any) -> None:
        found.append(1e3 * (asked[0] + time.perf_counter() - started[0]))
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
