"""Decoding on a ragged cache: at which positions, which new tokens are remembered, and what it all came to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vtr.base import Token
from vtr.engine.attention import Plan
from vtr.engine.cache import CacheState, RaggedLayer
from vtr.engine.trace import Trace


class Step:
    """One decoded token per row, where some layer has to be asked: positions differ by layer, or tokens are forgotten.

    Args:
        positions: int64 [rows, 1], as layer 0 sees them without renumbering cuts. rotary: the model's rotary embedding.
    """

    def __init__(self, state: CacheState, positions: torch.Tensor, rotary: Any) -> None:
        self.state, self.positions, self.rotary = state, positions, rotary
        self.asks = any(p is not None and p.asks("remember") for p in state.policies)
        self.renumbers = any(map(any, state.shift))
        self._shift: list[int] = [0] * len(state.policies)
        self._changed: dict[str, Any] = {}
        if self.asks:
            state.memos = [{} for _ in state.policies]

    def layer(self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Put this layer's positions and its plan into ``kwargs``. hidden: [rows, 1, D], returned as it is."""
        if self.renumbers:
            self._renumber(index, hidden, kwargs)
        if self.asks:
            remembering(index, hidden, kwargs)
        return hidden

    def _renumber(self, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
        shift = self.state.shift[index]
        if shift != self._shift:
            at = self.positions - torch.tensor(shift).to(self.positions.device, non_blocking=True)[:, None]
            self._changed = {"position_embeddings": self.rotary(hidden, position_ids=at), "position_ids": at}
            self._shift = shift
        kwargs.update(self._changed)
        plan: Plan = kwargs["vtr_plan"]
        if self._changed and plan.positions is not None:
            kwargs["vtr_plan"] = plan = replace(plan, positions=self._changed["position_ids"][:, 0])
            plan.layers[index].staged = plan


def remembering(index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Ask each row's policy whether layer ``index`` remembers its new token. hidden: [rows, 1, D].

    Decisions may stay on the device (a bool tensor) or be plain bools; rows without such a policy remember all.

    Raises:
        TypeError: a policy answered with something else.
    """
    plan: Plan = kwargs["vtr_plan"]
    cache = plan.layers[index]
    answers = []
    for row, p in enumerate(cache.state.policies):
        answer: Any = True
        if p is not None and p.asks("remember"):
            answer = p.remember(index, Token(hidden[row, 0], cache.state.memos[row]))
            single = isinstance(answer, torch.Tensor) and answer.dtype == torch.bool and answer.numel() == 1
            if not (isinstance(answer, bool) or single):
                raise TypeError(f"{type(p).__name__}.remember must return a bool or a bool tensor, got {answer!r}")
        answers.append(answer)
    if all(answer is True for answer in answers):
        plan = replace(plan, remember=None)
    else:
        cache.state.exact = False
        stacked = torch.stack([torch.as_tensor(a, device=hidden.device).reshape(()) for a in answers])
        plan = replace(plan, remember=stacked)
    cache.staged = plan
    kwargs["vtr_plan"] = plan


def note_cache(trace: Trace, layers: list[RaggedLayer] | None, attended_before: list[Any] | None = None) -> None:
    """Add to the trace what the cache says at the end of the call; numbers only, the cache itself may go."""
    if not layers:
        return
    before = attended_before or [0] * len(layers)
    trace.attended = [layer.attended - b for layer, b in zip(layers, before, strict=True)]
    trace.kv_tokens = [layer.live() for layer in layers]
    trace.kv_allocated = sum(layer.allocated() for layer in layers)
    trace.kv_itemsize = layers[0].buckets[0].keys.element_size() if layers[0].buckets else 0
