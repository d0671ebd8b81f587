"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): one cut, ranked by the last query's attention one layer before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtr.base import Scores
from vtr.checks import check_on_continue
from vtr.score import ScorePolicy
from vtr.settings import register_policy


@register_policy("fastv")
@dataclass
class FastV(ScorePolicy):
    """One cut, on entering one decoder layer: the vision tokens the question looked at most in the layer before stay.

    The paper's K is ``layer``. A token's score is the attention the last text token paid to it in layer ``layer - 1``,
    mean over heads, as in the official code (the paper's text says "average attention received"). Original positions
    stay.

    Args:
        keep: tokens that stay: a ratio (float, the paper's 1 - R) or a count (int).
        layer: the decoder layer before which the cut happens, at least 1 (a layer before it must have run).
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".
        share: who competes: "row", all vision tokens of the row together; "image", those of each image among
            themselves, the budget divided by how many tokens the images have.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    on_continue: str = "warn"

    attention: ClassVar[Scores | None] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_on_continue(self.on_continue)
