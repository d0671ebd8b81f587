"""A packed forward in pieces: stop before a decoder layer, and go on from there as often as wanted, as other rows.

What lies before the stop is computed once, whatever policies rows get behind it. Without a cache, one thread a forward.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.install import patch_of
from vtr.engine.session import Session


class _ReachedError(Exception):
    """The first decoder layer has been called: what it was given."""

    def __init__(self, hidden: torch.Tensor, call: dict[str, Any]) -> None:
        self.hidden, self.call = hidden, call


@dataclass(frozen=True, eq=False)
class Midway:
    """Rows about to enter decoder layer ``layer``.

    Attributes:
        text: the module that holds the decoder layers and the last norm. hidden: [1, T, D], packed.
        call: what else each decoder layer is called with.
    """

    text: Any
    session: Session
    hidden: torch.Tensor
    layer: int
    call: dict[str, Any]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(vision tokens on entering the text model, text tokens) of each row."""
        return [(row.vision.total, len(row.text.index)) for row in self.session.rows]

    def go(self, picks: Sequence[tuple[int, Policy | None]], until: int) -> Midway:
        """Run the layers from here up to ``until`` (not that one) as new rows; this stays as it is.

        Args:
            picks: for each new row, which row it continues, and under which policy.
        """
        session, index = self.session.fork(picks)
        hidden = self.hidden.index_select(1, index)
        for layer in self.text.layers[self.layer : until]:
            hidden = layer(hidden, **self.call, vtr_session=session)
        return Midway(self.text, session, hidden, until, self.call)

    def tokens_run(self) -> int:
        """Tokens that passed a decoder layer on the way here from where this was forked, summed over layers."""
        return sum(map(sum, self.session.log.lengths))

    def last(self, counts: Sequence[int]) -> torch.Tensor:
        """[sum(counts), D]: after all layers, the normed states of the last so many tokens of each row."""
        ends = accumulate(row.length for row in self.session.rows)
        index = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, counts, strict=True)])
        normed: torch.Tensor = self.text.norm(self.hidden[0].index_select(0, index.to(self.hidden.device)))
        return normed


def enter(model: Any, inputs: Mapping[str, Any], policy: Policy | Sequence[Policy], queries_end: int) -> Midway:
    """Run all that comes before the decoder (tower, projector, merging, ``compress``), and stop before layer 0.

    Args:
        inputs: what the patched ``model`` is called with, images included.
        queries_end: column from which on text does not rank vision tokens (a given answer); the prompt's length.

    Raises:
        UnsupportedError, TypeError, ValueError: what a call under ``policy`` would raise.
    """
    patch, me = patch_of(model), threading.get_ident()
    text = patch.decoder.text
    if patch.path != "packed":
        raise UnsupportedError(f"{type(text).__name__} cannot run packed rows, so its forward cannot be forked midway")
    patch.decoder.check_midway()

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == me:
            raise _ReachedError(args[0] if args else kwargs["hidden_states"], kwargs)

    handle = text.layers[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        model(**inputs, policy=policy, vtr_queries_end=queries_end, use_cache=False)
    except _ReachedError as reached:
        call = {k: v for k, v in reached.call.items() if k != "hidden_states"}
        session: Session = call.pop("vtr_session")
        if session.masks is not None:
            why = "a forward under the model's own masks cannot stop between its layers and go on"
            raise UnsupportedError(why) from None
        session.positions.take_rope(0, call, reached.hidden)
        return Midway(text, session, reached.hidden, 0, call)
    finally:
        handle.remove()
    raise RuntimeError(f"{type(text).__name__} ran no decoder layer")
