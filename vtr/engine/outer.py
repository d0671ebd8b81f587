"""Models whose own forward merges the images and then calls a language model that takes embeddings only.

Their forwards have closed signatures, so what a call asks for goes to the language model by a context variable, which
is emptied when the model's forward ends, however it ends. Their ``generate`` needs nothing of this: it calls the
language model's, whose forwards find the running generation.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vtr.engine.call import pending_request
from vtr.engine.forward import names_of

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch


def install_outer(patch: Patch) -> list[Any]:
    """The hook of the model itself, in front of those of its language model; returns the handles."""
    return [patch.model.register_forward_pre_hook(partial(_before, patch, names_of(patch.model)), with_kwargs=True)]


def _before(patch: Patch, names: list[str], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs, request = patch.forward_hooks.make_request(names, args, kwargs, steps=False)
    pending_request.set((patch.key, request))
    return args, kwargs
