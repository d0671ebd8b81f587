"""What is trained: the projector and low-rank changes (LoRA) of the decoder's linear layers, kept as int8.

``build --weights`` adds them to the packages' own weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..changes import pack, unpack

FILE = "trained.safetensors"
SHIPPED = Path(__file__).parent / "weights" / FILE
"""What ``train`` made of the packages' weights, and ``build`` adds to them."""
PROJECTOR = "projector."
LORA = "lora."
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder layer that are changed."""
DIAGONAL = ".diagonal"
"""Behind the name of a square matrix that is zero beside its diagonal; only that is kept."""
DOWN, UP = ".a", ".b"
"""Of a change up · down: the first maps a layer's input to the rank, the second the rank to its output."""


def save(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write weights as int8 with one scale a row (vectors as float32).

    Args:
        weights: the projector's state below "projector.", and for every changed layer of the decoder
            "lora.layers.0.self_attn.q_proj.a" [rank, in] and ".b" [out, rank], their product being what is added.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pack(dict(_short(name, weight) for name, weight in weights.items()), path)


def _short(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
    if weight.ndim == 2 and weight.shape[0] == weight.shape[1] and torch.equal(weight, weight.diagonal().diag()):
        return name + DIAGONAL, weight.diagonal()
    return name, weight


def load(path: Path) -> dict[str, torch.Tensor]:
    """What :func:`save` wrote, float32."""
    found = unpack(path)
    return {
        name.removesuffix(DIAGONAL): weight.diag() if name.endswith(DIAGONAL) else weight
        for name, weight in found.items()
    }


@torch.no_grad()
def slim(weights: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """The weights with only the strongest of LoRA's singular directions, those of all layers compared with each other.

    Args:
        share: of all directions. The ranks of the layers differ then; a layer keeps one at least.
    """
    found, strong = dict(weights), dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
    for name in [name.removesuffix(DOWN) for name in weights if name.startswith(LORA) and name.endswith(DOWN)]:
        out, over = torch.linalg.qr(weights[name + UP])
        in_, under = torch.linalg.qr(weights[name + DOWN].T)
        left, values, right = torch.linalg.svd(over @ under.T)
        strong[name] = (out @ left, values, right @ in_.T)
    every = torch.cat([values for _, values, _ in strong.values()]).sort(descending=True).values
    least = every[max(round(share * len(every)), 1) - 1]
    for name, (left, values, right) in strong.items():
        rank = max(int((values >= least).sum()), 1)
        root = values[:rank].sqrt()
        found[name + UP], found[name + DOWN] = left[:, :rank] * root, right[:rank] * root[:, None]
    return found


@torch.no_grad()
def put_on(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Fill the projector of an InternVL and add the changes to its decoder's weights, in place.

    Raises:
        ValueError: the weights are of another model.
    """
    projector = {name.removeprefix(PROJECTOR): value for name, value in weights.items() if name.startswith(PROJECTOR)}
    changes = sorted({name.rsplit(".", 1)[0] for name in weights if name.startswith(LORA)})
    decoder = model.model.language_model
    try:
        layers = [decoder.get_submodule(name.removeprefix(LORA)) for name in changes]
        made = [weights[name + UP] @ weights[name + DOWN] for name in changes]
        if any(layer.weight.shape != change.shape for layer, change in zip(layers, made, strict=True)):
            raise ValueError("a change has another shape than its layer")
        model.model.multi_modal_projector.load_state_dict(projector)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"these trained weights are of another model: {error}") from error
    for layer, change in zip(layers, made, strict=True):
        layer.weight.add_(change.to(layer.weight.dtype))
