"""A tiny random model of any image-text class of transformers: its default config, shrunk field by field.

What only some class needs stands in :mod:`tests.models.sizes`, as data. Sizes that could be taken for one another
differ (latents of a cache, head sizes of queries and values), and a placeholder's id is never that of a word.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

from tests.models.sizes import ANY_TEXT, CONFIGS, DEPTH, MAX_SIZE, OVER, TEXT, TOP, VISION

MERGES = re.compile(r"def (get_placeholder_mask|inputs_merger)\b")
CONTRAST = ("DiffusionGemmaForBlockDiffusion", "MllamaForConditionalGeneration")
"""Classes that do not decode token by token, or attend to images without merging them: refused, and in the table."""
TALKERS = ("Qwen2_5OmniForConditionalGeneration",)
"""Classes that are several models one behind the other: of these, the one that sees images is in the table."""


def _classes() -> tuple[str, ...]:
    """Classes that generate from ``pixel_values`` and put image features at placeholder tokens, by name.

    Read off transformers' files, so that nothing is imported.
    """
    public = set(dir(transformers))
    found = [name for name in CONTRAST if name in public]
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        source = file.read_text(encoding="utf-8")
        if not MERGES.search(source) or "pixel_values" not in source:
            continue
        for part in re.split(r"^(?=class )", source, flags=re.M)[1:]:
            name, bases = re.match(r"class (\w+)\(?([^)]*)", part).groups()  # type: ignore[union-attr]
            generates = "GenerationMixin" in bases or "ForConditionalGeneration" in bases.replace("PreTrained", "")
            generates &= not name.endswith("Model") and name not in {*found, *TALKERS}
            if generates and re.search(r"\bpixel_values\b", part) and name in public:
                found.append(name)
    return tuple(sorted(found))


CLASSES = _classes()


def _llama4(model: Any) -> None:
    """Its forward reads a field that its language model's output has only in some releases: then None."""
    model.language_model.register_forward_hook(
        lambda _, args, out: None if hasattr(out, "image_outputs") else setattr(out, "image_outputs", None)
    )


REPAIRS = {"Llama4ForConditionalGeneration": _llama4}
"""What a class needs to run at all, where a release has a mistake; done to the one model."""


class TooLarge(ValueError):
    """A config of which some field that makes it large was not shrunk."""


class StandIn(nn.Module):
    """For a tower of timm, which is another package: features of the right shape, from a picture cut in patches.

    Gives ``last_hidden_state`` as a convolutional tower does: float [images, channels, height, width].
    """

    main_input_name = "pixel_values"

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.proj = nn.Linear(3, 32)

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        patches = nn.functional.avg_pool2d(pixel_values, pixel_values.shape[-1] // 4)
        out = self.proj(patches.movedim(1, -1)).movedim(-1, 1)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=out)


@contextlib.contextmanager
def without_timm() -> Iterator[None]:
    """While it lasts, :class:`StandIn` is built wherever a tower of timm would be."""
    from transformers.models.timm_wrapper import modeling_timm_wrapper as wrapper

    built = transformers.AutoModel.from_config

    def from_config(config: Any, *args: Any, **kwargs: Any) -> Any:
        timm = getattr(config, "model_type", "") == "timm_wrapper"
        return StandIn(config) if timm else built(config, *args, **kwargs)

    with (
        mock.patch.object(transformers.AutoModel, "from_config", from_config),
        mock.patch.object(wrapper.TimmWrapperModel, "__init__", StandIn.__init__),
        mock.patch.object(wrapper.TimmWrapperModel, "forward", StandIn.forward),
    ):
        yield


