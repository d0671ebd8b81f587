"""SCOPE (Deng et al., NeurIPS 2025, arXiv 2510.24214): tokens that are looked at and cover what others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vtr.checks import check_number
from vtr.image import Image
from vtr.policies.picture._greedy import covering, only, products, unit
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import Tilewise, first_of
from vtr.settings import register_policy


@register_policy("scope")
@dataclass
class Scope(Tilewise):
    """Of every tile, keep tokens that the vision tower looks at and that stand for the tokens not yet represented.

    SCOPE, NeurIPS 2025, arXiv 2510.24214. A token covers another as well as their cosine says (0 if negative). The next
    one is always that whose gain in coverage, summed over the tile, times its saliency is largest. Saliency is what the
    tower's CLS token pays, sum over heads, in the layer whose output the model uses; of towers without one, the
    attention a token receives (as in AngelSlim's port to Qwen). The question plays no part. Unlike the official code,
    sums are float32 or more, newline tokens stay, padding takes no part and each tile has a budget of its own.

    Args:
        keep: patches of each tile that stay: a ratio (float; above 0 at least one), or a count (int).
        placement: "true" leaves every token where it was; "official" repeats the published code for pictures with
            crops: no unpadding, no newline tokens.
        features: "tower" compares what the tower gives, before the projector; "projected" what enters the decoder
            (AngelSlim's port).
        alpha: power of the saliency, at least 0; 0 is coverage alone.
        combined: "multi" multiplies the gain by saliency, "add" adds it.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    features: Literal["tower", "projected"] = "tower"
    alpha: float = 1.0
    combined: Literal["multi", "add"] = "multi"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features not in ("tower", "projected"):
            raise ValueError(f"features={self.features!r}: choose 'tower' or 'projected'")
        if self.combined not in ("multi", "add"):
            raise ValueError(f"combined={self.combined!r}: choose 'multi' or 'add'")
        if check_number(self.alpha, "alpha") < 0:
            raise ValueError(f"alpha={self.alpha} must be at least 0 (0: coverage alone)")

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        states = ("hidden_states",) if self.features == "tower" else ()
        return (*states, "attentions", *(("tiles",) if self.features != "tower" or self.placement != "true" else ()))

    @torch.no_grad()
    def choose(self, image: Image, counts: list[int], there: torch.Tensor) -> torch.Tensor:
        assert image.tower is not None
        states = image.tower.hidden_states() if self.features == "tower" else image.tiles
        assert states is not None
        worth, units, some = saliency(image.tower, heads="sum") ** self.alpha, unit(states), only(there)
        if some is not None:  # what is not there need not be covered
            units = units * there.to(units.device, non_blocking=True)[..., None]
        table, flops = products(units)
        image.flops += flops
        multi = self.combined == "multi"
        picks, _ = covering(table, max(counts), some, worth if multi else None, None if multi else worth)
        return first_of(picks, counts, there.shape[1])
