"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): one cut, ranked by the last query's attention one layer before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vtr.base import Policy, Scores, Tokens
from vtr.keep import Keep, check_keep, keep_count, top
from vtr.policies._checks import check_depth, check_layer, check_on_continue
from vtr.settings import register_policy

if TYPE_CHECKING:
    import torch


@register_policy("fastv")
@dataclass
class FastV(Policy):
    """One cut, on entering one decoder layer: the vision tokens the question looked at most in the layer before stay.

    The paper's K is ``layer``. A token's score is the attention the last text token paid to it in layer ``layer - 1``,
    mean over heads, as in the official code (the paper's text says "average attention received"). Original positions
    stay.

    Args:
        keep: tokens that stay: a ratio (float, the paper's 1 - R) or a count (int).
        layer: the decoder layer before which the cut happens, at least 1 (a layer before it must have run).
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.5
    layer: int = 2
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer(self.layer, 1, "FastV ranks by the attention of the layer before, so layer must be at least 1")
        check_on_continue(self.on_continue)

    def check(self, num_hidden_layers: int) -> None:
        check_depth(self.layer, num_hidden_layers, 1)

    def needs(self, layer: int) -> Scores | None:
        return "last" if layer == self.layer else None

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        if layer != self.layer:
            return None
        assert tokens.scores is not None
        return top(tokens.scores, keep_count(self.keep, tokens.total))
