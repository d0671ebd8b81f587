"""What official configurations and parameter names of p-MoD, Dynamic-LLaVA and M3 say about their policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vtr.base import Policy
from vtr.convert.settings import flag, integer, real, word
from vtr.policies.blind.matryoshka import Matryoshka
from vtr.policies.trained.dynamic_llava import DynamicLLaVA
from vtr.policies.trained.pmod import PMoD

State = dict[str, torch.Tensor]


def pmod(config: dict[str, Any], state: State) -> tuple[Policy, list[str]]:
    """p-MoD: routers out of ``state``, which is left with a plain LLaVA's names. Returns (policy, what was ignored).

    Raises:
        ValueError: a schedule or token type that vtr does not have, or router tensors that do not fit.
    """
    if (kind := word(config, "mod_target_token_type", default="vision_all")) != "vision_all":
        raise ValueError(
            f"mod_target_token_type={kind!r}: only 'vision_all' (all vision tokens are routed) is supported"
        )
    layers = word(config, "mod_target_layers")
    if layers is None:
        raise ValueError("the config has no mod_target_layers: this is no p-MoD checkpoint")
    settings = _schedule(layers, real(config, "mod_router_factor", default=0.5), config["num_hidden_layers"])
    made = PMoD(**settings, norm=word(config, "mod_weight_norm", default="tanh_0.2_1") or "", ties="official")
    routers: State = {}
    for name in list(state):
        parts = name.split(".")
        if ".router.router." in name and len(parts) > 3:
            routers[f"routers.{parts[2]}.{parts[-1]}"] = state.pop(name)
        elif ".decoder_layer." in name:
            state[name.replace(".decoder_layer.", ".")] = state.pop(name)
    if not flag(config, "mod_bias_enabled", default=True):
        routers |= {k.replace(".weight", ".bias"): t.new_zeros(1) for k, t in routers.items() if k.endswith(".weight")}
    made.load_tensors(routers, _sizes(config))
    return made, []


def _schedule(name: str, factor: float, depth: int) -> dict[str, Any]:
    """The settings of ``mod_target_layers``. 31 is a constant of the official code, whatever the model's depth."""
    kind, *numbers = name.split("_decay_")
    shapes = {"shiftedcos": "cosine", "shiftedlinear": "linear"}
    if kind in shapes and numbers:
        try:
            high, low = map(float, numbers[0].split("_"))
        except ValueError as error:
            raise ValueError(
                f"mod_target_layers={name!r}: two numbers are needed, as in {kind}_decay_0.85_0.15"
            ) from error
        return {"high": high, "low": low, "factor": factor, "period": 31, "shape": shapes[kind]}
    routed = {
        "deep_all": range(2, depth - 1),
        "deep_all_include_last": range(2, depth),
        "interleave": range(1, depth, 2),
    }
    if name not in routed:
        raise ValueError(f"mod_target_layers={name!r}: vtr knows {', '.join([*shapes, *routed])}")
    return {"ratios": [factor if layer in routed[name] else None for layer in range(depth)]}


def dynamic_llava(config: dict[str, Any], state: State) -> tuple[Policy, list[str]]:
    """Dynamic-LLaVA: predictors out of ``state``. Returns (policy, what was ignored).

    Raises:
        ValueError: no ``sparse_config``, an instruct predictor in use, or predictor tensors that do not fit.
    """
    sparse = config.get("sparse_config", config if "vision_keep_rate" in config else None)
    if not isinstance(sparse, Mapping):
        raise ValueError("the config has no sparse_config: this is no Dynamic-LLaVA checkpoint")
    where = "sparse_config of config.json"
    on = {
        name: flag(sparse, f"use_{name}_predictor", where, True)
        for name in ("instruct", "vision", "text", "output_text")
    }
    if not any("image_score_predictor." in name for name in state):
        raise ValueError("missing image_score_predictor: the checkpoint has no predictors, so it is no Dynamic-LLaVA's")
    if on["instruct"] and any("instruct_score_predictor" in name for name in state):
        raise ValueError("use_instruct_predictor is on: vtr does not prune the text of the prompt")
    if not on["vision"]:
        raise ValueError("use_vision_predictor is off: there is nothing to convert")
    mine = [name for name in state if "image_score_predictor." in name or "output_text_score_predictor." in name]
    known = {n for name in mine for n in state[name].shape}
    sizes = {name: integer(sparse, name, where) for name in ("d_model", "nhead", "dim_feedforward", "num_layers")}
    limits = {"d_model": known, "nhead": range(1, 1025), "dim_feedforward": known, "num_layers": range(len(mine))}
    if wrong := [name for name, n in sizes.items() if n not in limits[name]]:
        raise ValueError(f"{where}: {wrong[0]}={sizes[wrong[0]]} is not what the predictors' tensors are made of")
    made = DynamicLLaVA(
        keep=float(real(sparse, "vision_keep_rate", where)), layer=integer(sparse, "sparse_layer", where),
        forget=on["text"] and on["output_text"], width=sizes["d_model"], heads=sizes["nhead"],
        inner=sizes["dim_feedforward"], blocks=sizes["num_layers"],
    )  # fmt: skip
    ignored = sorted(name for name in state if "instruct_score_predictor." in name)
    for name in ignored:
        del state[name]
    made.load_tensors({name.removeprefix("model."): state.pop(name) for name in mine}, _sizes(config))
    return made, ignored


def m3(config: dict[str, Any], state: State) -> tuple[Policy, list[str]]:
    """M3: no weights of its own; the scale is chosen per request."""
    return Matryoshka(), []


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("hidden_size", "num_hidden_layers")}


POLICIES: dict[str, Callable[[dict[str, Any], State], tuple[Policy, list[str]]]] = {
    "pmod": pmod,
    "dynamic-llava": dynamic_llava,
    "m3": m3,
}
