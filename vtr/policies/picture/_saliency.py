"""How much the vision tower looks at each patch: what many methods rank by."""

from __future__ import annotations

from typing import Literal

import torch

from vtr.image import Layer, Tower


def saliency(
    tower: Tower | None, layer: Layer = None, without_cls: Layer = None, heads: Literal["mean", "sum"] = "mean"
) -> torch.Tensor:
    """float32 [tiles, h * w]: attention after the softmax.

    It is what the CLS token pays in ``layer``, mean or sum over ``heads``; in a tower without CLS token, what a patch
    gets of all queries in layer ``without_cls``, in the mean.
    """
    assert tower is not None, "the policy wants no attention"
    if not tower.has_cls:
        return tower.attention_received(without_cls)
    paid = tower.attention_from_cls(layer)
    return paid.sum(1) if heads == "sum" else paid.mean(1)
