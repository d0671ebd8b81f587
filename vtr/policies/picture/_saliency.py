"""How much the vision tower looks at each patch: what many methods rank by."""

from __future__ import annotations

import torch

from vtr.image import Layer, Tower


def saliency(tower: Tower | None, layer: Layer = None, without_cls: Layer = None) -> torch.Tensor:
    """float32 [tiles, h * w]: attention after the softmax, mean over heads.

    It is what the CLS token pays in ``layer``; in a tower without CLS token, what a patch gets of all queries in layer
    ``without_cls``.
    """
    assert tower is not None, "the policy wants no attention"
    return tower.attention_from_cls(layer).mean(1) if tower.has_cls else tower.attention_received(without_cls)
