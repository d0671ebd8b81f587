"""Fixtures made by the official code of a method, and its tiny LLaVA rebuilt in transformers' own classes.

``VTR_GOLDEN`` names the folder with a sub-folder per method (default: tests/golden); fixtures of the same layout do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vtr.integrations.llava import Llava, tile_layout

import vtr
from vtr.engine.adapters import register_adapter
from vtr.image import Layout

GOLDEN = Path(os.environ.get("VTR_GOLDEN", Path(__file__).parent / "golden"))
IMG = -200
"""The official code's image placeholder."""
EOS = 2


def meta(method: str) -> dict[str, Any]:
    """What the fixtures of a method hold."""
    return json.loads((GOLDEN / method / "meta.json").read_text())


def tensors(method: str, name: str) -> dict[str, Tensor]:
    """One file of fixtures, with those tensors that are the same as others (NAME.elsewhere.json).

    It names, by file, the tensors that another one has under the same name, or which of which names they equal.
    """
    found: dict[str, Tensor] = load_file(GOLDEN / method / f"{name}.safetensors")
    elsewhere = GOLDEN / method / f"{name}.elsewhere.json"
    for other, names in json.loads(elsewhere.read_text()).items() if elsewhere.is_file() else ():
        theirs = load_file(GOLDEN / f"{other}.safetensors")
        found.update({one: theirs[names[one] if isinstance(names, dict) else one] for one in names})
    return found


def close(got: Tensor, want: Tensor, noise: float = 1e-5) -> None:
    """Equal to ``noise``, of the largest number where that is above 1 (float32 sums in another order)."""
    torch.testing.assert_close(got, want, atol=noise * max(1.0, float(want.abs().max())), rtol=0)


def swapped(pairs: list[list[int]]) -> list[list[int]]:
    """(width, height) as LLaVA's own code has it → (height, width) as transformers has it, or back."""
    return [[b, a] for a, b in pairs]


def _renamed(name: str, tower: str) -> str:
    """An official parameter's name in transformers; ``tower``: what stands before the tower's own names."""
    if name == "lm_head.weight":
        return name
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        return tower + name.removeprefix("vision_tower.vision_tower.vision_model.")
    if name.startswith("mm_projector."):
        return "model.multi_modal_projector." + {"0": "linear_1", "2": "linear_2"}[name[13]] + name[14:]
    return "model." + ("" if name == "image_newline" else "language_model.") + name


def model(method: str, config: dict[str, Any], heads: int, anyres: bool = True, room: int = 1) -> Any:
    """The official tiny model, patched: LLaVA-NeXT, or LLaVA-1.5. ``heads``: of its CLIP tower.

    The vocabulary gets ``room`` more entries, the last of which is the image placeholder; with no room it is the last
    word (which no prompt may use then).
    """
    state = tensors(method, "tiny_state")
    clip = "model.vision_tower.vision_tower.vision_model."
    width, _, patch, _ = state[clip + "embeddings.patch_embedding.weight"].shape
    side = math.isqrt(len(state[clip + "embeddings.position_embedding.weight"]) - 1)
    depth = sum(name.startswith(clip) and name.endswith("layer_norm1.weight") for name in state)
    inner = len(state[clip + "encoder.layers.0.mlp.fc1.weight"])
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=heads,
        image_size=side * patch, patch_size=patch,
    )  # fmt: skip
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names = (*names, "hidden_act", "rms_norm_eps", "max_position_embeddings")
    words = config["vocab_size"] + room
    text = LlamaConfig(vocab_size=words, bos_token_id=1, eos_token_id=EOS, **{name: config[name] for name in names})
    given = {"vision_config": vision, "text_config": text, "image_token_index": words - 1, "vision_feature_layer": -2}
    if anyres:
        given["image_grid_pinpoints"] = swapped(config["image_grid_pinpoints"])
        made: Any = LlavaNextForConditionalGeneration(LlavaNextConfig(**given))
    else:
        made = LlavaForConditionalGeneration(LlavaConfig(**given))
        del state["model.image_newline"]
    own = made.state_dict()
    tower = next(k for k in own if k.endswith("class_embedding")).removesuffix("embeddings.class_embedding")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.zeros(room, state[name].shape[1])])
    named = {_renamed(name, tower): tensor for name, tensor in state.items()}
    missing, unexpected = made.load_state_dict(named, strict=False)
    assert not unexpected and all("post_layernorm" in k or "position_ids" in k for k in missing), (missing, unexpected)
    made.generation_config.eos_token_id = EOS
    made.set_attn_implementation("eager")  # as the official code ran: other sums rank scores 1e-7 apart otherwise
    return vtr.patch(made.eval())


def heads_of(method: str, config: dict[str, Any], pixels: Tensor, states: Tensor) -> int:
    """How many heads the CLIP tower has (the fixtures do not say): so many that ``hidden_states[-2]`` is ``states``."""
    width = states.shape[-1]
    for heads in (n for n in range(1, width + 1) if width % n == 0):
        tower = model(method, config, heads).model.vision_tower
        with torch.no_grad():
            got = tower(pixels[: len(states)], output_hidden_states=True).hidden_states[-2]
        if torch.allclose(got[:, -states.shape[1] :], states, atol=1e-4):
            return heads
    raise AssertionError("no number of heads gives the CLIP features of the fixtures")


