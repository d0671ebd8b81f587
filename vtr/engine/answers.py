"""Forwards over question and answer together (training, log-probabilities, perplexity): where each row's answer begins.

The answer ranks nothing, so that the tokens kept are those that ``generate`` keeps for this question.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

IGNORED = -100
"""What ``labels`` hold where nothing is to be learnt: the question, the images, the padding."""


def answer_labels(given: Any, inputs: Mapping[str, Any], caller: type, ids: torch.Tensor) -> torch.Tensor | None:
    """What a forward says about its answers: labels [rows, L], ``IGNORED`` in front of each answer; None if nothing.

    Args:
        given: the call's ``vtr_queries_end``, which goes before labels. inputs: the call's keyword arguments.
        caller: the class of the model whose forward may be under way. ids: int64 [rows, L].

    Raises:
        TypeError, ValueError: ends that are none, or labels of another shape than ``ids``.
    """
    if given is not None:
        ends = _checked_ends(given, *ids.shape)
        return torch.where(torch.arange(ids.shape[1]) < ends[:, None], IGNORED, 0)
    labels = inputs.get("labels")
    labels = _labels_of(caller) if labels is None else labels
    shifted = inputs.get("shift_labels")
    if labels is None and shifted is not None:  # label t belongs to token t + 1
        labels = torch.nn.functional.pad(shifted, (1, 0), value=IGNORED)[:, :-1]
    if labels is None:
        return None
    missing = ids.shape[1] - labels.shape[-1]  # with logits_to_keep, labels may be those of the last columns alone
    if labels.dim() != 2 or labels.shape[0] != ids.shape[0] or missing < 0:
        raise ValueError(f"labels {tuple(labels.shape)} are not those of input_ids {tuple(ids.shape)}")
    return torch.nn.functional.pad(labels.cpu(), (missing, 0), value=IGNORED)


def _checked_ends(given: Any, rows: int, length: int) -> torch.Tensor:
    """``vtr_queries_end`` as int64 [rows]."""
    ends = given.cpu() if isinstance(given, torch.Tensor) else torch.as_tensor(given)
    if ends.is_floating_point() or ends.dtype == torch.bool or ends.dim() > 1:
        raise TypeError(
            f"vtr_queries_end is the column where a row's answer begins, one int or one a row; got {given!r}"
        )
    if ends.dim() and len(ends) != rows:
        raise ValueError(f"vtr_queries_end has {len(ends)} entries for {rows} rows: give one int for all, or one a row")
    if bool((ends < 0).any()) or bool((ends > length).any()):
        raise ValueError(f"vtr_queries_end={given!r} lies outside the {length} columns of input_ids")
    return ends.expand(rows)


def _labels_of(caller: type) -> torch.Tensor | None:
    """The ``labels`` of the forward of a ``caller`` that is under way, or None.

    A model's forward keeps its labels for the loss and hands them to nothing below it, and a hook of its own would miss
    ``model.forward(…)``, which is how peft calls it. So they are read off its frame.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and "labels" in code.co_varnames:
            seen = frame.f_locals
            if isinstance(seen.get("self"), caller) and isinstance(labels := seen.get("labels"), torch.Tensor):
                return labels
        frame = frame.f_back  # type: ignore[assignment]
    return None


def answer_starts(
    labels: torch.Tensor | None, is_vision: torch.Tensor, valid: torch.Tensor | None
) -> tuple[list[int], list[int]]:
    """Per row the column of the first answer behind its last image, the row's length where none is.

    Args:
        labels: int64 [rows, L] or None (no answers). is_vision, valid: bool [rows, L]; None: no padding. On the CPU.

    Returns:
        The columns, and the rows with an image but no text between it and its answer: no question, by the labels.
    """
    rows, length = is_vision.shape
    if labels is None:
        return [length] * rows, []
    column, there = torch.arange(length), torch.ones_like(is_vision) if valid is None else valid
    last = torch.where(is_vision, column, -1).amax(1, keepdim=True)
    behind = there & (column > last)
    starts = torch.where(behind & (labels != IGNORED), column, length).amin(1)
    asked = (behind & (column < starts[:, None])).any(1)
    lacking = (starts < length) & (last[:, 0] >= 0) & ~asked
    return starts.tolist(), lacking.nonzero().squeeze(1).tolist()
