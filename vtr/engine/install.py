"""``patch``, ``unpatch`` and ``use``: installs hooks, removes them, owns nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from vtr.base import Policy
from vtr.engine.adapters import find_adapter, unwrapped
from vtr.engine.call import busy, refuse_if_busy
from vtr.engine.choice import Given, in_use
from vtr.engine.hooks import NAME, Patch

M = TypeVar("M")


def patch(model: M, policy: Policy | str | None = None) -> M:
    """Let ``model`` take policies: ``model.generate(**inputs, policy=p)`` and ``model(**inputs, policy=p)``.

    Changes nothing until a call carries a policy: without one, outputs are bit-identical to the unpatched model's.
    May be called again to change the default.

    A forward over question and answer (``labels`` with -100 in front of the answer, or ``vtr_queries_end=``, the column
    of ``input_ids`` where it begins: an int, or one a row as a list or int64 tensor [rows]) keeps the tokens that
    ``generate`` keeps for the question.

    Args:
        model: a model of a family vtr knows (see :func:`vtr.engine.adapters.families`), or a wrapper around one
            (peft's, ``torch.compile``'s, accelerate's, ``DataParallel`` …): then the model inside is patched.
        policy: the model's default for calls that name none, e.g. those a streamer makes in its own thread.

    Returns:
        What was given: the same model, or the same wrapper.

    Raises:
        TypeError, ValueError: not a model, or a policy that cannot work on it.
        UnsupportedError: an unknown family, a part of a model, or an attention implementation that cannot be used.
        RuntimeError: the model is already patched and in use (a ``vtr.use`` block, a running ``generate``).
    """
    inside = unwrapped(model)
    adapter = find_adapter(inside)
    known: Patch | None = inside.__dict__.get(NAME)
    if known is not None:
        refuse_if_busy(known.key, "patch")
    made = known or Patch(inside, adapter)
    resolved = made.choice.policies(policy, 1)
    made.choice.default = resolved[0] if resolved else None
    if known is None:
        made.install()
    return model


def patch_of(model: Any) -> Patch:
    """The patch of a patched model, or of the one inside of a wrapper.

    Raises:
        ValueError: the model is not patched.
    """
    found: Patch | None = getattr(unwrapped(model), "__dict__", {}).get(NAME)
    if found is None:
        raise ValueError(f"this {type(model).__name__} is not patched: call vtr.patch(model) first")
    return found


def unpatch(model: M) -> M:
    """Take everything :func:`patch` installed out again; a model that is not patched is left alone. Returns ``model``.

    Raises:
        RuntimeError: the model is in use (a ``vtr.use`` block, a ``generate`` running in any thread).
    """
    found: Patch | None = getattr(unwrapped(model), "__dict__", {}).get(NAME)
    if found is not None:
        refuse_if_busy(found.key, "unpatch")
        found.remove()
    return model


@contextmanager
def use(model: M, policy: Given) -> Iterator[M]:
    """Within the block, calls of ``model`` that name no policy use this one (or these, one per row).

    Only this thread (this context) is concerned; blocks nest, and an exception ends them as well.

    Raises:
        TypeError, ValueError: not a policy; not patched; or impossible on this model.
    """
    found = patch_of(model)
    several = policy if isinstance(policy, (list, tuple)) else [policy]
    found.choice.policies(policy, len(several))
    token = in_use.set({**in_use.get(), found.key: policy})
    try:
        with busy(found.key, "a vtr.use block is open; leave it first"), found.choice.using(policy):
            yield model
    finally:
        in_use.reset(token)
