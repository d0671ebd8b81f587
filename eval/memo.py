"""Pictures are encoded once, however many policies look at them: the vision tower's forward, remembered for a block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


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


@dataclass
class Memo:
    """Stands in for a tower's forward. ``computed``, ``reused``: how often each happened."""

    tower: Any
    forward: Any
    runs: list[Run] = field(default_factory=list)
    computed: int = 0
    reused: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pixels, rest = (args[0], kwargs) if args else (kwargs.get("pixel_values"), _without(kwargs, "pixel_values"))
        if not isinstance(pixels, torch.Tensor) or not self._simple(args, rest):
            return self.forward(*args, **kwargs)
        states, rest = _states(rest.get("output_hidden_states")), _without(rest, "output_hidden_states")
        for run in self.runs:
            if run.serves(pixels, states, rest):
                self.reused += 1
                return copy.copy(run.out)
        out = self.forward(*args, **kwargs)
        self.computed += 1
        self.runs.append(Run(pixels, states, rest, out))
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
def shared_features(model: Any) -> Iterator[Memo]:
    """Within the block, the vision tower runs once for the same pixels; later calls get the same output again.

    Exact: what is reused is the very output of an earlier run on bit-equal pixels with equal arguments. The tower's own
    hooks, projector, packing and everything behind run as always. If a hook sits on a module inside the tower, or
    gradients are on, nothing is reused. One thread at a time; the outputs are held until the block ends.

    Raises:
        ValueError: the model has no vision tower of its own.
    """
    tower = model.get_encoder(modality="image")
    if not isinstance(tower, torch.nn.Module) or tower is model:
        raise ValueError(f"{type(model).__name__} has no vision tower whose output could be shared")
    before = tower.__dict__.get("forward")
    memo = Memo(tower, tower.forward)
    tower.forward = memo
    try:
        yield memo
    finally:
        del tower.forward
        if before is not None:
            tower.forward = before
