"""Where a policy can keep something from one call to the next: attributes, its classes, and what its code refers to."""

from __future__ import annotations

import copy
import hashlib
import inspect
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import CellType, FunctionType
from typing import Any

import torch

from vtr.base import Policy

DATA = (bool, int, float, str, bytes, bytearray, list, dict, set, deque, tuple, torch.Tensor, type(None))
BOXES = (list, dict, set, deque, bytearray)
"""What can be changed without being replaced."""


@dataclass
class Place:
    """Something that a call might change.

    Attributes:
        name: what it is called in messages, e.g. ``self.count``. value: what is there now.
        owner, key: whose it is. flagged: any change of it is a fault (else only one that shows in an answer).
    """

    name: str
    value: Any
    owner: Any
    key: Any
    flagged: bool

    def set(self, value: Any) -> None:
        if isinstance(self.value, BOXES) and type(value) is type(self.value):  # others may hold it too
            box: Any = self.value
            box.clear()
            (box.update if isinstance(value, (dict, set)) else box.extend)(value)
        elif isinstance(self.owner, dict):
            self.owner[self.key] = value
        elif isinstance(self.owner, CellType):
            self.owner.cell_contents = value
        elif isinstance(self.owner, type):
            setattr(self.owner, self.key, value)

    def remove(self) -> None:
        if isinstance(self.owner, dict):
            self.owner.pop(self.key, None)
        elif isinstance(self.owner, type):
            delattr(self.owner, self.key)


class Kept:
    """All places of a policy as they are now, to see later which have changed, and to put them back."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.before = {place.name: (place, picture(place.value), _copied(place.value)) for place in _places(policy)}

    def changed(self) -> list[Place]:
        now = {place.name: place for place in _places(self.policy)}
        out = [place for name, place in now.items() if name not in self.before]
        out += [now.get(name, old) for name, (old, was, _) in self.before.items()
                if name not in now or picture(now[name].value) != was]  # fmt: skip
        return out

    def put_back(self) -> None:
        """Restore classes, modules and closures; the policy's own attributes are left (fresh ones have their own)."""
        for place in self.changed():
            if place.owner is self.policy.__dict__ or place.name.startswith("self."):
                continue
            if place.name in self.before:
                place.set(_copied(self.before[place.name][2]))
            else:
                place.remove()


def _places(policy: Policy) -> Iterator[Place]:
    for part in getattr(policy, "policies", [policy]):
        mro = type(part).__mro__
        lazy = {name for cls in mro for name, value in vars(cls).items() if isinstance(value, cached_property)}
        for name, value in list(vars(part).items()):
            if name not in lazy and not callable(value):
                yield Place(f"self.{name}", value, part.__dict__, name, name[0] != "_")
        for cls in mro:
            if cls.__module__.split(".")[0] in ("vtr", "builtins", "abc", "typing"):
                continue
            for name, value in list(vars(cls).items()):
                if not name.startswith("__") and isinstance(value, DATA):
                    yield Place(f"{cls.__name__}.{name}", value, cls, name, name[0] != "_")
            for function in _functions(cls):
                yield from _referred(function)


def _functions(cls: type) -> list[FunctionType]:
    """A class's functions, and those that they refer to, of the same module."""
    todo: list[Any] = [inspect.unwrap(getattr(v, "__func__", getattr(v, "fget", v))) for v in vars(cls).values()
                       if callable(getattr(v, "__func__", getattr(v, "fget", v)))]  # fmt: skip
    found: dict[int, FunctionType] = {}
    while todo:
        one = todo.pop()
        if isinstance(one, FunctionType) and id(one) not in found and one.__module__ == cls.__module__:
            found[id(one)] = one
            todo += [one.__globals__.get(name) for name in _names(one.__code__)]
    return list(found.values())


def _names(code: Any) -> set[str]:
    inner = [_names(const) for const in code.co_consts if inspect.iscode(const)]
    return set(code.co_names).union(*inner)


def _referred(function: FunctionType) -> Iterator[Place]:
    """Data that a function refers to: of its module, of functions around it, and its defaults."""
    spaces = sys.modules.get(function.__module__)
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__ and isinstance(function.__globals__[name], DATA):
            label = f"{getattr(spaces, '__name__', '?')}.{name}"
            yield Place(label, function.__globals__[name], function.__globals__, name, False)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not set yet
            continue
        if isinstance(value, DATA):
            yield Place(f"{name} (of the function around {function.__qualname__})", value, cell, name, False)
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for i, value in enumerate(v for v in defaults if isinstance(v, BOXES)):
        yield Place(f"default {i} of {function.__qualname__}", value, None, i, False)


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied is left as it is
        return value


def picture(value: Any, depth: int = 5) -> Any:
    """Something that is equal for equal values, and cheap to keep."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1)
        return value.dtype, tuple(value.shape), hashlib.sha256(raw.view(torch.uint8).numpy().tobytes()).digest()
    if isinstance(value, torch.nn.Module):
        return picture(dict(value.state_dict()), depth)
    if isinstance(value, torch.Generator):
        return picture(value.get_state(), depth)
    if depth and isinstance(value, Mapping):
        return "mapping", tuple(sorted((repr(k)[:200], repr(picture(v, depth - 1))) for k, v in value.items()))
    if depth and isinstance(value, (list, tuple, deque)):
        return type(value).__name__, tuple(picture(v, depth - 1) for v in value)
    if isinstance(value, (set, frozenset)):
        return "set", tuple(sorted(map(repr, value)))
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)):
        return repr(value)
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):  # numpy
        return str(value.dtype), value.tobytes()
    if depth and hasattr(value, "__dict__") and not callable(value):
        return type(value).__name__, picture(vars(value), depth - 1)
    return type(value).__name__