def prompt(model: Any, ids: Tensor, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official ``input_ids`` [1, n] with one placeholder → what transformers takes: one placeholder a vision token."""
    with torch.no_grad():
        count = len(model.model.get_image_features(**images).pooler_output[0])
    row = [t for t in ids[0].tolist() for t in ([model.config.image_token_id] * count if t == IMG else [t])]
    return {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long(), **images}


def anyres(pixels: Tensor, size: list[int]) -> dict[str, Tensor]:
    """One picture of ``size`` (width, height): its tiles [tiles, 3, h, w] as transformers takes them."""
    return {"pixel_values": pixels[None], "image_sizes": torch.tensor(swapped([size]))}


def run(model: Any, inputs: dict[str, Tensor], policy: Any) -> tuple[Tensor, Tensor]:
    """(what the decoder gets [1, tokens, D], logits [1, logical tokens, vocabulary])."""
    seen: list[Tensor] = []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model(**inputs, policy=policy).logits
    hook.remove()
    return seen[0], logits


def greedy(model: Any, inputs: dict[str, Tensor], policy: Any, steps: int) -> list[int]:
    """Generated tokens; never the placeholder, which the official vocabulary does not have."""
    out = model.generate(
        **inputs, policy=policy, max_new_tokens=steps, do_sample=False, suppress_tokens=[model.config.image_token_id]
    )
    return out[0, inputs["input_ids"].shape[1] :].tolist()


# ------------------------------------------------------------------------- text models with given vision features
class Given(LlavaForConditionalGeneration):
    """A LLaVA whose images are given as features: ``pictures`` is a list of [tokens, width], in the order of rows."""

    pictures: list[Tensor]


class GivenAdapter(Llava):
    """Every picture is a line of tokens."""

    family, classes = "features given by a test", ("Given",)

    def layouts(self, model: Any, inputs: Any) -> dict[int, list[Layout]]:
        return {model.config.image_token_id: [tile_layout(1, len(p)) for p in model.pictures]}


def given(method: str, rename: Callable[[str], str | None] = str, attn: str = "sdpa", weights: str = "weights") -> Any:
    """The official tiny text model of ``method``, patched; which word stands for vision tokens says :func:`mark`.

    ``rename``: an official parameter's name without what the method wraps around it; None for the policy's weights.
    ``weights``: their file, which has a config of its own ("weights_gqa": config_gqa).
    """
    config, state = meta(method)["config" + weights.removeprefix("weights")], tensors(method, weights)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names = (*names, "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_theta")
    words = {"vocab_size": config["vocab_size"], "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    text = LlamaConfig(**words, **{name: config[name] for name in names})
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=2, patch_size=1
    )
    made: Any = Given(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))
    named = {_renamed(new, ""): t for name, t in state.items() if (new := rename(name)) is not None}
    missing, unexpected = made.load_state_dict(named, strict=False)
    assert not unexpected and not [name for name in missing if "language_model" in name or name == "lm_head.weight"]
    made.set_attn_implementation(attn)
    return vtr.patch(features_given(made).eval())


def features_given(model: Any) -> Any:
    """Let a :class:`Given` take its ``pictures`` for what tower and projector make of any pixels."""
    register_adapter(GivenAdapter())

    def features(pixel_values: Any = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=model.pictures)

    model.model.get_image_features = features
    model.generation_config.eos_token_id = None
    return model


def mark(model: Any, *used: Tensor) -> None:
    """Let a word that is none of the ``used`` ones stand for vision tokens, of which there are none yet."""
    model.pictures = []
    model.config.image_token_id = min(
        {*range(1, model.config.text_config.vocab_size)} - {t for ids in used for t in ids.flatten().tolist()}
    )


def given_prompt(
    model: Any, embeds: Tensor, vision: Tensor, mask: Tensor | None = None, used: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """Merged embeddings [rows, n, width] → what the model takes; the tokens at ``vision`` become its pictures.

    used: ids that are labels or are said later on.
    """
    mask = torch.ones(embeds.shape[:2]).bool() if mask is None else mask.bool()
    found = (embeds[:, :, None] - model.get_input_embeddings().weight).abs().amax(-1)
    assert bool((found.amin(-1)[mask & ~vision] < 1e-6).all()), "text embeddings that are no word's"
    ids = found.argmin(-1).masked_fill(~mask | vision, 0)
    mark(model, ids, *used)
    ids = ids.masked_fill(vision, model.config.image_token_id)
    model.pictures = [row[here] for row, here in zip(embeds, vision, strict=True) if here.any()]
    return {"input_ids": ids, "attention_mask": mask.long(), "pixel_values": torch.zeros(len(model.pictures), 3, 2, 2)}


class Dictated(LogitsProcessor):
    """Lets ``generate`` say the ``tokens`` [rows, steps] and nothing else."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.start
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, self.tokens[:, step : step + 1], 0.0) if step < self.tokens.shape[1] else scores


def dictate(model: Any, inputs: dict[str, Tensor], policy: Any, tokens: Tensor, **kwargs: Any) -> Any:
    """``generate`` that says ``tokens`` [rows, steps], and one more: its logits [steps + 1] follow each of them."""
    said = LogitsProcessorList([Dictated(tokens, inputs["input_ids"].shape[1])])
    return model.generate(
        **inputs, policy=policy, max_new_tokens=tokens.shape[1] + 1, do_sample=False, logits_processor=said,
        return_dict_in_generate=True, output_logits=True, **kwargs,
    )  # fmt: skip
