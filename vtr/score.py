"""The base of methods that rank and keep: a score, and the settings it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vtr.base import Best, Policy, Request, Tokens
from vtr.checks import check_depth, check_layer, check_sharing
from vtr.keep import Keep, check_keep, keep_count
from vtr.shares import divided

if TYPE_CHECKING:
    import torch


Share = Literal["row", "image"]
"""Who competes for a budget: all vision tokens of the row, or those of each image among themselves, each image having
its part of the budget by its number of tokens."""
HERE = "tokens left of each image"


def best(tokens: Tokens, scores: torch.Tensor | Callable[[], torch.Tensor], count: int, share: Share) -> Best:
    """The ``count`` best of a row's tokens, at most all; with ``share="image"`` so many of each image as its size says.

    How many are left of each image is noted in ``tokens.memo``. Where somebody else has cut the row since it entered
    the text model, they are counted on the device, which the host then waits for.
    """
    if share == "row" or len(tokens.per_image) < 2 or count >= len(tokens):
        return Best(scores, count)
    here = tokens.memo.get(HERE, tokens.per_image)
    if sum(here) != len(tokens):
        here = tuple(tokens.image.bincount(minlength=len(tokens.per_image)).tolist())
    stay = tokens.memo[HERE] = tuple(divided(count, tokens.per_image, here))
    return Best(scores, count, list(zip(here, stay, strict=True)))


@dataclass
class ScorePolicy(Policy):
    """One cut: on entering one decoder layer, the vision tokens with the largest scores stay, at their positions.

    A method is a subclass with a :meth:`score`; more settings are more dataclass fields::

        @vtr.register_policy("top-norm")
        @dataclass
        class TopNorm(vtr.ScorePolicy):
            def score(self, tokens):
                return tokens.hidden.norm(dim=-1)

    Args:
        keep: tokens that stay: a ratio (float) or a count (int).
        layer: the decoder layer before which the cut happens; at least 1 where ``attention`` is asked for.
        share: who competes: "row", all vision tokens of the row together; "image", those of each image among
            themselves, the budget divided by how many tokens the images have.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.5
    layer: int = 2
    share: Share = field(default="row", kw_only=True)

    attention: ClassVar[Request | None] = None
    """The attention that ``tokens.scores`` holds (paid in the layer before, as :meth:`needs` names it), or None. A
    policy that asks for it looks at the question: ``question_guided`` is then True unless the class says otherwise."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.attention is not None and "question_guided" not in vars(cls):
            cls.question_guided = True

    def score(self, tokens: Tokens) -> torch.Tensor:
        """[n]: the larger a token's score, the sooner it stays; of equal scores the lower slot wins.

        By default the attention asked for.
        """
        if tokens.scores is None:
            raise NotImplementedError(f"{type(self).__name__} must define score(), or name the attention it ranks by")
        scores: torch.Tensor = tokens.scores
        return scores

    def __post_init__(self) -> None:
        check_keep(self.keep)
        why = f"{type(self).__name__} ranks by the attention of the layer before, so layer must be at least 1"
        check_layer(self.layer, *((1, why) if self.attention else ()))
        check_sharing(self.share)

    def check(self, num_hidden_layers: int) -> None:
        check_depth(self.layer, num_hidden_layers, 1 if self.attention else 0)

    def needs(self, layer: int) -> Request | None:
        return self.attention if layer == self.layer else None

    def score_all(self, tokens: Sequence[Tokens]) -> Sequence[torch.Tensor]:
        """:meth:`score` of all rows that share this policy; for where that is cheaper."""
        return [self.score(one) for one in tokens]

    def prune(self, layer: int, tokens: Tokens) -> Best | None:
        return self.prune_all(layer, [tokens])[0]

    def prune_all(self, layer: int, tokens: Sequence[Tokens]) -> Sequence[Best | None]:
        if layer != self.layer:
            return [None] * len(tokens)
        scores = self.score_all(tokens)
        return [
            best(one, score, keep_count(self.keep, one.total), self.share)
            for score, one in zip(scores, tokens, strict=True)
        ]
