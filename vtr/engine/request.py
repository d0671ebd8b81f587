"""What a call asks of the text model, and the rows made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.call import Generation
from vtr.engine.captures import Captures
from vtr.engine.prompt import Prompt
from vtr.engine.rotary import Rotary
from vtr.engine.rows import Row, RowInput
from vtr.engine.trace import Trace


@dataclass(eq=False)
class Request:
    """What a call asked for, from the model's pre-hook to the text model's.

    Attributes:
        policies: one per row. prompt: this forward's vision tokens, images and padding, row by row.
        answer_starts: per row, the slot from which on text was decoded (or given as the answer), not asked.
        generation: the running ``generate`` this forward is part of, or None.
        captures: what policies want of the vision tower, or None.
        offset: where this forward's slots start in the row the caller passed (a continuation runs the rest only).
        gauged: per row, whether its cuts are gauged by the attention that goes (``vtr/engine/gauging.py``); None: none.
        attempt: the trace of a try of some rows (``vtr/engine/choosing.py``); None for a call's own forward.
    """

    policies: list[Policy | None]
    prompt: Prompt
    answer_starts: list[int]
    generation: Generation | None
    captures: Captures | None = None
    offset: int = 0
    attempt: Trace | None = None
    gauged: Sequence[bool] | None = None


KNOWN = (
    "input_ids", "inputs_embeds", "hidden_states", "attention_mask", "position_ids", "position_embeddings", "labels",
)  # fmt: skip
"""Arguments of a text model or its layers that the engine makes itself, or that no layer reads."""


def per_token(kwargs: Mapping[str, Any], rows: int, columns: int) -> list[str]:
    """Which of a text model's or layer's other arguments say something of each token: tensors [rows, columns, …]."""
    return [
        name
        for name, value in kwargs.items()
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == (rows, columns)
        and name not in KNOWN
    ]  # fmt: skip


def may_forget_answer(request: Request) -> bool:
    """Whether some row's given answer has words that its policy may forget: they are not to be cached."""
    length = request.prompt.is_vision.shape[1]
    return any(
        p is not None and start < length and p.asks("remember")
        for p, start in zip(request.policies, request.answer_starts, strict=True)
    )


def rows_of(request: Request | None, batch: int, length: int, valid: torch.Tensor | None) -> list[Row]:
    """The rows of a forward; text only where there is no request. valid: bool [batch, length] on the CPU, or None."""
    everything = torch.arange(length)
    rows = []
    for b in range(batch):
        slots = everything if valid is None else valid[b].nonzero().squeeze(1)
        if request is None:
            rows.append(Row(RowInput(b, None, slots, torch.zeros(len(slots), dtype=torch.bool), [], [], length)))
            continue
        prompt, policy, start = request.prompt, request.policies[b], request.answer_starts[b]
        is_vision, layouts, places = prompt.is_vision[b][slots], prompt.layouts[b], prompt.places[b]
        ids = None if prompt.ids is None else prompt.ids[b].index_select(0, slots[slots < prompt.ids.shape[1]])
        gauged = request.gauged is not None and request.gauged[b]
        rows.append(Row(RowInput(b, policy, slots, is_vision, layouts, places, start, ids), gauged))
    return rows


def check_rows(rows: Sequence[Row], cached: bool, depth: int, rotary: Rotary | None) -> None:
    """Refuse rows whose policies cannot work on them, before anything runs.

    Args:
        cached: whether there is a cache. depth: decoder layers.
        rotary: of the text model; None where nothing acts inside.

    Raises:
        UnsupportedError, ValueError: naming the row or the policy, and the way out.
    """
    for row in rows:
        if row.length == 0:
            raise ValueError(f"row {row.index} has no tokens: its attention_mask is all zeros, leave it out")
        p, answered = row.policy, len(row.text.answer_slots) > 0
        if p is None:
            continue
        if not cached and p.renumbers and p.asks("remember"):
            raise UnsupportedError(
                f"{p.spec!r} renumbers positions and forgets tokens: that needs a cache, leave out use_cache=False"
            )
        if p.renumbers and row.vision.count and rotary is not None and rotary.many_axes:
            raise UnsupportedError(
                f"{p.spec!r} renumbers positions, but this model's have several axes (M-RoPE: time, row, column): "
                "let tokens keep theirs, e.g. pyramid:positions=keep"
            )
        if p.renumbers and row.vision.count and rotary is not None and rotary.why_fixed:
            raise UnsupportedError(
                f"{p.spec!r} renumbers positions, and this model's cannot be: {rotary.why_fixed}. Let tokens keep "
                "theirs, e.g. pyramid:positions=keep"
            )
        if cached and answered and p.asks("remember"):
            raise UnsupportedError(
                f"{p.spec!r} forgets words, and a forward over question and answer would cache them all: "
                "pass none (it is run without, and returns none)"
            )
        ranks = row.vision.count and (row.gauged or p.question_guided or any(map(p.needs, range(depth))))
        if ranks and not row.text.rankable:
            raise ValueError(
                f"row {row.index} has no text after its last image, so nothing can rank that image's tokens for "
                f"{p.spec!r}: put the question behind the image, or use a policy that needs no question"
                + (" (what stands behind vtr_queries_end does not count)" if answered else "")
            )
