"""AutoScale's router: a network of one hidden layer that estimates, for each scale but the last, that it suffices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import gelu

from vtr.files import check_finite
from vtr.image import Image

ROUTER = ("mean", "std", "hidden.weight", "hidden.bias", "out.weight", "out.bias")
"""The router's tensors: how its inputs are normalised, and a network of one hidden layer."""


def router_input(images: Sequence[Image], question: torch.Tensor) -> torch.Tensor:
    """What the router sees of a row: float32 [3 · hidden_size].

    Mean and maximum over the thumbnails' tokens, and the mean of the question's word embeddings.
    """
    thumbnails = [image.features[((image.layout.tile == 0) & (image.layout.newline == 0)).to(image.features.device)]
                  for image in images]  # fmt: skip
    tokens = torch.cat(thumbnails).float()
    return torch.cat([tokens.mean(0), tokens.amax(0), question.float().mean(0)])


def expect(tensors: Mapping[str, torch.Tensor], outs: int) -> None:
    """Raise ValueError unless ``tensors`` have the names of a router's with ``outs`` estimates, and shapes that fit."""
    if set(tensors) != set(ROUTER):
        raise ValueError(f"a router's tensors are {', '.join(ROUTER)}; got {', '.join(sorted(tensors))}")
    if tensors["hidden.weight"].dim() != 2 or 0 in tensors["hidden.weight"].shape:
        raise ValueError(f"router weights: hidden.weight is {list(tensors['hidden.weight'].shape)}, no matrix")
    hidden, width = tensors["hidden.weight"].shape
    wanted = {"mean": (width,), "std": (width,), "hidden.weight": (hidden, width), "hidden.bias": (hidden,),
              "out.weight": (outs, hidden), "out.bias": (outs,)}  # fmt: skip
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"router weights: {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"router weights: {name} has {tensors[name].dtype} values")


def checked(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in float32.

    Raises:
        ValueError: a value is not finite, or inputs would be divided by what is not above 0.
    """
    check_finite(tensors)
    if not bool((tensors["std"] > 0).all()):
        raise ValueError("router weights: std, which its inputs are divided by, must be above 0")
    return {name: tensor.detach().float() for name, tensor in tensors.items()}


def estimates(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """float32 [rows, scales - 1] of inputs x [rows, 3 · hidden_size].

    Raises:
        ValueError: the router is for another hidden_size.
    """
    w = {name: tensor.to(x.device) for name, tensor in weights.items()}
    if x.shape[-1] != len(w["mean"]):
        raise ValueError(
            f"this router is for a hidden_size of {len(w['mean']) // 3}, not {x.shape[-1] // 3}: train one for "
            "this model (vtr.training.autoscale)"
        )
    hidden = gelu((x - w["mean"]) / w["std"] @ w["hidden.weight"].T + w["hidden.bias"])
    return (hidden @ w["out.weight"].T + w["out.bias"]).sigmoid()
