"""Decoding on a ragged cache: at which positions, which new tokens are remembered, and what it all came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vtr.base import Policy, Token
from vtr.engine.attention import Plan
from vtr.engine.cache import RaggedLayer
from vtr.engine.cache_state import CacheState
from vtr.engine.checks import version, write_error
from vtr.engine.once import from_host
from vtr.engine.rotary import Rotary
from vtr.engine.trace import Trace


class NewToken(Token):
    """A row's new token, whose hidden state is looked up when its policy asks for it. states: [rows, 1, D]."""

    def __init__(self, states: torch.Tensor, row: int, memo: dict[str, Any]) -> None:
        self._states, self._row, self.memo, self.flops = states, row, memo, 0

    @property
    def hidden(self) -> torch.Tensor:  # type: ignore[override]
        return self._states[self._row, 0]


class DecodeStep:
    """One decoded token per row, where some layer has to be asked: positions differ by layer, or tokens are forgotten.

    Layers that come to the same share a plan.

    Args:
        positions: int64 [rows, 1], as layer 0 sees them without renumbering cuts. rotary: of the text model.
    """

    def __init__(self, state: CacheState, positions: torch.Tensor, rotary: Rotary, trace: Trace) -> None:
        self.state, self.positions, self.rotary, self.trace = state, positions, rotary, trace
        self._groups = may_forget(state.policies)
        self.renumbers = any(map(any, state.shift))
        self._stages: dict[str | None, list[tuple[list[int], dict[str, Any]]]] = {}
        self._said: list[Any] = []
        self._decided: tuple[torch.Tensor | None, tuple[bool, ...] | None] = None, None
        self._plan: Plan | None = None
        if self._groups:
            state.memos = [{} for _ in state.policies]

    @property
    def asks(self) -> bool:
        """Whether some row's policy may forget its token."""
        return bool(self._groups)

    def layer(self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Put this layer's positions and its plan into ``kwargs``. hidden: [rows, 1, D], returned on its device."""
        plan: Plan = kwargs["vtr_plan"]
        device = plan.layers[index].buckets[0].keys.device
        if device != hidden.device:  # the layers from here on are on another one
            hidden, self._said = hidden.to(device), []
            self.state.memos = [memo_on(memo, device) for memo in self.state.memos]
        at = plan.positions
        if self.renumbers and (changed := self._renumbered(index, hidden)):
            nope = kwargs["position_embeddings"] is None
            kwargs.update({**changed, "position_embeddings": None} if nope else changed)
            at = None if at is None else changed["position_ids"][:, 0]
        kept, known = self._remembered(index, hidden) if self._groups else (None, None)
        if at is not plan.positions or kept is not None:
            last = self._plan
            if last is None or last.positions is not at or last.remember is not kept:
                self._plan = last = replace(plan, positions=at, remember=kept, said=known)
            kwargs["vtr_plan"] = plan.layers[index].staged = last
        return hidden

    def _renumbered(self, index: int, hidden: torch.Tensor) -> dict[str, Any]:
        """The arguments of layer ``index`` that renumbering cuts before it have changed; empty if none has."""
        shift, kind = self.state.shift[index], self.rotary.kinds[index]
        if kind not in self._stages:
            self._stages[kind] = [([0] * len(shift), {}), *self._ropes(kind, hidden)]
        return next(changed for other, changed in self._stages[kind] if other == shift)

    def _ropes(self, kind: str | None, hidden: torch.Tensor) -> list[tuple[list[int], dict[str, Any]]]:
        """Per shift of positions that some layer has: that shift, its positions and their rope; made together."""
        shifts = [list(s) for s in dict.fromkeys(map(tuple, self.state.shift)) if any(s)]
        rows, device = len(shifts[0]), self.positions.device
        lost = self.state.on_device([n for shift in shifts for n in shift], device)
        at = self.positions.repeat(len(shifts), 1) - lost[:, None]
        if self.rotary.alike:
            rope = self.rotary.of(kind, hidden, at.to(hidden.device))
            whole = isinstance(rope, torch.Tensor)
            ropes = list(rope.split(rows) if whole else zip(*(t.split(rows) for t in rope), strict=True))
        else:  # made for the longest of the positions that it is given
            ropes = [self.rotary.of(kind, hidden, ids.to(hidden.device)) for ids in at.split(rows)]
        return [
            (shift, {"position_ids": ids, "position_embeddings": rope})
            for shift, ids, rope in zip(shifts, at.split(rows), ropes, strict=True)
        ]

    def _remembered(self, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor | None, tuple[bool, ...] | None]:
        """Ask the rows' policies whether layer ``index`` remembers their new tokens. hidden: [rows, 1, D].

        Rows that share a policy are asked together. Decisions may stay on the device (bool tensors) or be plain bools;
        rows without such a policy remember all.

        Returns:
            bool [rows], or None if all do; and the same as the host knows it, or None.

        Raises:
            TypeError, ValueError: a policy answered with something else.
        """
        before, memos = version(hidden), self.state.memos
        said: list[Any] = []
        for p, rows in self._groups:
            tokens = [NewToken(hidden, row, memos[row]) for row in rows]
            said.append(p.remember_all(index, tokens))
            if version(hidden) != before:
                raise write_error(p, "remember", "token.hidden")
            self.trace.selector_flops += sum(token.flops for token in tokens)
        if not self._said or any(new is not old for new, old in zip(said, self._said, strict=True)):
            self._said, self._decided = said, self._decide(said, hidden.device)
        self.trace.remembered.setdefault(index, []).append(self._decided[0])
        return self._decided

    def _decide(
        self, said: list[Any], device: torch.device
    ) -> tuple[torch.Tensor | None, tuple[bool, ...] | None]:  # fmt: skip
        """What the groups' answers come to."""
        found = each_row(self._groups, said, len(self.state.policies))
        if isinstance(found, torch.Tensor):
            self.state.exact = False
            return found.to(device), None
        if all(one is True for one in found):
            return None, None
        self.state.exact = False
        if all(isinstance(one, bool) for one in found):
            known, once = tuple(found), self.state.once
            return once.of("kept", known, device, make=lambda: from_host(known, device)), known
        return torch.stack([as_tensor(one, device) for one in found]), None


def memo_on(memo: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What a policy noted of a token, its tensors on the device."""
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in memo.items()}


def may_forget(policies: Sequence[Policy | None]) -> list[tuple[Policy, list[int]]]:
    """Those that ``remember`` is asked of, each with its rows."""
    groups: dict[int, tuple[Policy, list[int]]] = {}
    for row, p in enumerate(policies):
        if p is not None and p.asks("remember"):
            groups.setdefault(id(p), (p, []))[1].append(row)
    return list(groups.values())


def each_row(groups: Sequence[tuple[Policy, list[int]]], said: Sequence[Any], rows: int) -> torch.Tensor | list[Any]:
    """What policies ``said`` of their rows: bool [rows] if one said it of all, else a bool or 0-d bool tensor each.

    Raises:
        TypeError, ValueError: a policy answered with something else.
    """
    found: list[Any] = [True] * rows
    for (p, mine), answer in zip(groups, said, strict=True):
        if isinstance(answer, torch.Tensor) and answer.dtype == torch.bool and answer.shape == (rows,) == (len(mine),):
            return answer
        for row, one in zip(mine, answers(p, answer, len(mine)), strict=True):
            found[row] = one
    return found


def answers(policy: Policy, found: Any, count: int) -> list[Any]:
    """What ``policy`` answered about ``count`` tokens, checked: a bool or a 0-d bool tensor for each.

    Raises:
        TypeError, ValueError: it answered with something else.
    """
    who = f"{type(policy).__name__}.remember"
    if isinstance(found, torch.Tensor) and found.dtype == torch.bool and found.shape == (count,):
        return list(found.unbind(0)) if count > 1 else [found]
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
