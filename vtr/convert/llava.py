"""LLaVA's own checkpoints → transformers' LLaVA-1.5 or LLaVA-NeXT, with the policy that was trained into them."""

from __future__ import annotations

import ast
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vtr.base import Policy
from vtr.convert import adapter
from vtr.convert.checkpoint import check_numbers, listed, read_config, read_tensors
from vtr.convert.methods import POLICIES
from vtr.convert.settings import TEXT, clean, integer, shown
from vtr.convert.tower import BUFFERS, CLIP, check_depth, tower_weights, vision_config
from vtr.learned import Learned, misfits

METHODS = tuple(POLICIES)
LAYER = -2
LINEAR = {"mm_projector.0": "linear_1", "mm_projector.2": "linear_2"}
PARTS = ("policy", "model")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


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


def convert_checkpoint(
    method: str, folder: str | Path, out: str | Path, tower: str | Path | None = None, base: str | Path | None = None
) -> Converted:
    """Read an official checkpoint; write ``out/model`` (transformers) and ``out/policy`` (vtr).

    The vocabulary gets one entry more, the image placeholder. Every tensor of the checkpoint ends up in the model, in
    the policy or in ``ignored``, and every tensor of both comes from it. Nothing is written unless all of it can be.

    Args:
        method: "pmod", "dynamic-llava" or "m3".
        folder: a whole checkpoint, or what LLaVA's LoRA training saves (adapter_config.json, adapter_model.*,
            non_lora_trainables.bin), or its pretraining (mm_projector.bin).
        tower: a folder with the CLIP tower's config.json (and weights, if the checkpoint has none); needed only where
            the official config names no tower that is known or there.
        base: of a folder that is no whole model: the folder of the one it was trained on, in LLaVA's own layout or its
            language model's.

    Raises:
        FileNotFoundError: no config, weights, shard, tower or base.
        ValueError: an unknown method, a file that is cut off or malformed, a setting that is missing, of another type
            or that vtr cannot take over, an adapter without a base or of another kind than LoRA, or tensors that are
            missing, unknown, of another shape or no finite floats (they are listed).
    """
    if method not in POLICIES:
        raise ValueError(f"unknown method {method!r}: choose {', '.join(METHODS)}")
    source, target = Path(folder), Path(out)
    staging = _check_target(target)
    if adapter.is_adapter(source):
        config, state = adapter.read_merged(source, base)
    elif base is not None:
        raise ValueError(f"{source} is no adapter: leave --base out, or name the folder with {adapter.CONFIG}")
    else:
        config, state = read_config(source), read_tensors(source)
    total, where = len(state), source / "config.json"
    config = clean(config, where)
    _check_sizes(config, state, where)
    try:
        policy, ignored = POLICIES[method](config, state)
        policy.check(config["num_hidden_layers"])
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
    for name in [name for name in state if name.endswith(BUFFERS)]:
        del state[name]
        ignored.append(name)
    vision, given = vision_config(config, state, source, tower)
    if not any(CLIP in name for name in state):
        state |= tower_weights(config, given)
    notes: list[str] = []
    model = _build(config, vision, state, notes)
    if isinstance(policy, Learned):
        check_numbers(policy.tensors())
        policy.fit(model)
    try:
        model.save_pretrained(staging / "model")
        policy.save_pretrained(staging / "policy")
        words = source if base is None or any((source / name).is_file() for name in TOKENIZERS) else Path(base)
        notes += _processor(words, staging / "model", config, model)
        for part in PARTS:
            target.mkdir(parents=True, exist_ok=True)
            if (target / part).is_dir():
                (target / part).rmdir()  # it is empty
            (staging / part).rename(target / part)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Converted(
        target / "model", target / "policy", _spec(policy, target), type(model).__name__, total, ignored, notes
    )


def _spec(policy: Policy, target: Path) -> str:
    return f"{policy.name}:weights={target / 'policy'}" if isinstance(policy, Learned) else policy.spec


