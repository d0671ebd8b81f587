"""Decoding on a ragged cache: at which positions, which new tokens are remembered, and what it all came to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vtr.base import Policy, Token
from vtr.engine.attention import Plan
from vtr.engine.cache import RaggedLayer
from vtr.engine.cache_state import CacheState
from vtr.engine.checks import version, write_error
from vtr.engine.devices import execution_device
from vtr.engine.once import from_host
from vtr.engine.trace import Trace


class DecodeStep:
    """One decoded token per row, where some layer has to be asked: positions differ by layer, or tokens are forgotten.

    Args:
        positions: int64 [rows, 1], as layer 0 sees them without renumbering cuts. rotary: the model's rotary embedding.
    """

    def __init__(self, state: CacheState, positions: torch.Tensor, rotary: Any, trace: Trace) -> None:
        self.state, self.positions, self.rotary, self.trace = state, positions, rotary, trace
        self.asks = any(p is not None and p.asks("remember") for p in state.policies)
        self.renumbers = any(map(any, state.shift))
        self._shift: list[int] = [0] * len(state.policies)
        self._changed: dict[str, Any] = {}
        if self.asks:
            state.memos = [{} for _ in state.policies]

    def layer(self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Put this layer's positions and its plan into ``kwargs``. hidden: [rows, 1, D], returned on its device."""
        device = execution_device(layer) or hidden.device
        if device != hidden.device:  # the layers from here on are on another one
            hidden = hidden.to(device)
            self.state.memos = [memo_on(memo, device) for memo in self.state.memos]
        if self.renumbers:
            self._renumber(index, hidden, kwargs)
        if self.asks:
            self.trace.selector_flops += remembering(index, hidden, kwargs)
            self.trace.remembered.setdefault(index, []).append(kwargs["vtr_plan"].remember)
        return hidden

    def _renumber(self, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
        shift = self.state.shift[index]
        if shift != self._shift:
            at = self.positions - self.state.on_device(shift, self.positions.device)[:, None]
            self._changed = {"position_embeddings": self.rotary(hidden, position_ids=at.to(hidden.device))}
            self._changed["position_ids"] = at
            self._shift = shift
        kwargs.update(self._changed)
        plan: Plan = kwargs["vtr_plan"]
        if self._changed and plan.positions is not None:
            kwargs["vtr_plan"] = plan = replace(plan, positions=self._changed["position_ids"][:, 0])
            plan.layers[index].staged = plan


def memo_on(memo: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What a policy noted of a token, its tensors on the device."""
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in memo.items()}


def remembering(index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> int:
    """Ask the rows' policies whether layer ``index`` remembers their new tokens. hidden: [rows, 1, D].

    Rows that share a policy are asked together. Decisions may stay on the device (bool tensors) or be plain bools; rows
    without such a policy remember all.

    Returns:
        What the policies' own matrix products cost.

    Raises:
        TypeError, ValueError: a policy answered with something else.
    """
    plan: Plan = kwargs["vtr_plan"]
    cache, flops = plan.layers[index], 0
    groups: dict[int, tuple[Policy, list[int]]] = {}
    for row, p in enumerate(cache.state.policies):
        if p is not None and p.asks("remember"):
            groups.setdefault(id(p), (p, []))[1].append(row)
    found: list[Any] = [True] * len(cache.state.policies)
    whole: torch.Tensor | None = None
    before = version(hidden)
    for p, rows in groups.values():
        tokens = [Token(hidden[row, 0], cache.state.memos[row]) for row in rows]
        answer = p.remember_all(index, tokens)
        said = answers(p, answer, len(tokens))
        if version(hidden) != before:
            raise write_error(p, "remember", "token.hidden")
        whole = answer if isinstance(answer, torch.Tensor) and len(rows) == len(found) else None
        for row, each in zip(rows, said, strict=True):
            found[row] = each
        flops += sum(token.flops for token in tokens)
    kept, known = None, None
    if not all(each is True for each in found):
        cache.state.exact = False
        if all(isinstance(each, bool) for each in found):
            known = tuple(found)
            kept = plan.once.of("kept", known, hidden.device, make=lambda: from_host(known, hidden.device))
        else:
            kept = _decided(found, whole, hidden.device)
    plan = replace(plan, remember=kept, said=known)
    cache.staged = plan
    kwargs["vtr_plan"] = plan
    return flops


def _decided(found: list[Any], whole: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """bool [rows]: the answers of all rows; ``whole`` as it is if one policy said them together."""
    if whole is not None:
        return whole.to(device)
    return torch.stack([as_tensor(answer, device) for answer in found])


def answers(policy: Policy, found: Any, count: int) -> list[Any]:
    """What ``policy`` answered about ``count`` tokens, checked: a bool or a 0-d bool tensor for each.

    Raises:
        TypeError, ValueError: it answered with something else.
    """
    who = f"{type(policy).__name__}.remember"
    found = list(found.unbind(0)) if isinstance(found, torch.Tensor) and found.dim() == 1 else found
    if not isinstance(found, list) or len(found) != count:
        raise ValueError(f"{who} must answer for each of {count} tokens, got {found!r}")
    for answer in found:
        single = isinstance(answer, torch.Tensor) and answer.dtype == torch.bool and answer.numel() == 1
        if not (isinstance(answer, bool) or single):
            raise TypeError(f"{who} must return a bool or a bool tensor, got {answer!r}")
    return found


def as_tensor(answer: Any, device: torch.device) -> torch.Tensor:
    if isinstance(answer, bool):
        return torch.full((), answer, device=device)  # as a copy from the host it would wait
    moved: torch.Tensor = answer.to(device)
    return moved.reshape(())


def note_cache(trace: Trace, layers: list[RaggedLayer] | None, attended_before: list[Any] | None = None) -> None:
    """Add to the trace what the cache says at the end of the call; numbers only, the cache itself may go."""
    if not layers:
        return
    before = attended_before or [0] * len(layers)
    trace.attended = [layer.attended - b for layer, b in zip(layers, before, strict=True)]
    trace.kv_tokens = [layer.live() for layer in layers]
    trace.kv_allocated = sum(layer.allocated() for layer in layers)
    trace.kv_itemsize = layers[0].buckets[0].keys.element_size() if layers[0].buckets else 0
