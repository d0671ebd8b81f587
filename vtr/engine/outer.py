"""Models whose own forward merges the images and then calls a language model that takes embeddings only.

Their forwards have closed signatures, so what a call asks for goes to the language model by a context variable, which
is emptied when the model's forward ends, however it ends. Their ``generate`` needs nothing of this: it calls the
language model's, whose forwards find the running generation.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from vtr.engine.session import Request

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch

_handed: ContextVar[tuple[object, Request] | None] = ContextVar("vtr_handed", default=None)


def install_outer(patch: Patch) -> list[Any]:
    """Hooks of the model itself, in front of those of its language model; returns the handles."""
    names = list(inspect.signature(type(patch.model).forward).parameters)[1:]
    return [
        patch.model.register_forward_pre_hook(partial(_before, patch, names), with_kwargs=True),
        patch.model.register_forward_hook(_after, always_call=True),
    ]


def _before(patch: Patch, names: list[str], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs, request = patch.asked(names, args, kwargs)
    _handed.set(None if request is None else (patch.key, request))
    return args, kwargs


def _after(module: Any, args: tuple[Any, ...], out: Any) -> None:
    _handed.set(None)


def handed_to(patch: Patch) -> Request | None:
    """What the model's own forward, now running in this context, asks of its language model; taken once."""
    found = _handed.get()
    _handed.set(None)
    return found[1] if found is not None and found[0] is patch.key else None
