"""LLaVA's own checkpoints → transformers' LLaVA-1.5 or LLaVA-NeXT, with the policy that was trained into them."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vtr.base import Policy
from vtr.convert.checkpoint import listed, read_config, read_tensors
from vtr.convert.methods import POLICIES
from vtr.learned import Learned, misfits

METHODS = tuple(POLICIES)
TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta", "rope_scaling",
    "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
CLIP_HEADS = {"openai/clip-vit-large-patch14-336": 16, "openai/clip-vit-large-patch14": 16}
"""Towers that official configs name; all else about them is in their tensors' shapes."""
CLIP = "vision_tower.vision_tower.vision_model."
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Derived numbers that old checkpoints carry along."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        model, policy: the folders. spec: of the policy there. kind: transformers' class. tensors: how many were read.
        ignored: those that are in neither, and why that is right is known. notes: what the user should know.
    """

    model: Path
    policy: Path
    spec: str
    kind: str
    tensors: int
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert_checkpoint(method: str, folder: str | Path, out: str | Path, tower: str | Path | None = None) -> Converted:
    """Read an official checkpoint; write ``out/model`` (transformers) and ``out/policy`` (vtr).

    The vocabulary gets one entry more, the image placeholder. Every tensor of the checkpoint ends up in the model, in
    the policy or in ``ignored``, and every tensor of both comes from it.

    Args:
        method: "pmod", "dynamic-llava" or "m3".
        tower: a folder with the CLIP tower's config.json (and weights, if the checkpoint has none); needed only where
            the official config names no tower that is known or there.

    Raises:
        FileNotFoundError: no config, weights, shard or tower.
        ValueError: an unknown method, a file that is cut off, a setting vtr cannot take over, or tensors that are
            missing, unknown or of another shape (they are listed).
    """
    if method not in POLICIES:
        raise ValueError(f"unknown method {method!r}: choose {', '.join(METHODS)}")
    source, target = Path(folder), Path(out)
    _check_target(target)
    config, state = read_config(source), read_tensors(source)
    total = len(state)
    policy, ignored = POLICIES[method](config, state)
    for name in [name for name in state if name.endswith(BUFFERS)]:
        del state[name]
        ignored.append(name)
    vision, given = _vision_config(config, state, source, tower)
    if not any(CLIP in name for name in state):
        state |= _tower_weights(config, given)
    notes: list[str] = []
    model = _build(config, vision, state, notes)
    if isinstance(policy, Learned):
        policy.fit(model)
    model.save_pretrained(target / "model")
    policy.save_pretrained(target / "policy")
    notes += _processor(source, target / "model", config, model)
    return Converted(
        target / "model", target / "policy", _spec(policy, target), type(model).__name__, total, ignored, notes
    )


def _spec(policy: Policy, target: Path) -> str:
    return f"{policy.name}:weights={target / 'policy'}" if isinstance(policy, Learned) else policy.spec


def _check_target(target: Path) -> None:
    for part in ("model", "policy"):
        if (target / part).exists() and any((target / part).iterdir()):
            raise ValueError(f"{target / part} is not empty: choose another folder")


# -- vision tower ------------------------------------------------------------------------------------------------------
def _vision_config(
    config: dict[str, Any], state: dict[str, torch.Tensor], source: Path, tower: str | Path | None
) -> tuple[Any, Path | None]:
    """The tower's config, and the folder it was found in (None: made from what the tensors' shapes say)."""
    from transformers import CLIPVisionConfig

    named = str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    for folder in (tower, source / named if named else None, named or None):
        if folder is not None and (Path(folder) / "config.json").is_file():
            data = json.loads((Path(folder) / "config.json").read_text())
            return CLIPVisionConfig(**data.get("vision_config", data)), Path(folder)
    if tower is not None:
        raise FileNotFoundError(f"{tower} holds no config.json of a CLIP vision tower")
    prefix = f"model.{CLIP}"
    if named not in CLIP_HEADS or prefix + "embeddings.patch_embedding.weight" not in state:
        raise FileNotFoundError(
            f"the vision tower {named!r} is not in the checkpoint or its sizes are not known: name a folder with its "
            "config.json and weights (vtr convert … --vision-tower FOLDER)"
        )
    width, _, patch, _ = state[prefix + "embeddings.patch_embedding.weight"].shape
    grid = math.isqrt(len(state[prefix + "embeddings.position_embedding.weight"]) - 1)
    layers = {name.split("encoder.layers.")[1].split(".")[0] for name in state if prefix + "encoder.layers." in name}
    inner = len(state[prefix + "encoder.layers.0.mlp.fc1.weight"])
    made = CLIPVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=len(layers), patch_size=patch,
        num_attention_heads=CLIP_HEADS[named], image_size=grid * patch, hidden_act="quick_gelu",
    )  # fmt: skip
    return made, None


def _tower_weights(config: dict[str, Any], folder: Path | None) -> dict[str, torch.Tensor]:
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


# -- the model ---------------------------------------------------------------------------------------------------------
def _build(config: dict[str, Any], vision: Any, state: dict[str, torch.Tensor], notes: list[str]) -> Any:
    """The transformers model that holds all of ``state``.

    Raises:
        ValueError: tensors are missing, unknown or of another shape, or a setting has no counterpart.
    """
    _check_settings(config)
    model, words = _empty(config, vision), config["vocab_size"]
    own = model.state_dict()
    tower = next(k for k in own if k.endswith("class_embedding")).removesuffix("embeddings.class_embedding")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state and len(state[name]) == words:
            state[name] = torch.cat([state[name], state[name].new_zeros(1, state[name].shape[1])])
    called = {_renamed(name, tower): name for name in state}
    named = {name: state[theirs] for name, theirs in called.items()}
    for name, t in own.items():  # behind the layer that features are taken from: some checkpoints leave it out
        if "post_layernorm" in name and name not in named and config.get("mm_vision_select_layer", -2) != -1:
            fill = torch.ones if name.endswith("weight") else torch.zeros
            named[name] = fill(t.shape, dtype=next(iter(state.values())).dtype)
            notes.append(f"{name} is not in the checkpoint; nothing reads it, so it is left neutral")
    if wrong := misfits(own, named, called):
        raise ValueError(f"the checkpoint does not fit a {type(model).__name__}: {listed(wrong)}")
    model.load_state_dict(named, assign=True)
    return model.eval()


def _empty(config: dict[str, Any], vision: Any) -> Any:
    """The transformers model on the meta device, its vocabulary longer by the image's placeholder."""
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    words = config["vocab_size"]
    text = LlamaConfig(
        **{name: config[name] for name in TEXT if config.get(name) is not None} | {"vocab_size": words + 1}
    )
    common = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": words,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        if anyres(config):
            return LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=_grids(config), **common))
        return LlavaForConditionalGeneration(LlavaConfig(**common))


