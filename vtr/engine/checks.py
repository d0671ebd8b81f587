"""What policies are shown comes back as it was, and what they answer is checked before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vtr.base import Policy, Route
from vtr.tokens import STATES

COPIES = STATES


class GuardedFields:
    """Tensors that a policy sees by name; one that it writes into is noticed.

    States are copies, made whenever they are read: a write to them is lost, and harms nobody
    (``check_policy`` says so).
    """

    def __init__(self, make: Callable[[str], torch.Tensor]) -> None:
        self.make = make
        self.seen: dict[str, tuple[torch.Tensor, int]] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name in COPIES:
            return self.make(name)
        if name not in self.seen:
            made = self.make(name)
            self.seen[name] = made, version(made)
        return self.seen[name][0]

    def check(self, policy: Policy, question: str, what: str) -> None:
        """Raise ValueError if a tensor was changed in place."""
        for name, (tensor, before) in self.seen.items():
            if version(tensor) != before:
                raise write_error(policy, question, f"{what}.{name}")


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; always 0 in inference mode, where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def write_error(policy: Policy, question: str, what: str) -> ValueError:
    return ValueError(
        f"{type(policy).__name__}.{question} writes into {what}: what is handed over is not changed in place, since "
        "the write is lost or reaches what other layers, rows and calls see. Work on a clone(); to merge tokens, "
        "answer compress with vtr.Pooled"
    )


def checked_keep(answer: Any, count: int, question: str, policy: Policy, device: torch.device) -> torch.Tensor:
    """A policy's indices, ascending, on ``device``.

    Raises:
        TypeError, ValueError: not a 1-D int64 tensor of distinct indices below ``count``.
    """
    who = f"{type(policy).__name__}.{question}"
    if not isinstance(answer, torch.Tensor) or answer.dtype != torch.int64 or answer.dim() != 1:
        raise TypeError(f"{who} must return a 1-D int64 tensor of kept indices, got {_short(answer)}")
    keep = answer.to(device, non_blocking=True).sort().values
    if len(keep) > count:
        raise ValueError(f"{who} keeps {len(keep)} of {count} tokens: answer with each index at most once")
    on_cpu = keep.device.type == "cpu" and len(keep) > 0  # elsewhere the check would make the device wait
    if on_cpu and (int(keep[0]) < 0 or int(keep[-1]) >= count or bool((keep[1:] == keep[:-1]).any())):
        raise ValueError(f"{who} must return distinct indices in [0, {count}), got {_short(answer)}")
    return keep


def check_best(
    scores: Any, keep: Any, count: int, question: str, policy: Policy, groups: Sequence[tuple[int, int]] | None = None
) -> None:
    """Raise TypeError or ValueError unless these are scores of ``count`` tokens, and how many of them stay."""
    who = f"{type(policy).__name__}.{question}"
    if not isinstance(scores, torch.Tensor) or scores.shape != (count,) or scores.is_complex():
        raise ValueError(f"{who}: the scores of vtr.Best are one for each of {count} tokens, got {_short(scores)}")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        raise TypeError(f"{who}: the count of vtr.Best is an int of at least 0, got {keep!r}: vtr.keep_count makes one")
    if groups is None:
        return
    whole = (sum(size for size, _ in groups), sum(stay for _, stay in groups))
    if whole != (count, min(keep, count)) or any(not 0 <= stay <= size for size, stay in groups):
        raise ValueError(
            f"{who}: the groups of vtr.Best are (tokens, how many stay) and add up to ({count}, {min(keep, count)}), "
            f"got {_short(list(groups))}"
        )


def check_count(answers: Any, count: int, question: str, policy: Policy) -> None:
    """Raise ValueError unless there is an answer for each of ``count`` rows."""
    if not isinstance(answers, Sequence) or len(answers) != count:
        raise ValueError(
            f"{type(policy).__name__}.{question}_all must answer for each of {count} rows, got {_short(answers)}"
        )


def check_route(answer: Any, count: int, policy: Policy) -> None:
    """Raise TypeError or ValueError unless ``answer`` is a Route without weights, or with one for each token."""
    who = f"{type(policy).__name__}.route"
    if not isinstance(answer, Route):
        raise TypeError(f"{who} must return vtr.Route(keep, weights) or None, got {_short(answer)}")
    w = answer.weights
    if w is not None and not (isinstance(w, torch.Tensor) and w.is_floating_point() and w.shape == (count,)):
        raise ValueError(f"{who}: weights are floats [{count}], one for each token that it was shown, got {_short(w)}")


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value)[:80]
