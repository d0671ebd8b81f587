"""``patch``, ``unpatch`` and ``use``: installs hooks, removes them, owns nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from vtr.base import Policy, UnsupportedError
from vtr.engine.adapters import Adapter, find_adapter, unwrapped
from vtr.engine.call import busy, refuse_if_busy
from vtr.engine.choice import Given, in_use
from vtr.engine.describe import Description
from vtr.engine.describe import describe as described
from vtr.engine.hooks import NAME, Patch
from vtr.engine.selftest import self_test as run_self_test

M = TypeVar("M")


def patch(model: M, policy: Policy | str | None = None, *, verbose: bool = False, self_test: bool = True) -> M:
    """Let ``model`` take policies: ``model.generate(**inputs, policy=p)`` and ``model(**inputs, policy=p)``.

    Changes nothing until a call carries a policy: without one, outputs are bit-identical to the unpatched model's.
    May be called again to change the default.

    A forward over question and answer (``labels`` with -100 in front of the answer, or ``vtr_queries_end=``, the column
    of ``input_ids`` where it begins: an int, or one a row as a list or int64 tensor [rows]) keeps the tokens that
    ``generate`` keeps for the question.

    Args:
        model: a model of transformers that merges images at placeholder tokens, or a wrapper around one
            (peft's, ``torch.compile``'s, accelerate's, ``DataParallel`` …): then the model inside is patched.
        policy: the model's default for calls that name none, e.g. those a streamer makes in its own thread.
        verbose: print what was found of the model, and what is possible with it (:func:`vtr.describe`).
        self_test: of a class that no adapter was written for, compare a few tokens with the model as it was
            (:mod:`vtr.engine.selftest`); False patches it untested.

    Returns:
        What was given: the same model, or the same wrapper.

    Raises:
        TypeError, ValueError: not a model, or a policy that cannot work on it.
        UnsupportedError: a model that vtr cannot run, or runs wrongly; a part of a model; an attention implementation
            that cannot be used.
        RuntimeError: the model is already patched and in use (a ``vtr.use`` block, a running ``generate``).
    """
    inside = unwrapped(model)
    adapter = find_adapter(inside)
    known: Patch | None = inside.__dict__.get(NAME)
    if known is not None:
        refuse_if_busy(known.key, "patch")
    made = known or _proven(inside, adapter, self_test)
    try:
        resolved = made.choice.policies(policy, 1)
    except Exception:
        if known is None:
            made.remove()
        raise
    made.choice.default = resolved[0] if resolved else None
    if verbose:
        print(described(made))
    return model


def _proven(model: Any, adapter: Adapter, tests: bool) -> Patch:
    """Installed, and on a model that nobody has looked at tested: packed, else (if it may be so) on the padded path.

    Raises:
        UnsupportedError: neither can run it rightly.
    """
    made, tests = Patch(model, adapter), tests and not adapter.proven
    try:
        return _tested(made, tests)
    except UnsupportedError as error:
        if made.path == "padded" or not tests:
            raise
        return _tested(Patch(model, adapter, path="padded", why=str(error)), tests)


def _tested(made: Patch, tests: bool) -> Patch:
    """Installed, and taken out again if it fails the self-test."""
    made.install()
    try:
        made.off = run_self_test(made) if tests else None
    except BaseException:
        made.remove()
        raise
    return made


def patch_of(model: Any) -> Patch:
    """The patch of a patched model, or of the one inside of a wrapper.

    Raises:
        ValueError: the model is not patched.
    """
    found: Patch | None = getattr(unwrapped(model), "__dict__", {}).get(NAME)
    if found is None:
        raise ValueError(f"this {type(model).__name__} is not patched: call vtr.patch(model) first")
    return found


def describe(model: Any) -> Description:
    """What vtr found of a patched model (decoder, layers, tower, grids …) and which policies work on it; to be printed.

    Raises:
        ValueError: the model is not patched.
    """
    return described(patch_of(model))


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
