"""FasterVLM (Zhang et al., arXiv 2412.01818v1): the patches at which the vision tower's CLS token looks most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtr.image import Image
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import Tilewise, best_of
from vtr.settings import register_policy


@register_policy("fastervlm")
@dataclass
class FasterVLM(Tilewise):
    """Keep the patches of every tile at which the vision tower's CLS token looks most.

    FasterVLM (Zhang et al., 2024, arXiv 2412.01818v1): the CLS token's attention after the softmax, in the layer whose
    output the model uses, mean over heads. The published code drops newline tokens and keeps patches of padding, and
    picks another resolution for some pictures; here it is the model's own. Towers without CLS token: the attention that
    a patch gets from all, in the same layer.

    Args:
        keep: patches of each tile that stay: a ratio (float) of those that are there (above 0 at least one of each
            tile), or a count (int).
        placement: "true" leaves every token where it was. "official" repeats the published code for pictures with
            crops: every crop is whole (patches that show padding take part), and no newline token stays.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("attentions", "tiles") if self.placement == "official" else ("attentions",)

    def choose(self, image: Image, counts: list[int], there: torch.Tensor) -> torch.Tensor:
        return best_of(saliency(image.tower), counts, there)
