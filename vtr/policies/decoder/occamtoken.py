"""OccamToken (Li et al., arXiv 2605.29657) without its register: how many tokens stay, picture and question decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtr.base import Attention, Tokens
from vtr.checks import check_number, check_on_continue
from vtr.image import Image, tokens_at
from vtr.policies.decoder._stages import Staged
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import available
from vtr.settings import register_policy

NOISE = 1e-6
"""Equal scores may all be this much below their mean, by rounding."""


def above(scores: torch.Tensor, factor: float, there: torch.Tensor | None = None) -> torch.Tensor:
    """bool [sets, n]: who has at least ``factor`` times the mean of its set; nobody but the best, where that is no one.

    Args:
        scores: float32 [sets, n], at least 0. there: bool [sets, n], or None for all; the others take no part.
    """
    there = torch.ones_like(scores, dtype=torch.bool) if there is None else there.to(scores.device)
    mean = (scores * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    high = (scores >= factor * (1 - NOISE) * mean) & there
    best = scores.masked_fill(~there, -torch.inf).argmax(1, keepdim=True)
    first = torch.zeros_like(high).scatter(1, best, True) & there
    return high | (first & ~high.any(1, keepdim=True))


@register_policy("occamtoken")
@dataclass
class OccamToken(Staged):
    """Keep the tokens that get more than some part of the mean attention: as many as picture and question need.

    OccamToken (arXiv 2605.29657) without its register: the method compares tokens with an extra token made of neurons
    that are not published. The paper's own comparison without it takes a multiple of the mean instead, and that is what
    this is (Qwen3-VL-8B at 22.2 and 11.1 % of the tokens: 94.3 and 90.2 % of its accuracy; 95.6 and 92.0 with the
    register, 93.1 and 88.7 with the register and a fixed budget). Before the decoder the score is what the tower's CLS
    token pays in the layer whose output the model uses, mean over heads (of towers without one: the attention a token
    receives), and the mean that of its tile. Inside it the score is the most that any text token behind the images
    pays, mean over heads, in layer 11 of 32 (elsewhere as deep), and the mean that of the row. Positions stay, newline
    tokens all enter the decoder, and at least one token of each tile, then of the row stays. Nor are the multiples
    published: the defaults are our choice.

    Args:
        picture: tokens stay before the decoder that have at least so many times the mean; 0: all, and any compressor
            may stand in front.
        question: the same inside the decoder; 0: all.
        layers: the decoder layer before which the second choice is made, from 1 on; None for 12 of 32.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    picture: float = 0.5
    question: float = 1.0
    layers: Sequence[int] | None = None
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True
    published: ClassVar[tuple[tuple[int, ...], int]] = ((12,), 32)

    def __post_init__(self) -> None:
        for name in ("picture", "question"):
            if check_number(getattr(self, name), name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is a multiple of the mean: at least 0")
        self.check_layers()
        check_on_continue(self.on_continue)

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("attentions",) if self.picture else ()

    def asks(self, question: str) -> bool:
        return super().asks(question) and (question != "compress" or self.picture > 0)

    def compress(self, image: Image) -> torch.Tensor:
        there = available(image.layout)
        chosen = above(saliency(image.tower), self.picture, there).cpu()
        return torch.cat([tokens_at(image.layout)[chosen.flatten()], image.layout.newline.nonzero().squeeze(1)])

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        raise ValueError(f"how many tokens {self.spec} leaves depends on picture and question")

    def needs(self, layer: int) -> Attention | None:
        return Attention("behind", over="max") if self.question and self.acts(layer) else None

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        """Which tokens stay. It waits for the device: how many, only that knows."""
        if not self.question or layer not in self.cuts(tokens.num_hidden_layers) or tokens.scores is None:
            return None
        return above(tokens.scores[None], self.question)[0].nonzero()[:, 0]