def anyres(config: dict[str, Any]) -> bool:
    """Whether a LLaVA checkpoint is of the NeXT kind: tiles, unpadding, newline tokens."""
    return "unpad" in str(config.get("mm_patch_merge_type")) or config.get("image_aspect_ratio") == "anyres"


def _check_settings(config: dict[str, Any]) -> None:
    wants: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", None),
        "max_num_patches": (None, 0),
        "tie_word_embeddings": (False, None),
        "hidden_act": ("silu", None),
    }
    if anyres(config):
        wants["mm_patch_merge_type"] = ("spatial_unpad",)
    wrong = [f"{name}={config.get(name)!r}" for name, known in wants.items() if config.get(name) not in known]
    if wrong:
        raise ValueError(f"transformers' LLaVA has no counterpart to {', '.join(wrong)}")


def _grids(config: dict[str, Any]) -> list[list[int]]:
    """Resolutions of AnyRes canvases as transformers has them, (height, width)."""
    grids = config.get("image_grid_pinpoints")
    try:
        grids = ast.literal_eval(grids) if isinstance(grids, str) else grids
        return [[int(height), int(width)] for width, height in grids]  # type: ignore[union-attr]
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"image_grid_pinpoints={grids!r}: a list of [width, height] is needed") from error


def _renamed(name: str, tower: str) -> str:
    """A LLaVA checkpoint's name in transformers; unknown names stay as they are."""
    inner = name.removeprefix("model.")
    if inner.startswith(CLIP):
        return tower + inner.removeprefix(CLIP)
    if inner.startswith("mm_projector."):
        _, number, kind = inner.split(".")
        return f"model.multi_modal_projector.linear_{ {'0': 1, '2': 2}.get(number, number) }.{kind}"
    if inner == "image_newline":
        return "model.image_newline"
    if inner.startswith(("layers.", "embed_tokens.", "norm.")):
        return f"model.language_model.{inner}"
    return name


# -- tokenizer and image processor -------------------------------------------------------------------------------------
def _processor(source: Path, target: Path, config: dict[str, Any], model: Any) -> list[str]:
    """Write the processor beside the model; returns what the user must know if there is none."""
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return ["no tokenizer in the checkpoint: bring the processor of the same LLaVA from elsewhere"]
    from transformers import AutoTokenizer, LlavaNextProcessor, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    except (ImportError, ValueError, OSError) as error:
        return [f"the tokenizer could not be read ({str(error).splitlines()[0]}): no processor was written"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    if (got := tokenizer.convert_tokens_to_ids("<image>")) != model.config.image_token_id:
        return [f"the tokenizer numbers <image> {got}, not {model.config.image_token_id}: no processor was written"]
    tokenizer.padding_side = "left"
    vision = model.config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    settings = {"patch_size": vision.patch_size, "vision_feature_select_strategy": "default"}
    settings["num_additional_image_tokens"] = 1  # CLIP's CLS token, which is dropped
    if anyres(config):
        tiles = LlavaNextImageProcessorPil(size=side, crop_size=side, image_grid_pinpoints=_grids(config))
        LlavaNextProcessor(image_processor=tiles, tokenizer=tokenizer, **settings).save_pretrained(target)
    else:
        pad = config.get("image_aspect_ratio") == "pad"
        size = side if pad else {"shortest_edge": vision.image_size}
        one = LlavaImageProcessorPil(size=size, crop_size=side, do_pad=pad)
        LlavaProcessor(image_processor=one, tokenizer=tokenizer, **settings).save_pretrained(target)
    return []
