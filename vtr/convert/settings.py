"""The settings of an official checkpoint: each of its type, wherever and however it stands there, or words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INTEGERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
REAL = ("initializer_range", "rms_norm_eps", "rope_theta")
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
WORDS = ("hidden_act", "mm_projector_type", "mm_vision_select_feature", "mm_patch_merge_type", "image_aspect_ratio",
         "mm_vision_tower", "vision_tower", "model_type")  # fmt: skip
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
"""What nothing else says, and of which a wrong guess would not be noticed."""
NESTED = ("text_config", "llm_config", "language_config")
TEXT = (
    *INTEGERS, *REAL, "attention_bias", "mlp_bias", "hidden_act", "rope_scaling", "rope_parameters",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
OTHER_MODELS = ("qwen", "mpt", "gemma", "phi", "mixtral", "falcon", "cohere")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object without a name that stands there twice.

    Raises:
        ValueError: it is none.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
        return found

    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON object that can be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no settings: a JSON object is needed")
    return data


def integer(config: Mapping[str, Any], name: str, where: Any = "config.json", default: int | None = None) -> int:
    """The whole number ``name``, also where it is written "336", 336.0 or [336, 336].

    Raises:
        ValueError: it is missing (and has no default), or no whole number.
    """
    value = real(config, name, where, default, "a whole number")
    if value != int(value):
        raise ValueError(f"{where}: {name}={config[name]!r}, but a whole number is needed")
    return int(value)


def real(
    config: Mapping[str, Any], name: str, where: Any = "config.json", default: float | None = None,
    kind: str = "a number",
) -> float:  # fmt: skip
    """The number ``name``; as :func:`integer`."""
    given = value = config.get(name)
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        value = list(value.values())
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        value = value[0]
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"{where} lacks {name} ({kind}): copy it from the config.json of the model that was trained")
    try:
        made = value if isinstance(value, int) else float(value)
        if isinstance(value, bool) or not math.isfinite(made):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {name}={shown(given)}, but {kind} is needed") from error
    return made


def flag(config: Mapping[str, Any], name: str, where: Any = "config.json", default: bool = False) -> bool:
    """A setting that is true or false, also where it is written "true" or 1.

    Raises:
        ValueError: it is neither.
    """
    value = config.get(name)
    if value is None:
        return default
    known = {"true": True, "1": True, "false": False, "0": False}
    if (made := known.get(str(value).lower())) is None:
        raise ValueError(f"{where}: {name}={shown(value)}, but true or false is needed")
    return made


def word(config: Mapping[str, Any], name: str, where: Any = "config.json", default: str | None = None) -> str | None:
    """A setting that is a word; None if it is not there.

    Raises:
        ValueError: it is something else.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name}={shown(value)}, but a word is needed")
    return default if value is None or value.lower() in ("", "none", "null") else value


def shown(value: Any) -> str:
    """A value for a message, not too long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def clean(config: Mapping[str, Any], where: Any = "config.json") -> dict[str, Any]:
    """The settings of a LLaVA, flat, each of its own type; what is null is left out.

    Raises:
        ValueError: one is missing, of another type or out of range, or the model is no LLaMA.
    """
    found: dict[str, Any] = {}
    for nest in (*(config.get(name) for name in NESTED), config):  # what stands outside counts
        if isinstance(nest, Mapping):
            found |= {name: value for name, value in nest.items() if value is not None and name not in NESTED}
    found |= {name: integer(found, name, where) for name in INTEGERS if name in found}
    found |= {name: real(found, name, where) for name in REAL if name in found}
    found |= {name: flag(found, name, where) for name in FLAGS if name in found}
    found |= {name: word(found, name, where) for name in WORDS if name in found}
    for name in NEEDED:
        (integer if name in INTEGERS else real)(found, name, where)
    if wrong := [
        name for name in (*INTEGERS, "rms_norm_eps", "rope_theta") if name in found and not 0 < found[name] < 2**40
    ]:
        raise ValueError(f"{where}: {wrong[0]}={found[wrong[0]]!r}, but a number above 0 is needed")
    heads, kv = found["num_attention_heads"], found.get("num_key_value_heads", found["num_attention_heads"])
    if heads % kv or ("head_dim" not in found and found["hidden_size"] % heads):
        raise ValueError(f"{where}: {heads} attention heads over hidden_size={found['hidden_size']} and {kv} of keys")
    kind = (found.get("model_type") or "").lower()
    if any(other in kind for other in OTHER_MODELS):
        raise ValueError(f"{where}: model_type={kind!r} is no LLaMA, and only checkpoints on a LLaMA can be converted")
    if found.get("sliding_window") and found.get("use_sliding_window", True):
        raise ValueError(f"{where}: sliding_window={found['sliding_window']!r} has no counterpart in a LLaMA")
    for name in ("rope_scaling", "rope_parameters"):
        if name in found and not (isinstance(found[name], dict) and {"type", "rope_type"} & set(found[name])):
            raise ValueError(f"{where}: {name}={shown(found[name])}, but an object with its type is needed")
    _check_tokens(found, where)
    return found


def _check_tokens(found: dict[str, Any], where: Any) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name == "eos_token_id" and isinstance(found.get(name), list):
            found[name] = [integer({name: one}, name, where) for one in found[name]]
        elif name in found:
            found[name] = integer(found, name, where)
    if not 0 <= found.get("pad_token_id", 0) < found["vocab_size"]:
        del found["pad_token_id"]  # -1, or one behind the vocabulary, which the image's placeholder takes