def _check_target(target: Path) -> Path:
    """Where to write until all of it is there, beside ``target``."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: choose another folder")
    for part in PARTS:
        if (here := target / part).exists() and (not here.is_dir() or any(here.iterdir())):
            raise ValueError(f"{here} is not empty: choose another folder")
    staging = target.absolute().with_name(f"{target.absolute().name}.part")
    if staging.exists() and not (staging.is_dir() and {file.name for file in staging.iterdir()} <= set(PARTS)):
        raise ValueError(f"{staging} is in the way: move it, or choose another folder")
    shutil.rmtree(staging, ignore_errors=True)  # of a conversion that was killed
    return staging


def _check_sizes(config: dict[str, Any], state: dict[str, torch.Tensor], where: Path) -> None:
    """Raise ValueError unless the settings' sizes are the tensors', before anything of such a size is made."""
    if any("language_model." in name or "multi_modal_projector." in name for name in state):
        raise ValueError(
            f"{where.parent} has transformers' names already, not those of LLaVA's own code: load it with "
            "from_pretrained"
        )
    depth = len({name.split(".")[2] for name in state if name.startswith("model.layers.") and name.count(".") > 3})
    words = state.get("model.embed_tokens.weight")
    said = {"num_hidden_layers": depth}
    if words is not None and words.dim() == 2:
        said |= {"vocab_size": len(words), "hidden_size": words.shape[1]}
    wrong = [f"{name} is {config[name]}, the tensors have {n}" for name, n in said.items() if n and config[name] != n]
    if wrong or not depth:
        raise ValueError(f"{where}: {', '.join(wrong) or 'there are no tensors of decoder layers (model.layers.…)'}")


# -- the model ---------------------------------------------------------------------------------------------------------
def _build(config: dict[str, Any], vision: Any, state: dict[str, torch.Tensor], notes: list[str]) -> Any:
    """The transformers model that holds all of ``state``.

    Raises:
        ValueError: tensors are missing, unknown or of another shape, or a setting has no counterpart.
    """
    notes += _check_settings(config, state, vision)
    check_depth(vision, state)
    model, words = _empty(config, vision), config["vocab_size"]
    own = model.state_dict()
    tower = next(k for k in own if k.endswith("class_embedding")).removesuffix("embeddings.class_embedding")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state and state[name].dim() == 2 and len(state[name]) == words:
            state[name] = torch.cat([state[name], state[name].new_zeros(1, state[name].shape[1])])
    called = {_renamed(name, tower): name for name in state}
    named = {name: state[theirs] for name, theirs in called.items()}
    for name, t in own.items():  # behind the layer that features are taken from: some checkpoints leave it out
        if "post_layernorm" in name and name not in named and model.config.vision_feature_layer != -1:
            fill = torch.ones if name.endswith("weight") else torch.zeros
            named[name] = fill(t.shape, dtype=next(iter(state.values())).dtype)
            notes.append(f"{name} is not in the checkpoint; nothing reads it, so it is left neutral")
    if wrong := misfits(own, named, called):
        raise ValueError(f"the checkpoint does not fit a {type(model).__name__}: {listed(wrong)}")
    check_numbers({called.get(name, name): tensor for name, tensor in named.items()})
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
    settings = {name: config[name] for name in TEXT if config.get(name) is not None} | {"vocab_size": words + 1}
    try:
        text = LlamaConfig(**settings)
    except Exception as error:  # transformers checks types in its own way
        raise ValueError(f"the config is none of a LLaMA: {' '.join(str(error).split())[:300]}") from error
    common = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": words,
        "vision_feature_layer": integer(config, "mm_vision_select_layer", default=LAYER),
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


def _check_settings(config: dict[str, Any], state: dict[str, torch.Tensor], vision: Any) -> list[str]:
    """Raise ValueError for settings that transformers' LLaVA does not have; returns what was taken for granted."""
    wants: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", None),
        "max_num_patches": (None, 0),
        "tie_word_embeddings": (False, None),
        "hidden_act": ("silu", None),
        "image_aspect_ratio": ("anyres", None) if anyres(config) else ("pad", "square", None),
    }
    if anyres(config):
        wants["mm_patch_merge_type"] = ("spatial_unpad",)
    notes = []
    inner = {name.partition("mm_projector.")[2] for name in state if "mm_projector." in name}
    if config.get("mm_projector_type") is None and inner == {
        f"{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")
    }:
        wants.pop("mm_projector_type")
        notes.append("the config has no mm_projector_type; the projector's tensors are those of mlp2x_gelu")
    wrong = [f"{name}={shown(config.get(name))}" for name, known in wants.items() if config.get(name) not in known]
    if wrong:
        raise ValueError(f"transformers' LLaVA has no counterpart to {', '.join(wrong)}")
    if config.get("mm_vision_select_layer") is None:
        notes.append(f"the config has no mm_vision_select_layer; {LAYER} was taken, LLaVA-1.5's")
    layer, depth = integer(config, "mm_vision_select_layer", default=LAYER), vision.num_hidden_layers
    if not -depth - 1 <= layer <= depth:
        raise ValueError(f"mm_vision_select_layer={layer}, but the vision tower has {depth} layers")
    return notes


def _grids(config: dict[str, Any]) -> list[list[int]]:
    """Resolutions of AnyRes canvases as transformers has them, (height, width)."""
    grids = config.get("image_grid_pinpoints")
    try:
        grids = ast.literal_eval(grids) if isinstance(grids, str) else grids
        made = [[int(height), int(width)] for width, height in grids]  # type: ignore[union-attr]
        if not made or min(map(min, made)) < 1:
            raise ValueError
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"image_grid_pinpoints={shown(grids)}: a list of [width, height] is needed") from error
    return made


def _renamed(name: str, tower: str) -> str:
    """A LLaVA checkpoint's name in transformers; unknown names stay as they are."""
    inner = name.removeprefix("model.")
    if inner.startswith(CLIP):
        return tower + inner.removeprefix(CLIP)
    projector, _, kind = inner.rpartition(".")
    if projector in LINEAR:
        return f"model.multi_modal_projector.{LINEAR[projector]}.{kind}"
    if inner == "image_newline":
        return "model.image_newline"
    if inner.startswith(("layers.", "embed_tokens.", "norm.")):
        return f"model.language_model.{inner}"
    return name


# -- tokenizer and image processor -------------------------------------------------------------------------------------
def _processor(source: Path, target: Path, config: dict[str, Any], model: Any) -> list[str]:
    """Write the processor beside the model; returns what the user must know if there is none."""
    if not any((source / name).is_file() for name in TOKENIZERS):
        return ["no tokenizer in the checkpoint: bring the processor of the same LLaVA from elsewhere"]
    from transformers import AutoTokenizer, LlavaNextProcessor, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises bare ones
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return [f"the tokenizer could not be read ({said}): no processor was written"]
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
