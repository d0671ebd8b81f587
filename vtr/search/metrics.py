"""What a search maximises: a number per question, from one teacher-forced pass over its answer.

The answer's tokens are put behind the prompt and the logits that predict them are read off in one pass. An answer is
right token by token exactly if greedy decoding would give it, so "accuracy" and "agreement" are those of greedy
decoding (to the letter, the end token included) without decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Objective:
    """A number per question; the mean is maximised.

    Attributes:
        labels: True if the data's answers are scored, False for the unreduced model's own.
        best: no question can score more (what lets a hopeless candidate be dropped early).
        score: (logits [m, vocab] float32, targets int64 [m], the unreduced model's log-probabilities [m, vocab]) → [].
    """

    name: str
    meaning: str
    labels: bool
    best: float
    score: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

    @property
    def compares(self) -> bool:
        """Whether it needs the unreduced model's log-probabilities."""
        return self.name == "kl"


def _exact(logits: torch.Tensor, targets: torch.Tensor, full: torch.Tensor | None) -> torch.Tensor:
    return (logits.argmax(-1) == targets).all().float()


def _likelihood(logits: torch.Tensor, targets: torch.Tensor, full: torch.Tensor | None) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, targets[:, None]).sum()


def _kl(logits: torch.Tensor, targets: torch.Tensor, full: torch.Tensor | None) -> torch.Tensor:
    assert full is not None
    away = (full.exp() * (full - logits.log_softmax(-1))).sum(-1).mean()
    return -away.clamp_(min=0.0)  # rounding can leave -1e-9


OBJECTIVES: dict[str, Objective] = {
    one.name: one
    for one in (
        Objective("accuracy", "share of questions answered like the data's answer", True, 1.0, _exact),
        Objective("agreement", "share of questions answered like the unreduced model", False, 1.0, _exact),
        Objective("likelihood", "log-likelihood of the data's answer, in nats", True, 0.0, _likelihood),
        Objective("kl", "minus the KL divergence from the unreduced model, in nats a token", False, 0.0, _kl),
    )
}


def objective_of(name: str) -> Objective:
    """The objective called ``name``.

    Raises:
        ValueError: no such one.
    """
    if name not in OBJECTIVES:
        known = "; ".join(f"{one.name!r} ({one.meaning})" for one in OBJECTIVES.values())
        raise ValueError(f"objective={name!r}: choose one of {known}")
    return OBJECTIVES[name]
