"""What one ``generate`` carries through its forwards, and what else a call leaves for others in its context.

Context variables, so that threads and interleaved generations never see each other's: the ``generate`` now running, a
request on its way to the text model, and the trace of the last call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.cache import RaggedLayer, is_ragged
from vtr.engine.captures import Captures
from vtr.engine.prompt import Prompt
from vtr.engine.short_cache import ShortCache, is_short
from vtr.engine.trace import DenseTrace, Trace

last_traces: ContextVar[Mapping[object, Trace | DenseTrace | None]] = ContextVar(
    "vtr_last_traces", default=MappingProxyType({})
)
"""By the key of the model; replaced, never changed in place."""


@dataclass(eq=False)
class Generation:
    """One running ``generate``.

    Attributes:
        key: whose model it is. policies: one per prompt, or None if nothing is reduced.
        prompt: where its vision tokens sit, read off the arguments before transformers encodes and drops the images.
            What stands behind its columns was decoded, or drafted.
        length: columns of input_ids as passed. started: True after the first forward.
        captures: what its policies want of the vision tower, or None.
        ids: int64 [prompts, L], the prompt's new part; None where only embeddings are known.
        short: the cache of shortened rows that it runs on, on the padded path.
        until_done: what ends with it.
        ends: the ids that end an answer. pad: the id behind it. room: tokens it may have.
    """

    key: object
    policies: list[Policy | None] | None
    prompt: Prompt | None
    length: int
    trace: Trace
    captures: Captures | None = None
    ids: torch.Tensor | None = None
    started: bool = False
    cache_layers: list[RaggedLayer] | None = None
    attended_before: list[Any] | None = None
    short: ShortCache | None = None
    until_done: ExitStack = field(default_factory=ExitStack)
    ends: tuple[int, ...] = ()
    pad: int = 0
    room: int = 1

    def note_forward(self, layers: list[RaggedLayer] | None) -> None:
        """Note that a forward is under way, and on which cache (counted from what it had attended to before)."""
        self.started, self.cache_layers = True, layers
        if self.attended_before is None and layers is not None:
            self.attended_before = [layer.attended for layer in layers]

    def owns_cache(self, cache: Any) -> bool:
        """Whether ``cache`` is the reduced one that this generate runs on (any, before its first forward)."""
        if is_short(cache):
            return not self.started or cache is self.short
        return is_ragged(cache) and (not self.started or cache.layers is self.cache_layers)

    def owns(self, ids: torch.Tensor | None, kwargs: Mapping[str, Any], cache: Any) -> bool:
        """Whether a forward is a step of this generate, not one that a callback makes by hand while it runs."""
        if not self.started:
            return True
        if self.cache_layers is not None or self.short is not None:
            return self.owns_cache(cache)
        brings_images = any(kwargs.get(name) is not None for name in PIXELS)
        return cache is None and not brings_images and self.starts_with_prompt(ids)

    def starts_with_prompt(self, ids: torch.Tensor | None) -> bool:
        """Whether ``ids`` begin with this generate's prompt in every row (reads the device)."""
        if self.ids is None or ids is None or ids.shape[1] < self.ids.shape[1] or ids.shape[0] % self.ids.shape[0]:
            return False
        prompts = self.ids.repeat_interleave(ids.shape[0] // self.ids.shape[0], 0).to(ids.device)
        return torch.equal(ids[:, : prompts.shape[1]], prompts)

    def policies_for(self, rows: int) -> list[Policy | None]:
        """The policies of a forward of ``rows`` rows that is made by hand and names none.

        Raises:
            UnsupportedError: which row is whose cannot be told.
        """
        assert self.policies is not None
        if rows % len(self.policies) == 0:
            return [p for p in self.policies for _ in range(rows // len(self.policies))]
        if all(p == self.policies[0] for p in self.policies):
            return self.policies[:1] * rows
        raise UnsupportedError(
            f"a forward of {rows} rows inside a generate of {len(self.policies)} rows with different policies: name "
            "the policy of this call, model(…, policy=p), or policy=None"
        )


PIXELS = ("pixel_values", "pixel_values_videos", "images")
"""What calls bring images in."""

running: ContextVar[Generation | None] = ContextVar("vtr_running", default=None)

pending_request: ContextVar[tuple[object, Any] | None] = ContextVar("vtr_pending_request", default=None)
"""(whose model, its request or None), between the pre-hooks of model and text model, where forward passes no keyword
arguments on."""

_lock = threading.Lock()
_busy: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


@contextmanager
def busy(key: object, why: str) -> Iterator[None]:
    """While the block runs, in whatever thread, the model of ``key`` may not be patched again or unpatched."""
    with _lock:
        _busy.setdefault(key, []).append(why)
    try:
        yield
    finally:
        with _lock:
            _busy[key].remove(why)


def refuse_if_busy(key: object, what: str) -> None:
    """Raise RuntimeError if some thread uses the model of ``key`` right now."""
    with _lock:
        whys = list(_busy.get(key, ()))
    if whys:
        raise RuntimeError(f"cannot {what} this model now: {whys[0]}")


def refuse_replica(key: object, policy: Any) -> None:
    """Refuse the reduced call of a copy that ``torch.nn.DataParallel`` made: its thread knows nothing of this context.

    Raises:
        UnsupportedError: a policy was given, is the default, or a ``vtr.use`` block is open.
    """
    with _lock:
        used = bool(_busy.get(key))
    if policy is not None or used:
        raise UnsupportedError(
            "torch.nn.DataParallel on several devices cannot reduce (a batch's policies and vtr.use do not reach its "
            "copies): call model.module, use DistributedDataParallel, or pass policy=None outside of vtr.use"
        )
