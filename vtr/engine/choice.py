"""Which policy a call gets: the argument of the call, else that of an open ``vtr.use`` block, else the default."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from vtr.answers import SCORES, Attention, KeyNorms
from vtr.base import CHOOSING, WANTED, Policy, UnsupportedError, tower_wish
from vtr.chain import policy as as_policy
from vtr.engine.adapters import Adapter
from vtr.engine.call import Generation, running
from vtr.inputs import refuse_inputs

Given = Policy | str | None | Sequence[Policy | str | None]

in_use: ContextVar[Mapping[object, Given]] = ContextVar("vtr_in_use", default=MappingProxyType({}))
"""What ``vtr.use`` set in this context, by the key of the model; replaced, never changed in place."""

_counting = threading.Lock()


class MISSING:
    """A call that names no policy (``policy=None`` says: no reduction). A class, so that copies and pickles keep it."""


class Key:
    """Stands for one patched model in context variables, so that these hold no reference to it."""


class PolicyChoice:
    """Which policies the calls of one patched model get.

    Attributes:
        key: whose calls. default: for those that name no policy outside of ``vtr.use``.
        refuse: raises UnsupportedError for policies that the model's decoder cannot have; None: it can have all.
        users: open ``vtr.use`` blocks and running ``generate`` calls that reduce, in whatever thread.
    """

    def __init__(
        self, model: Any, adapter: Adapter, num_hidden_layers: int,
        refuse: Callable[[Sequence[Policy | None]], None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.adapter, self.num_hidden_layers = model, adapter, num_hidden_layers
        self.refuse = refuse
        self.key = Key()
        self.default: Policy | None = None
        self.users = 0

    def policies(self, given: Any, rows: int | None) -> list[Policy | None] | None:
        """One policy per row, or None if nothing is reduced. given: the call's argument; ``MISSING`` if it has none.

        Raises:
            TypeError, ValueError, UnsupportedError: as :func:`policies_per_row`, or not on this family.
        """
        if given is MISSING:
            given = in_use.get().get(self.key, self.default)
        found = policies_per_row(given, rows, self.num_hidden_layers, self.model)
        self.adapter.refuse(found or [])
        if self.refuse is not None:
            self.refuse(found or [])
        return found

    def applies(self) -> bool:
        """Whether a call that names no policy has one here: by ``vtr.use``, or the model's default."""
        given = in_use.get().get(self.key, self.default)
        return any(p is not None for p in given) if isinstance(given, (list, tuple)) else given is not None

    def generation(self) -> Generation | None:
        """The ``generate`` of this model that is running in this context."""
        generation = running.get()
        return generation if generation is not None and generation.key is self.key else None

    @contextmanager
    def using(self, policy: Any) -> Iterator[None]:
        """While the block runs, compiled calls of the model may be meant to be reduced."""
        with _counting:
            self.users += policy is not None
        try:
            yield
        finally:
            with _counting:
                self.users -= policy is not None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, made inside such a block: nobody uses it yet."""
        return {**self.__dict__, "users": 0}


def policies_per_row(given: Given, rows: int | None, num_hidden_layers: int, model: Any) -> list[Policy | None] | None:
    """One policy or one per row → a list with one entry per row; None if nothing is reduced.

    Raises:
        TypeError: neither policies, spec strings nor None.
        ValueError: an unknown spec, settings impossible on this model, scores asked for that there are none of, weights
            of another model, or not one policy per row.
        UnsupportedError: a policy that acts before the processor.
    """
    if given is None:
        return None
    several = isinstance(given, Sequence) and not isinstance(given, str)
    entries: Sequence[Any] = given if several else [given]  # type: ignore[assignment]
    made = [None if p is None else as_policy(p) for p in entries]
    for p in {id(p): p for p in made if p is not None}.values():
        for one in (p, *_options(p)):
            refuse_inputs(one)
            one.check(num_hidden_layers)
            check_needs_and_wants(one, num_hidden_layers)
            one.check_model(model)
    if several and rows is not None and len(made) != rows:
        raise ValueError(
            f"{len(made)} policies for {rows} rows: give one policy for all rows or a list with one per row "
            "(None for a row that is not to be reduced)"
        )
    if rows is None:
        raise UnsupportedError("vtr needs input_ids (or inputs_embeds) to know how many rows the call has")
    return None if all(p is None for p in made) else made if several else made * rows


def _options(p: Policy) -> list[Policy]:
    """What a policy chooses among, where it chooses while the prompt is read.

    Raises:
        ValueError: nothing, or one that chooses again.
    """
    if not p.asks("accept"):
        return []
    options = p.options()
    if not options:
        raise ValueError(f"{type(p).__name__}.options names nothing to choose from")
    for one in options:
        if one is not None and any(map(one.asks, CHOOSING)):
            raise ValueError(f"{type(p).__name__}.options names {one.spec!r}, which would choose again")
        if one is not None and p.hears > 1 and one.asks("remember"):
            raise ValueError(
                f"{one.spec!r} forgets what is said, so a try of several tokens cannot go on: let one be heard"
            )
    return [one for one in options if one is not None]


def check_needs_and_wants(p: Policy, num_hidden_layers: int) -> None:
    """Refuse a policy that asks for scores or captures that there are none of, before anything runs.

    Raises:
        ValueError: naming what there is.
    """
    who = type(p).__name__
    for layer in range(num_hidden_layers):
        kind = p.needs(layer)
        if not all(map(_can_be_asked, kind if isinstance(kind, tuple) else (kind,))) or kind == ():
            raise ValueError(
                f"{who}.needs({layer}) answers {kind!r}, which are no scores: choose among "
                f"{', '.join(map(repr, SCORES))}, vtr.Attention(…), vtr.KeyNorms(), a tuple of them, or None"
            )
        if kind is not None and layer == 0:
            raise ValueError(
                f"{who}.needs(0) answers {kind!r}, but scores are those of the layer before, and layer 0 has none: "
                "answer None there and rank from layer 1 on (or by tokens.ahead(), which any layer has)"
            )
    if p.asks("attend") and any(p.needs(layer) is not None for layer in range(num_hidden_layers)):
        raise ValueError(
            f"{who} answers needs and attend: what ranks tokens is noted where all take part. Rank in attend by "
            "attention.received(), or write two policies"
        )
    if p.asks("attend") and p.asks("route"):
        raise ValueError(f"{who} answers route and attend: who goes around a layer has no attention in it, define one")
    wants = p.wants
    if not isinstance(wants, (tuple, list)) or any(not _can_be_wanted(one) for one in wants):
        known = ", ".join(map(repr, WANTED))
        raise ValueError(
            f"{who}.wants = {wants!r}: write a tuple of what there is ({known}; of another layer of the tower "
            '"hidden_states[3]", "attentions[-1]"), e.g. wants = ("cls",)'
        )
    if "question" in wants and not p.question_guided:
        raise ValueError(f"{who} wants the question: write question_guided: ClassVar[bool] = True into the class")


def _can_be_asked(one: Any) -> bool:
    return one is None or isinstance(one, (Attention, KeyNorms)) or (isinstance(one, str) and one in SCORES)


def _can_be_wanted(one: Any) -> bool:
    return isinstance(one, str) and (one in WANTED or tower_wish(one) is not None)
