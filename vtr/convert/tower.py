"""The vision tower of a LLaVA checkpoint: its config and its weights, in the checkpoint or in a folder of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from vtr.convert.checkpoint import read_config, read_tensors
from vtr.convert.settings import integer, real, shown, word

CLIP_HEADS = {"openai/clip-vit-large-patch14-336": 16, "openai/clip-vit-large-patch14": 16}
"""Towers that official configs name; all else about them is in their tensors' shapes."""
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size",
)  # fmt: skip
CLIP = "vision_tower.vision_tower.vision_model."
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Derived numbers that old checkpoints carry along."""


def vision_config(
    config: dict[str, Any], state: dict[str, torch.Tensor], source: Path, tower: str | Path | None
) -> tuple[Any, Path | None]:
    """The tower's config, and the folder it was found in (None: made from what the tensors' shapes say)."""
    named = config.get("mm_vision_tower") or config.get("vision_tower") or ""
    for folder in (tower, source / named if named else None, named or None):
        if folder is not None and (Path(folder) / "config.json").is_file():
            return _clip(read_config(Path(folder)), Path(folder) / "config.json"), Path(folder)
    if tower is not None:
        raise FileNotFoundError(f"{tower} holds no config.json of a CLIP vision tower")
    if isinstance(config.get("vision_config"), dict):
        return _clip(config["vision_config"], source / "config.json, vision_config"), None
    prefix = f"model.{CLIP}"
    if named not in CLIP_HEADS or prefix + "embeddings.patch_embedding.weight" not in state:
        said = f"the vision tower {shown(named)}" if named else "a vision tower (mm_vision_tower is not in the config)"
        raise FileNotFoundError(
            f"{said} is not in the checkpoint or its sizes are not known: name a folder with its "
            "config.json and weights (vtr convert … --vision-tower FOLDER)"
        )
    layers = {name.split("encoder.layers.")[1].split(".")[0] for name in state if prefix + "encoder.layers." in name}
    try:
        width, _, patch, _ = state[prefix + "embeddings.patch_embedding.weight"].shape
        grid = math.isqrt(len(state[prefix + "embeddings.position_embedding.weight"]) - 1)
        inner = len(state[prefix + "encoder.layers.0.mlp.fc1.weight"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"the vision tower in {source} is not whole: {error} does not say its size") from error
    made = {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers), "patch_size": patch,
        "num_attention_heads": CLIP_HEADS[named], "image_size": grid * patch, "hidden_act": "quick_gelu",
    }  # fmt: skip
    return _clip(made, source), None


def _clip(data: dict[str, Any], where: Path | str) -> Any:
    """A CLIP tower's config, of a whole CLIP's or its own.

    Raises:
        ValueError: another tower's, or settings of other types or sizes.
    """
    from transformers import CLIPVisionConfig
    from transformers.activations import ACT2FN

    data = data["vision_config"] if isinstance(data.get("vision_config"), dict) else data
    if (kind := data.get("model_type", "clip")) not in ("clip", "clip_vision_model"):
        raise ValueError(f"{where}: a vision tower of model_type={shown(kind)}: only CLIP's can be converted")
    usual = CLIPVisionConfig()
    sizes = {name: integer(data, name, where, default=getattr(usual, name)) for name in SIZES}
    if wrong := [f"{name}={n}" for name, n in sizes.items() if not 0 < n < 2**20]:
        raise ValueError(f"{where}: {', '.join(wrong)} is no size of a CLIP tower")
    if sizes["hidden_size"] % sizes["num_attention_heads"] or sizes["image_size"] < sizes["patch_size"]:
        raise ValueError(f"{where}: these sizes are none of a CLIP tower: {sizes}")
    if (act := word(data, "hidden_act", where, usual.hidden_act)) not in ACT2FN:
        raise ValueError(f"{where}: hidden_act={act!r} is not known to transformers")
    settings: dict[str, Any] = {**sizes, "hidden_act": act}
    settings["layer_norm_eps"] = float(real(data, "layer_norm_eps", where, usual.layer_norm_eps))
    return CLIPVisionConfig(**settings)


def tower_weights(config: dict[str, Any], folder: Path | None) -> dict[str, torch.Tensor]:
    """The tower's weights from its own folder, under the names that a LLaVA checkpoint gives them."""
    if folder is None:
        raise FileNotFoundError(
            f"the checkpoint does not hold its vision tower {config.get('mm_vision_tower')!r}: name a folder with it "
            "(vtr convert … --vision-tower FOLDER)"
        )
    found = read_tensors(folder)
    # a whole CLIP has its tower under this name; a tower saved by itself may have none
    inner = "vision_model." if any("vision_model." in name for name in found) else ""
    vision = {name.partition(inner)[2] if inner else name: t for name, t in found.items() if inner in name}
    return {f"model.{CLIP}{name}": t for name, t in vision.items() if not name.endswith(BUFFERS)}


def check_depth(vision: Any, state: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless the tower's config has the layers that its tensors have."""
    at = f"model.{CLIP}encoder.layers."
    depth = len({name.removeprefix(at).split(".")[0] for name in state if name.startswith(at)})
    if depth != vision.num_hidden_layers:
        raise ValueError(f"the vision tower's config says {vision.num_hidden_layers} layers, its tensors have {depth}")
