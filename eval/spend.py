"""Policies set to a common budget: the mean over decoder layers of the share of an image's tokens that enters.

So those that cut once, at every layer, or before the decoder can stand side by side, in ``vtr eval`` and ``vtr bench``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import vtr
from vtr.image import scales
from vtr.registry import policy_class

CUT = 2
"""The layer at which policies that cut once do so (FastV's): the same tokens enter the same layers. Earlier where the
budget is so small that it must be."""
LEAST = 0.02
"""A cut that would have to leave less than this to reach a mean budget is made in an earlier layer."""
STAGE = 1 / 3
"""Stages that would have to keep less than this share of the one before begin earlier."""


def _share(exact: float) -> float:
    """A ratio in four digits, never rounded to nothing."""
    return max(round(exact, 4), 0.0001)


def share_of(spans: Sequence[int], budget: float) -> float:
    """Each span of layers keeps the same share of the one before, the first all: the share whose mean is the budget."""
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        mean = sum(span * share**step for step, span in enumerate(spans)) / sum(spans)
        low, high = (share, high) if mean < budget else (low, share)
    return low


def _schedule(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """A keep at every layer, each the same share of the one before."""
    if budget * depth < 1 + LEAST:
        raise ValueError(f"layer 0 takes all tokens, so the mean over {depth} layers is at least {1 / depth:.3f}")
    share = share_of([1] * depth, budget)
    return {"schedule": [1.0, *(_share(share**layer) for layer in range(1, depth))]}


def _stages(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """Three stages, each the same share of the one before; the earlier, the smaller the budget."""
    found: list[tuple[float, list[int]]] = []
    for parts in (4, 8, 16, 32):
        layers = [depth * (stage + 1) // parts for stage in range(3)]
        spans = [b - a for a, b in zip([0, *layers], [*layers, depth], strict=True)]
        if all(spans):
            found.append((share_of(spans, budget), layers))
    late = [stage for stage in found if stage[0] >= STAGE]
    share, layers = late[0] if late else max(found, default=(0.0, []))
    if share**3 < LEAST**1.5:
        raise ValueError(f"no three stages in {depth} layers have this mean")
    return {"keeps": [round(share**stage, 4) for stage in (1, 2, 3)], "layers": layers}


def _one_cut(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """One cut, in layer CUT or as much earlier as it must be; before the decoder if the policy has no layer."""
    if "layer" not in {field.name for field in dataclasses.fields(cls)}:
        return {"keep": _share(budget)}
    lowest = 1 if cls.question_guided else 0
    for layer in range(CUT, lowest - 1, -1):
        if layer < depth and (keep := (budget * depth - layer) / (depth - layer)) >= LEAST:
            return {"keep": round(keep, 4), "layer": layer}
    raise ValueError(f"a cut in layer {lowest} of {depth} keeps the mean above it")


def _grid(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """The grid whose number of cells is nearest."""
    return {"grid": nearest_side(budget, side)}


def _tokens(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """The nested scale whose number of tokens is nearest, if one is near."""
    known = scales((side, side))
    nearest = min(known, key=lambda tokens: abs(tokens / side**2 - budget))
    if not 0.6 < nearest / side**2 / budget < 1 / 0.6:
        raise ValueError(f"none of the nested scales {', '.join(map(str, known))} is near this share of {side**2}")
    return {"tokens": nearest}


def _retention(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """The share itself."""
    return {"retention": _share(budget)}


SETTERS: dict[str, Callable[[type[vtr.Policy], float, int, int], dict[str, Any]]] = {
    "schedule": _schedule,
    "keeps": _stages,
    "grid": _grid,
    "tokens": _tokens,
    "retention": _retention,
    "keep": _one_cut,
}
"""The setting that says how much a policy keeps → how it is set. The first that a policy has is taken."""


def nearest_side(budget: float, side: int) -> int:
    """The side of the square with a share of ``side`` × ``side`` tokens nearest to the budget, at least 1."""
    exact = side * math.sqrt(budget)
    return max(min((math.floor(exact), math.ceil(exact)), key=lambda s: abs((s / side) ** 2 - budget)), 1)


def check_budget(budget: float) -> None:
    """Raise ValueError unless a budget lies between 0 and 1."""
    if not 0 < budget < 1:
        raise ValueError(f"budget={budget!r} is the mean share of tokens that stays: choose one between 0 and 1")


def setter_of(name: str) -> Callable[[type[vtr.Policy], float, int, int], dict[str, Any]] | None:
    """How the policy ``name`` is set to a budget; None if it has none of the settings known here."""
    known = {field.name for field in dataclasses.fields(policy_class(name))}
    return next((how for setting, how in SETTERS.items() if setting in known), None)


def at_budget(name: str, budget: float, depth: int, side: int) -> vtr.Policy:
    """The policy ``name``, set so that the mean over ``depth`` decoder layers is ``budget`` (of side × side tiles).

    Raises:
        ValueError: it cannot be set so, or nothing is known about how much it keeps.
    """
    check_budget(budget)
    how = setter_of(name)
    if how is None:
        raise ValueError(f"it has none of the settings {', '.join(SETTERS)} to set a budget by")
    cls = policy_class(name)
    return cls(**how(cls, budget, depth, side))


def trained(name: str, weights: str, budget: float, depth: int) -> vtr.Policy:
    """A policy with weights: its keep set so that the mean is ``budget`` where it cuts once, else as it was trained.

    Raises:
        ValueError: its layer is too deep for the budget. FileNotFoundError: there are no such weights.
    """
    policy = vtr.policy(f"{name}:weights={weights}")
    layer = getattr(policy, "layer", None)
    if layer is None or not hasattr(policy, "keep"):
        return policy
    keep = (budget * depth - layer) / (depth - layer)
    if keep < LEAST:
        raise ValueError(f"its cut in layer {layer} of {depth} keeps the mean above {budget}")
    return vtr.policy(f"{name}:weights={weights},keep={keep:.4f}")
