"""What a host asks of a GPU, counted by the line that asks: launches of kernels, waits, copies from the host."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple

TORCH = ("torch", "contextlib", "functools", "vtr.eval.cost.pretend", "vtr.eval.cost.counts")
"""Modules whose lines say nothing about who asks."""
MODELS = ("transformers.models.", "transformers.generation.")
"""A model's own code: what called it is not who asks."""


class Place(NamedTuple):
    """Who asks, and for what.

    Attributes:
        line: the nearest line of vtr, else of transformers, else of whoever calls: ``vtr/engine/cache.py:246``.
        what: the operation: ``index_select``, ``item``, ``to(cuda)``.
    """

    line: str
    what: str


@dataclass
class Counts:
    """Of everything since the start or the last :meth:`reset`.

    Attributes:
        launches: operations that start a kernel, a lower bound of the kernels (a sort is several).
        waits: times the host waits for the device.
        copies: copies from the host to the device. One that is not ``non_blocking`` is a wait as well.
    """

    launches: Counter[Place] = field(default_factory=Counter)
    waits: Counter[Place] = field(default_factory=Counter)
    copies: Counter[Place] = field(default_factory=Counter)

    def reset(self) -> None:
        for counter in (self.launches, self.waits, self.copies):
            counter.clear()

    def snapshot(self) -> Counts:
        """The same figures, which stay as they are."""
        return Counts(Counter(self.launches), Counter(self.waits), Counter(self.copies))

    def totals(self) -> dict[str, int]:
        """{"launches": …, "waits": …, "copies": …}."""
        return {name: getattr(self, name).total() for name in ("launches", "waits", "copies")}

    def launch(self, what: str, times: int = 1) -> None:
        self.launches[Place(line(), what)] += times

    def wait(self, what: str) -> None:
        self.waits[Place(line(), what)] += 1

    def copy(self, what: str, non_blocking: bool = False) -> None:
        """A copy from pageable memory: the host waits for it unless it is ``non_blocking``."""
        place = Place(line(), what)
        self.copies[place] += 1
        if not non_blocking:
            self.waits[place] += 1


def line() -> str:
    """The line that asks (:class:`Place`), found on the stack."""
    of_transformers = of_others = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if name.startswith("vtr.") and not name.startswith("vtr.eval."):
            return _named(frame, name)
        if name.startswith("transformers."):
            of_transformers = of_transformers or _named(frame, name)
            if name.startswith(MODELS):
                return of_transformers
        elif of_others is None and not any(name == one or name.startswith(one + ".") for one in TORCH):
            of_others = _named(frame, name)
        frame = frame.f_back
    return of_transformers or of_others or "?"


def _named(frame: FrameType, name: str) -> str:
    package = "/__init__" if frame.f_code.co_filename.endswith("__init__.py") else ""
    return f"{name.replace('.', '/')}{package}.py:{frame.f_lineno}"
