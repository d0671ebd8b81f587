"""A decode step captured as one CUDA graph: launched at once for every token, instead of kernel by kernel.

A graph is captured once a ``generate``, of a step with constant shapes (``vtr/engine/static.py``) of the text model.
It reads and writes the same storage at every replay. What stands around the text model runs as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vtr.base import UnsupportedError

CAPTURES = ("cuda",)
"""Devices that can capture a step."""
WORTHWHILE = 8
"""Tokens to decode from which on a capture, which costs about a step, is made without being asked for."""


def capture(step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """What ``step`` returns, and how to run it again. Capturing runs nothing: the first replay is the step itself."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return out, graph.replay


class StepGraph:
    """The steps of one ``generate``: the first runs as it is (kernels are chosen and loaded), the second is captured.

    Args:
        step: runs the text model once, (inputs_embeds [rows, 1, D], position_ids [.., 1]) → its output.
    """

    def __init__(self, step: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        self.step = step
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None
        self._out: Any = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, embeds: torch.Tensor, positions: torch.Tensor) -> Any:
        """The output of one step. Its tensors are overwritten by the next.

        Raises:
            UnsupportedError: something in the step waits for the device.
        """
        if self._given is None:
            self._given = embeds.clone(), positions.clone()
            return self.step(embeds, positions)
        for mine, new in zip(self._given, (embeds, positions), strict=True):
            mine.copy_(new)
        if self._replay is None:
            given = self._given
            try:
                self._out, self._replay = capture(lambda: self.step(*given))
            except RuntimeError as error:
                raise UnsupportedError(
                    "this decode step cannot be captured as a CUDA graph (a policy, or a hook on the model, waits for "
                    f"the device): pass disable_compile=True to generate. The device says: {error}"
                ) from error
        self._replay()
        return self._out


class GraphedForward:
    """Stands in for the text model's ``forward`` while some ``generate`` captures its steps, or chooses its policies.

    A hook of the text model says what is to happen instead of it: ``vtr_graph``, a step's graph; ``vtr_instead``, what
    gives the output.
    """

    def __init__(self, text: Any) -> None:
        self.text = text
        self._lock, self._users, self._own = threading.Lock(), 0, None
        self._original: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._original is not None
        instead: Callable[[], Any] | None = kwargs.pop("vtr_instead", None)
        if instead is not None:
            return instead()
        graph: StepGraph | None = kwargs.pop("vtr_graph", None)
        if graph is None:
            return self._original(*args, **kwargs)
        return graph(kwargs["inputs_embeds"], kwargs["position_ids"])

    def original(self, **kwargs: Any) -> Any:
        assert self._original is not None
        return self._original(**kwargs)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """While the block runs, in whatever thread."""
        with self._lock:
            self._users += 1
            if not self._stands:
                self._own, self._original = self.text.__dict__.get("forward"), self.text.forward
                self.text.forward = self
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self.leave()

    @property
    def _stands(self) -> bool:
        return self.text.__dict__.get("forward") is self

    def leave(self) -> None:
        """Give the text model its own ``forward`` back."""
        if self._stands:
            del self.text.__dict__["forward"]
            if self._own is not None:
                self.text.forward = self._own

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy made while the model generates: it stands in for the copy's ``forward``; nobody uses it yet."""
        return {**self.__dict__, "_lock": None, "_users": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def can_capture(text: Any) -> bool:
    """Whether all of the text model lies on one device that captures (nothing is offloaded)."""
    devices = {p.device for p in text.parameters()}
    return len(devices) == 1 and next(iter(devices)).type in CAPTURES
