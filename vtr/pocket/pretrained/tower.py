"""The tower: a DINOv2 in an ONNX graph becomes the weights of InternVL's vision model, which it fits exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .onnx import Graph

PREFIX = "backbone."
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
"""What the pinned export calls the positions of the CLS token and of the patches."""
HEAD = 64
"""Width of a head, as every DINOv2 has it."""
EPS = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pixels that it was trained on."""
BLOCK = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.projection_layer": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
"""Parts of a block of InternVL's → DINOv2's."""


def weights_of(graph: Graph) -> dict[str, np.ndarray]:
    """DINOv2's weights by their own names.

    An export keeps the names of vectors but not of matrices: those are found as what is multiplied before a named bias
    is added, and stand transposed. The positions are called "cls_position" and "positions".

    Raises:
        ValueError: the graph is not that of such an export.
    """
    found = {name.removeprefix(PREFIX): value for name, value in graph.tensors.items() if name.startswith(PREFIX)}
    made = {output: node for node in graph.nodes for output in node.outputs}
    for node in graph.nodes:
        biases = [name for name in node.inputs if name.startswith(PREFIX) and name.endswith(".bias")]
        if node.kind != "Add" or not biases:
            continue
        for name in node.inputs:
            product = made.get(name)
            if product is not None and product.kind == "MatMul" and product.inputs[1] in graph.tensors:
                found[biases[0].removeprefix(PREFIX).replace(".bias", ".weight")] = graph.tensors[product.inputs[1]].T
    for ours, theirs in zip(("cls_position", "positions"), POSITIONS, strict=True):
        if theirs not in graph.tensors:
            raise ValueError(f"the ONNX file has no {theirs}: it is not the export that was pinned")
        found[ours] = graph.tensors[theirs]
    return found


def depth_of(weights: dict[str, np.ndarray]) -> int:
    """Layers."""
    return 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))


def config(weights: dict[str, np.ndarray], side: int) -> Any:
    """InternVL's settings for these weights and pictures of ``side`` pixels.

    Raises:
        ValueError: patches do not fill such a picture.
    """
    from transformers import InternVLVisionConfig

    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    if side % patch:
        raise ValueError(f"side={side} must be a multiple of the patches' {patch}")
    return InternVLVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["encoder.layer.0.mlp.fc1.bias"]),
        num_hidden_layers=depth_of(weights),
        num_attention_heads=width // HEAD,
        image_size=[side, side],
        patch_size=[patch, patch],
        layer_norm_eps=EPS,
        attention_bias=True,
        layer_scale_init_value=1.0,
        use_mean_pooling=False,
    )


def resized(positions: np.ndarray, side: int) -> torch.Tensor:
    """Positions of a square grid for one of side × side patches, [1, side², width]."""
    old = math.isqrt(positions.shape[1])
    if old**2 != positions.shape[1]:
        raise ValueError(f"{positions.shape[1]} positions are no square grid")
    grid = torch.tensor(positions).unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def state(weights: dict[str, np.ndarray], side: int) -> dict[str, torch.Tensor]:
    """What InternVL's vision model loads.

    Args:
        side: patches along a side.
    """
    positions = torch.cat([torch.tensor(weights["cls_position"]), resized(weights["positions"], side)], 1)
    out = {
        "embeddings.cls_token": torch.tensor(weights["embeddings.cls_token"]),
        "embeddings.position_embeddings": positions,
    }
    named = {"embeddings.patch_embeddings.projection": "embeddings.patch_embeddings.projection"}
    named["layernorm"] = "layernorm"
    for layer in range(depth_of(weights)):
        at = f"encoder.layer.{layer}."
        named |= {at + ours: at + theirs for ours, theirs in BLOCK.items()}
        for n in (1, 2):
            out[f"{at}lambda_{n}"] = torch.tensor(weights[f"{at}layer_scale{n}.lambda1"])
    for ours, theirs in named.items():
        out |= {f"{ours}.{part}": torch.tensor(weights[f"{theirs}.{part}"]) for part in ("weight", "bias")}
    return out
