"""Pictures are encoded once, however many policies look at them: the vision tower's forward, remembered for a block."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from vtr.engine.adapters import unwrapped


@dataclass(frozen=True)
class Run:
    """One forward of the tower.

    Attributes:
        states: the hidden states it was asked for: True for all, a set of layers, None for none.
        rest: its other arguments but the pixels.
    """

    pixels: torch.Tensor
    states: bool | frozenset[int] | None
    rest: dict[str, Any]
    out: Any

    def serves(self, pixels: torch.Tensor, states: bool | frozenset[int] | None, rest: dict[str, Any]) -> bool:
        """Whether this run gave what such a run would give, bit for bit."""
        if self.rest != rest or pixels.shape != self.pixels.shape or pixels.dtype != self.pixels.dtype:
            return False
        if self.states is not True and self.states != states:
            return False
        if self.states is True and states is None:
            return False
        return pixels.device == self.pixels.device and torch.equal(pixels, self.pixels)


@dataclass(eq=False)
class Shared:
    """What one block has encoded. ``computed``, ``reused``: how often each happened."""

    runs: list[Run] = field(default_factory=list)
    computed: int = 0
    reused: int = 0


_blocks: ContextVar[Mapping[int, Shared]] = ContextVar("vtr_shared_features", default=MappingProxyType({}))
"""The blocks open in this context, by the id of their tower; replaced, never changed in place."""
_lock = threading.Lock()


@dataclass(eq=False)
class Memo:
    """Stands in for a tower's forward while some context shares features; the others get the forward itself."""

    tower: Any
    forward: Any
    own: Any
    """What the tower's ``__dict__`` held before."""
    users: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = _blocks.get().get(id(self.tower))
        pixels, rest = (args[0], kwargs) if args else (kwargs.get("pixel_values"), _without(kwargs, "pixel_values"))
        if block is None or not isinstance(pixels, torch.Tensor) or not self._simple(args, rest):
            return self.forward(*args, **kwargs)
        states, rest = _states(rest.get("output_hidden_states")), _without(rest, "output_hidden_states")
        for run in block.runs:
            if run.serves(pixels, states, rest):
                block.reused += 1
                return copy.copy(run.out)
        out = self.forward(*args, **kwargs)
        block.computed += 1
        block.runs.append(Run(pixels, states, rest, out))
        return copy.copy(out)

    def _simple(self, args: tuple[Any, ...], rest: dict[str, Any]) -> bool:
        """Whether the output depends on the pixels and plain arguments alone, and nothing else is to happen."""
        plain = len(args) <= 1 and not any(isinstance(value, torch.Tensor) for value in rest.values())
        return plain and not torch.is_grad_enabled() and not _watched(self.tower)


def _without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != name}


def _states(wanted: Any) -> bool | frozenset[int] | None:
    """transformers takes True, a layer, or a list of layers."""
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        return True
    return frozenset(wanted if isinstance(wanted, (list, tuple)) else [wanted])


def _watched(tower: Any) -> bool:
    """Whether somebody listens to the tower's inner modules; transformers' own hooks take part in the output."""
    for module in tower.modules():
        if module is not tower:
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if not (getattr(hook, "__module__", None) or "").startswith("transformers."):
                    return True
    return False


@contextmanager
def shared_features(model: Any) -> Iterator[Shared]:
    """Within the block, the vision tower runs once for the same pixels; later calls get the same output again.

    Exact: what is reused is the very output of an earlier run on bit-equal pixels with equal arguments. The tower's own
    hooks, projector, packing and everything behind run as always. If a hook sits on a module inside the tower, or
    gradients are on, nothing is reused. Only this thread (this context) is concerned; a block inside a block shares the
    outer one's. The outputs are held until the block ends.

    Raises:
        ValueError: the model has no vision tower of its own.
    """
    model = unwrapped(model)
    tower = model.get_encoder(modality="image")
    if not isinstance(tower, torch.nn.Module) or tower is model:
        raise ValueError(
            f"{type(model).__name__} has no vision tower whose output could be shared: leave the block out"
        )
    known = _blocks.get().get(id(tower))
    if known is not None:
        yield known
        return
    block = Shared()
    token, memo = _blocks.set({**_blocks.get(), id(tower): block}), _enter(tower)
    try:
        yield block
    finally:
        _blocks.reset(token)
        _leave(memo)


def _enter(tower: Any) -> Memo:
    with _lock:
        memo = tower.__dict__.get("forward")
        if not isinstance(memo, Memo) or memo.tower is not tower:
            memo = Memo(tower, tower.forward, memo)
            tower.forward = memo
        memo.users += 1
        return memo


def _leave(memo: Memo) -> None:
    with _lock:
        memo.users -= 1
        if not memo.users:
            del memo.tower.forward
            if memo.own is not None:
                memo.tower.forward = memo.own
