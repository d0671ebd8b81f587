"""PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247): a few stages, each keeps a share of the vision tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

from vtr.base import Best, Policy, Tokens
from vtr.checks import check_depth, check_layer, check_on_continue, check_positions, check_sharing
from vtr.keep import Keep, check_keep, keep_count
from vtr.score import Share, best
from vtr.settings import register_policy
from vtr.shares import LEAST, STAGE, equal_steps


@register_policy("pyramid")
@dataclass
class Pyramid(Policy):
    """Stages: on entering some layers, the vision tokens the last text token is about to look at most stay.

    Tokens are ranked by the layer that is about to run: its own norm, query and key projections, the last text token's
    softmax over the whole row, mean over heads. Counts are ``floor(V · keep)`` of the original V (official code),
    at least one.

    Args:
        keeps: what stays from each stage on, a ratio of the original tokens (float) or a count (int).
        layers: the decoder layer each stage begins with; None spreads them evenly (8, 16, 24 of 32: official code).
        positions: "reindex" numbers the tokens that stay contiguously after each stage (official code); "keep" leaves
            them their own positions, as FastV and G-Search do. The two do not give the same answers.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".
        share: who competes: "row", all vision tokens of the row together; "image", those of each image among
            themselves, the budget divided by how many tokens the images have.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keeps: Sequence[Keep] = (0.5, 0.25, 0.125)
    layers: Sequence[int] | None = None
    positions: Literal["keep", "reindex"] = "reindex"
    on_continue: str = "warn"
    share: Share = field(default="row", kw_only=True)

    question_guided: ClassVar[bool] = True

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """Three stages, each the same share of the one before; the earlier, the smaller the budget."""
        depth, found = num_hidden_layers, list[tuple[float, list[int]]]()
        for parts in (4, 8, 16, 32):
            layers = [depth * (stage + 1) // parts for stage in range(3)]
            spans = [b - a for a, b in pairwise([0, *layers, depth])]
            if all(spans):
                found.append((equal_steps(spans, share), layers))
        late = [stages for stages in found if stages[0] >= STAGE]
        step, layers = late[0] if late else max(found, default=(0.0, []))
        if step**3 < LEAST**1.5:
            raise ValueError(f"no three stages in {depth} layers have this mean")
        return {"keeps": [round(step**stage, 4) for stage in (1, 2, 3)], "layers": layers}

    def __post_init__(self) -> None:
        if isinstance(self.keeps, str) or not isinstance(self.keeps, Sequence) or not self.keeps:
            raise TypeError(
                f"keeps must be a list with one keep per stage, e.g. [0.5, 0.25, 0.125], got {self.keeps!r}"
            )
        self.keeps = [check_keep(keep, f"keeps[{i}]") for i, keep in enumerate(self.keeps)]
        if self.layers is not None:
            self.layers = list(self.layers)
            for layer in self.layers:
                check_layer(layer)
            if len(self.layers) != len(self.keeps) or sorted(set(self.layers)) != self.layers:
                raise ValueError(
                    f"layers={self.layers} must name one decoder layer for each of {len(self.keeps)} keeps, ascending"
                )
        check_positions(self.positions)
        check_on_continue(self.on_continue)
        check_sharing(self.share)

    def stages(self, num_hidden_layers: int) -> dict[int, Keep]:
        """The layer each stage begins with → its keep."""
        parts = len(self.keeps) + 1
        layers = self.layers or [num_hidden_layers * (i + 1) // parts for i in range(len(self.keeps))]
        return dict(zip(layers, self.keeps, strict=True))

    def check(self, num_hidden_layers: int) -> None:
        if self.layers is None and num_hidden_layers <= len(self.keeps):
            raise ValueError(f"{len(self.keeps)} stages do not fit into {num_hidden_layers} decoder layers: give fewer")
        for layer in self.layers or []:
            check_depth(layer, num_hidden_layers)

    def prune(self, layer: int, tokens: Tokens) -> Best | None:
        keep = self.stages(tokens.num_hidden_layers).get(layer)
        if keep is None or (count := keep_count(keep, tokens.total)) >= len(tokens):
            return None
        return best(tokens, tokens.ahead, count, self.share)