class Shrink:
    """Shrinks one config; remembers which new id a placeholder's old one became."""

    def __init__(self, axes: bool) -> None:
        self.axes = axes  # whether positions have three axes, whatever the config says
        self.ids: dict[Any, int] = {}

    def __call__(self, fields: dict[str, Any], kind: str) -> dict[str, Any]:
        """The fields of a config, or of one inside it, with small sizes; ``kind``: "text", "vision" or "top"."""
        table = {"text": TEXT, "vision": VISION, "top": TOP}[kind]
        depth = fields.get("num_hidden_layers")
        out = {name: self.field(name, value, kind, table, depth) for name, value in fields.items()}
        if kind == "text":
            self.text(out)
        return out

    def field(self, name: str, value: Any, kind: str, table: dict[str, Any], depth: Any) -> Any:
        if name == "per_layer_config":
            return dict(zip((1, 3), (value or {}).values(), strict=False)) if kind == "text" else {}
        if isinstance(value, dict) and "config" in name:
            return self(value, CONFIGS.get(name, "vision"))
        if name.endswith(("token_id", "token_index", "patch_id")) and isinstance(value, int):
            special = value >= 60 or any(word in name for word in ("image", "video", "audio"))
            return self.ids.setdefault(value, 100 + len(self.ids)) if special else value
        if name in table and isinstance(value, list) == isinstance(table[name], list) and value is not None:
            return type(value)(table[name]) if isinstance(value, float) else table[name]
        if isinstance(value, list) and depth and depth > 2 and len(value) == depth:  # one value per layer
            if name in table:
                return [table[name]] * table.get("num_hidden_layers", DEPTH)
            return value[:2] if kind == "vision" else self.per_layer(value)
        return value

    def per_layer(self, values: list[Any]) -> list[Any]:
        """Each value that occurs, in turn, for as many layers as there are."""
        kinds = list({str(value): value for value in values}.values())
        return [kinds[layer % len(kinds)] for layer in range(DEPTH)]

    def text(self, out: dict[str, Any]) -> None:
        """What belongs together in a language model's config."""
        latent = bool(out.get("kv_lora_rank"))
        out.update({name: value for name, value in ANY_TEXT.items() if name in out})
        if out.get("eos_token_id") is not None:
            out["eos_token_id"] = None
        if latent:  # one key for all heads, of the size of its rotated part
            rotated = 0 if out.get("qk_rope_head_dim") == 0 else TEXT["qk_rope_head_dim"]
            out["head_dim"] = out.get("head_dim") and rotated
            if "num_key_value_heads" in out:
                out["num_key_value_heads"] = TEXT["num_attention_heads"]
        if isinstance(rope := out.get("rope_parameters"), dict):
            nested = bool(rope) and all(isinstance(value, dict) for value in rope.values())
            made = {k: self.rope(v, latent) for k, v in rope.items()} if nested else self.rope(rope, latent)
            out["rope_parameters"] = made
        if out.get("partial_rotary_factor"):
            out["partial_rotary_factor"] = 0.5

    def rope(self, given: dict[str, Any], latent: bool) -> dict[str, Any]:
        out = dict(given)
        if "partial_rotary_factor" in out:
            out["partial_rotary_factor"] = 1.0 if latent else 0.5
        if out.get("mrope_section") or self.axes:
            pairs = 4 if out.get("partial_rotary_factor") or latent else 8
            out["mrope_section"] = [pairs // 2, pairs // 4, pairs // 4]
        if out.get("xdrope_section"):
            out["xdrope_section"] = [2, 2, 2, 2]
        return out


def config_of(cls: type) -> Any:
    """The tiny config of a class."""
    made: Any = cls.config_class  # type: ignore[attr-defined]
    fields = made().to_dict()
    # the default config does not say so where the model's file does
    axes = "mrope_section" in inspect.getsource(sys.modules[cls.__module__]) or cls.__name__ in THREE_AXES
    whole = any(isinstance(value, dict) and name in CONFIGS for name, value in fields.items())
    small = Shrink(axes)(fields, "top" if whole else "text")
    for name in ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype"):
        small.pop(name, None)
    for path, value in OVER.get(cls.__name__, {}).items():
        *above, name = path.split(".")
        owner = small
        for part in above:
            owner = owner.setdefault(part, {})
        owner[name] = value
    return made(**small)


THREE_AXES = (
    "Glm46VForConditionalGeneration",
    "MiniCPMOcrForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration",
    "MiniCPMV4_7ForConditionalGeneration",
)


def build(cls: type | str, attn: str = "sdpa") -> Any:
    """A tiny model of a class in float32, in evaluation mode; the same numbers each time.

    Args:
        cls: class of transformers, or its name.
        attn: attention implementation; "eager" is taken where the class has no other.

    A test that asks for a class that this transformers does not have is skipped.

    Raises:
        TooLarge: if the shrunk config would still make a large model.
    """
    if isinstance(cls, str) and not hasattr(transformers, cls):
        pytest.skip(f"transformers {transformers.__version__} has no {cls}")
    made: Any = getattr(transformers, cls) if isinstance(cls, str) else cls
    try:
        return _build(made, attn)
    except ValueError as error:
        if "attention implementation" not in str(error) or attn == "eager":
            raise
    return _build(made, "eager")


def _build(cls: Any, attn: str) -> Any:
    with without_timm():
        torch.manual_seed(0)
        config = config_of(cls)
        config._attn_implementation = attn
        with torch.device("meta"):
            sizes = {name: p.numel() for name, p in cls(config).named_parameters()}
        if sum(sizes.values()) > MAX_SIZE:
            worst = sorted(sizes, key=sizes.__getitem__)[-3:]
            raise TooLarge(f"{cls.__name__} would have {sum(sizes.values()) / 1e6:.0f} M parameters, most in {worst}")
        torch.manual_seed(0)
        model = cls(config).float().eval()
    lively(model)
    if cls.__name__ in REPAIRS:
        REPAIRS[cls.__name__](model)
    return model


@torch.no_grad()
def lively(model: nn.Module) -> None:
    """Weights large enough that attention is not nearly flat; none that are all zero, or not numbers."""
    for weight in model.parameters():
        if not torch.isfinite(weight).all() or (weight.dim() > 1 and not weight.any()):
            nn.init.normal_(weight, std=0.02)
        if weight.dim() > 1:
            weight.mul_(3.0)


@functools.cache
def stock(name: str) -> Any:
    """The tiny model of a class, built once: for tests that do not change it."""
    return build(name)
