"""Every policy, set up for models with random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vtr.eval.cost.contenders import shipped

import vtr
from vtr.budget import at_share
from vtr.learned import Learned
from vtr.settings import policy_class

TIMED = ("fastv", "gsearch", "pyramid", "m3", "globalcom2", "pmod", "dynamic-llava")
"""What is timed at a mean keep."""


def drawn(policy: Learned, hidden_size: int, layers: int, seed: int = 0) -> Any:
    """``policy`` with random weights, the same on every machine, large enough to decide one way and the other."""
    policy.start(hidden_size, layers)
    made, module = torch.Generator().manual_seed(seed), policy.module
    assert module is not None
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() == 2:
                weight.normal_(std=2 / weight.shape[1] ** 0.5, generator=made)
    module.requires_grad_(False).eval()
    return policy


def tiny_policies(hidden_size: int, layers: int = 5) -> dict[str, vtr.Policy]:
    """One or several of every policy there is, for a model of five layers and 9 or 36 tokens a tile.

    What is not set by hand keeps about two fifths.
    """
    pmod, dynamic = vtr.PMoD(high=0.9), vtr.DynamicLLaVA(keep=0.4, layer=1, width=16, heads=2, inner=24)
    out: dict[str, vtr.Policy] = {
        "fastv": vtr.FastV(0.5, layer=2),
        "gsearch": vtr.GSearch([1.0, 0.8, 0.5, 0.3, 0.2]),
        "pyramid": vtr.Pyramid(),
        "pyramid, positions kept": vtr.Pyramid(positions="keep"),
        "random": vtr.Random(0.5, layer=2),
        "uniform": vtr.UniformGrid(0.25, layer=1),
        "uniform, before the decoder": vtr.UniformGrid(0.25, before_decoder=True),
        "pool": vtr.Pool(grid=3),
        "cls": vtr.ClsTop(0.3),
        "m3": vtr.Matryoshka(9),
        "globalcom2": vtr.GlobalCom2(retention=0.3),
        "pmod": drawn(pmod, hidden_size, layers),
        "dynamic-llava": drawn(dynamic, hidden_size, layers),
        "autoscale": vtr.AutoScale(threshold=0.5),
        "a chain": vtr.policy("pool:grid=3+fastv:keep=0.5"),
    }
    classes = {name: policy_class(name) for name in shipped() if name not in {p.name for p in out.values()}}
    return out | {name: _at(cls, 0.4, layers) for name, cls in classes.items()}


def _at(cls: Any, share: float, layers: int) -> Any:
    """Set to a mean share, or as it is by default where it cannot be."""
    try:
        return cls(**cls.settings_at(share, layers, 3))
    except (NotImplementedError, ValueError):
        return cls()


def timed_policies(
    hidden_size: int, layers: int, side: int, narrow: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Policies at means of a third and of a ninth, and FastV that keeps all.

    Args:
        side: vision tokens along a side of a tile. narrow: Dynamic-LLaVA's predictors are small.

    Returns:
        Label → policy, and label → why it cannot be set so.
    """
    made: dict[str, Any] = {"fastv 100 %": vtr.FastV(1.0, layer=2)}
    left: dict[str, str] = {}
    for words, share in (("33 %", 0.33), ("11 %", 0.11)):
        for name in TIMED:
            try:
                made[f"{name} {words}"] = weighted(at_share(name, share, layers, side), hidden_size, layers, narrow)
            except (ValueError, NotImplementedError) as error:
                left[f"{name} {words}"] = str(error)
    made["pmod"] = drawn(vtr.PMoD(), hidden_size, layers)  # how many pass is what it was trained for
    return made, left


def weighted(policy: Any, hidden_size: int, layers: int, narrow: bool) -> Any:
    """With random weights, if it has any.

    Raises:
        ValueError: the model has too few layers for it.
    """
    if isinstance(policy, vtr.DynamicLLaVA) and narrow:
        policy = dataclasses.replace(policy, width=16, heads=2, inner=24)
    policy = drawn(policy, hidden_size, layers) if isinstance(policy, Learned) else policy
    policy.check(layers)
    return policy


def mix(policies: dict[str, Any]) -> list[Any]:
    """Eight rows as a server may get them together: one unreduced, seven policies at a third, or FastV at a ninth."""
    own = [policy for label, policy in policies.items() if label.endswith(("33 %", "pmod"))]
    more = [policies[label] for label in ("fastv 11 %", "fastv 100 %") if label in policies]
    return [None, *own, *more][:8]
