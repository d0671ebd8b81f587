"""Models are patched as they are built: what ``import vtr.auto`` switches on.

A model is patched when it is complete: at the end of ``from_pretrained`` or ``from_config`` (weights in place), or of
the outermost ``__init__``. Models of other families are left alone, and the logger ``vtr.auto`` says so once per class.
Models that were there before, and other processes, are not concerned.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import WeakSet

from transformers import PreTrainedModel

from vtr.base import Policy, UnsupportedError
from vtr.chain import policy as as_policy
from vtr.engine.call import refuse_if_busy
from vtr.engine.choice import Key
from vtr.engine.hooks import NAME
from vtr.engine.install import patch, unpatch
from vtr.inputs import refuse_inputs

VARIABLE = "VTR_POLICY"
"""The environment variable that names the default policy."""
NOTHING = object()
log = logging.getLogger("vtr.auto")

_lock = threading.RLock()
_inside: ContextVar[bool] = ContextVar("vtr_auto_inside", default=False)
"""Whether a model is being built in this context: what is built inside of it is a part, or not complete."""
_enabled = False
_default: Policy | None = None
_replaced: list[tuple[type, str, Any, Any]] = []
"""(class, name, what stood there, what stands there now)."""
_patched: WeakSet[Any] = WeakSet()
_told: set[str] = set()
history: list[tuple[str, Key]] = []
"""(class, key) of every model patched so far, also of those that are gone."""


def enable(policy: Policy | str | None = None) -> None:
    """Patch models as they are built; ``import vtr.auto`` does it, with the policy of the environment.

    Args:
        policy: the default of models built from now on; a string is a spec, or a folder that
            ``policy.save_pretrained`` wrote. None (or "none"): they take policies, but nothing is reduced until a call,
            or ``vtr.use``, names one.

    Raises:
        ValueError, TypeError: not a policy, or one that acts before the processor. Whether it suits a model (its depth,
            its weights) is seen when that is built, which then raises.
    """
    global _enabled, _default
    if isinstance(policy, str):
        policy = Policy.from_pretrained(policy) if Path(policy).is_dir() else None if policy == "none" else policy
    made = None if policy is None else as_policy(policy)
    try:
        refuse_inputs(made)
    except UnsupportedError as error:
        raise ValueError(f"models are patched here, not processors: {error}") from error
    with _lock:
        _default = made
        if _enabled:
            return
        _enabled = True
        for name in ("from_pretrained", "_from_config"):
            _replace(PreTrainedModel, name, _loader)
        _replace(PreTrainedModel, "__init_subclass__", _watcher)
        for cls in _subclasses(PreTrainedModel):
            _watch(cls)


def disable(unpatch_models: bool = True) -> None:
    """Put back what was there before; calling it again does nothing.

    Args:
        unpatch_models: also unpatch the models that were patched automatically and are still alive (not their copies).

    Raises:
        RuntimeError: one of these models is in use (a ``vtr.use`` block, a running ``generate``); nothing has changed.
    """
    global _enabled, _default
    with _lock:
        models = [m for m in _patched if NAME in m.__dict__] if unpatch_models else []
        for model in models:
            refuse_if_busy(model.__dict__[NAME].key, "unpatch")
        _enabled, _default = False, None
        for owner, name, before, ours in reversed(_replaced):
            if owner.__dict__.get(name) is not ours:  # somebody wrapped it since; ours lets everything pass now
                continue
            if before is NOTHING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        _replaced.clear()
        for model in models:
            unpatch(model)
        _patched.clear()
        history.clear()
        _told.clear()


def patched() -> list[Any]:
    """The models that were patched automatically and are still alive."""
    with _lock:
        return list(_patched)


# -- what stands in for transformers' own -----------------------------------------------------------------------------
def _replace(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    before = owner.__dict__.get(name, NOTHING)
    ours = make(before)
    setattr(owner, name, ours)
    _replaced.append((owner, name, before, ours))


def _loader(before: Any) -> Any:
    """A class method that makes a model (or a tuple with it in front)."""

    @functools.wraps(before.__func__)
    def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with _making() as outermost:
            made = before.__get__(None, cls)(*args, **kwargs)
        if outermost:
            _built(made[0] if isinstance(made, tuple) else made)
        return made

    return classmethod(load)


def _constructor(before: Any) -> Any:
    @functools.wraps(before)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        with _making() as outermost:
            before(self, *args, **kwargs)
        if outermost:
            _built(self)

    return construct


@contextmanager
def _making() -> Iterator[bool]:
    """Says whether what is made in the block is a whole model: not inside of another one's making."""
    outermost = _enabled and not _inside.get()
    token = _inside.set(True)
    try:
        yield outermost
    finally:
        _inside.reset(token)


def _watcher(before: Any) -> Any:
    """Classes that are defined later: of this script, of models that transformers imports when they are asked for."""

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        if before is NOTHING:
            super(PreTrainedModel, cls).__init_subclass__(**kwargs)
        else:
            before.__get__(None, cls)(**kwargs)
        if _enabled:
            _watch(cls)

    return classmethod(init_subclass)


def _watch(cls: type) -> None:
    """See to it that direct constructions of a class that generates are noticed."""
    if "__init__" in cls.__dict__ and callable(getattr(cls, "generate", None)):
        with _lock:
            _replace(cls, "__init__", _constructor)


def _subclasses(cls: type) -> set[type]:
    mine: set[type] = set(cls.__subclasses__())
    return mine.union(*map(_subclasses, mine))


# -- a model is complete ----------------------------------------------------------------------------------------------
def _built(model: Any) -> None:
    """Patch it, or say that it is left alone.

    Raises:
        ValueError: the default policy cannot work on it.
    """
    default, name = _default, type(model).__name__
    try:
        patch(model, default)
    except UnsupportedError as error:
        _leave_alone(model, str(error))
        return
    except (ValueError, TypeError) as error:
        chosen = None if default is None else default.spec
        raise ValueError(f"vtr.auto: the default policy {chosen!r} does not suit this {name}: {error}") from error
    with _lock:
        _patched.add(model)
        history.append((name, model.__dict__[NAME].key))
    log.info("%s is patched, default policy: %s", name, "none" if default is None else default.spec)


def _leave_alone(model: Any, why: str) -> None:
    """Once per class: a warning if it sees pictures, else (a judge, a draft model) for those who listen."""
    name = type(model).__name__
    if name in _told or not callable(getattr(model, "generate", None)):
        return
    _told.add(name)
    config = getattr(model, "config", None)
    sees = any(getattr(config, part, None) is not None for part in ("vision_config", "mm_vision_tower", "visual"))
    log.log(logging.WARNING if sees else logging.INFO, "%s is left alone and runs unreduced: %s", name, why)


def enable_from_environment() -> None:
    """:func:`enable` with the policy that ``VTR_POLICY`` names.

    Raises:
        ValueError: ``VTR_POLICY`` is no policy.
    """
    given = os.environ.get(VARIABLE, "").strip()
    try:
        enable(given or None)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{VARIABLE}={given!r}: {error}") from error
