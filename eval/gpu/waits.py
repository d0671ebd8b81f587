"""Where the host waits for the device: torch's warnings, each with the line of ours that it comes from."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import vtr

OURS = [str(Path(str(module.__file__)).parent) for module in (vtr, vtr.integrations)]
NOT_OURS = str(Path(__file__).parents[1])
"""The measurements, which may lie below the package."""


class Waits:
    """Waits of the forwards that ran, by line.

    Attributes:
        inside: of the prompt's forward, between the first layer and the last. around: before and behind these.
        decoding: of whole forwards after the prompt's.
    """

    def __init__(self) -> None:
        self.inside: Counter[str] = Counter()
        self.around: Counter[str] = Counter()
        self.decoding: Counter[str] = Counter()
        self.forwards = 0
        self.now: Counter[str] | None = None

    def note(self, message: Any, *_: Any, **__: Any) -> None:
        """Stands in for ``warnings.showwarning``."""
        if "synchroniz" in str(message) and self.now is not None:
            self.now[line_of(sys._getframe(1))] += 1

    def facts(self) -> dict[str, Any]:
        """For a result file."""
        return {"inside": dict(self.inside), "around": dict(self.around), "decoding": dict(self.decoding)}


def line_of(frame: FrameType | None) -> str:
    """The innermost line of vtr among the callers, else the innermost that is not ``warnings``', with its folder."""
    first: str | None = None
    while frame is not None:
        path = frame.f_code.co_filename
        here = f"{'/'.join(Path(path).parts[-3:])}:{frame.f_lineno}"
        if path.startswith(tuple(OURS)) and not path.startswith(NOT_OURS):
            return here
        if first is None and Path(path).name not in ("warnings.py", "waits.py"):  # who warned
            first = here
        frame = frame.f_back
    return first or "somewhere"


@contextmanager
def watched(model: Any) -> Iterator[Waits]:
    """Notes the waits of every forward of ``model`` (on a CPU there are none to see)."""
    waits, layers = Waits(), model.get_decoder().layers

    def begin(*_: Any) -> None:
        waits.forwards += 1
        waits.now = waits.around if waits.forwards == 1 else waits.decoding

    def enter(*_: Any) -> None:
        waits.now = waits.inside if waits.forwards == 1 else waits.decoding

    def leave(*_: Any) -> None:
        waits.now = waits.around if waits.forwards == 1 else waits.decoding

    def end(*_: Any) -> None:
        waits.now = None

    hooks = [
        model.register_forward_pre_hook(begin, prepend=True),
        layers[0].register_forward_pre_hook(enter, prepend=True),
        layers[-1].register_forward_hook(leave),
        model.register_forward_hook(end),
    ]
    on_gpu = model.device.type == "cuda"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = waits.note  # type: ignore[assignment]
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            yield waits
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        for hook in hooks:
            hook.remove()
