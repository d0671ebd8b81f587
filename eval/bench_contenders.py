"""Who is measured: every policy there is, set to a mean budget, beside no reduction and input downsampling.

A budget is the mean over decoder layers of the share of an image's tokens that enters, so that policies that cut once,
at every layer, or before the decoder can stand side by side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtr.eval import midsize, shapes
from vtr.eval.shapes import Shape

import vtr
from vtr.policies.matryoshka import scales
from vtr.registry import policy_class

LEAST = 0.02
"""A cut that would have to leave less than this to reach a mean budget is made in an earlier layer."""


@dataclass(frozen=True, eq=False)
class Contender:
    """A patched model, what to run it under, and the shape of its prompts.

    Attributes:
        name: of the policy, "none" or "downsample". spec: with its settings. budget: the mean it is set to, or None.
    """

    name: str
    spec: str
    budget: float | None
    model: Any
    policy: vtr.Policy | None
    shape: Shape

    def prompts(self, rows: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
        """A batch; each row: images, text tokens."""
        return shapes.prompts(self.model, self.shape, rows, seed)


# -- a policy at a budget ----------------------------------------------------------------------------------------------
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
    return {"schedule": [1.0, *(max(round(share**layer, 4), 0.0001) for layer in range(1, depth))]}


def _stages(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """Three stages, each the same share of the one before; the earlier, the smaller the budget."""
    for parts in (4, 8, 16, 32):
        layers = [depth * (stage + 1) // parts for stage in range(3)]
        spans = [b - a for a, b in zip([0, *layers], [*layers, depth], strict=True)]
        if not all(spans):
            break
        share = share_of(spans, budget)
        if share**3 >= LEAST**1.5:
            return {"keeps": [round(share**stage, 4) for stage in (1, 2, 3)], "layers": layers}
    raise ValueError(f"no three stages in {depth} layers have this mean")


def _one_cut(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """One cut, in the policy's own layer or as much earlier as it must be."""
    own = getattr(cls, "layer", None)  # a dataclass leaves its defaults on the class
    if own is None:
        return {"keep": round(budget, 4)}
    lowest = 1 if cls.question_guided else 0
    for layer in range(own, lowest - 1, -1):
        if layer < depth and (keep := (budget * depth - layer) / (depth - layer)) >= LEAST:
            return {"keep": round(keep, 4), "layer": layer}
    raise ValueError(f"a cut in layer {lowest} of {depth} keeps the mean above it")


def _grid(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """The grid whose number of cells is nearest."""
    return {"grid": nearest_side(budget, side)}


def _tokens(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """The nested scale whose number of tokens is nearest."""
    return {"tokens": min(scales((side, side)), key=lambda tokens: abs(tokens / side**2 - budget))}


def _retention(cls: type[vtr.Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """The share itself."""
    return {"retention": round(budget, 4)}


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


def at_budget(name: str, budget: float, depth: int, side: int) -> vtr.Policy:
    """The policy ``name``, set so that the mean over ``depth`` decoder layers is ``budget`` (of side × side tiles).

    Raises:
        ValueError: it cannot be set so, or nothing is known about how much it keeps.
    """
    check_budget(budget)
    cls = policy_class(name)
    known = {field.name for field in dataclasses.fields(cls)}
    for setting, how in SETTERS.items():
        if setting in known:
            return cls(**how(cls, budget, depth, side))
    raise ValueError(f"it has none of the settings {', '.join(SETTERS)} to set a budget by")


def shipped() -> list[str]:
    """Names of the policies that come with vtr: those registered by its own modules."""
    own = (name for name in vtr.list_policies() if policy_class(name).__module__.startswith("vtr.policies."))
    order = ["random", "uniform", "pool"]
    return sorted(own, key=lambda name: (order.index(name) if name in order else len(order), name))


# -- all of them -------------------------------------------------------------------------------------------------------
def contenders(
    stock: Any, shape: Shape, budgets: Sequence[float], specs: Sequence[str] = ()
) -> tuple[list[Contender], list[dict[str, Any]]]:
    """No reduction, and all shipped policies and input downsampling at every budget, or the policies of ``specs``.

    Args:
        stock: the unpatched model, of ``shape``. The contenders are on its weights.

    Raises:
        ValueError: a budget that is none, or a spec that is no policy of this model.

    Returns:
        The contenders, and {"name", "budget", "why"} of what cannot be set to a budget.
    """
    depth, patched = shape.text["num_hidden_layers"], vtr.patch(midsize.twin(stock))
    out, left_out = [Contender("none", "none", None, patched, None, shape)], []
    for spec in specs:
        policy = vtr.policy(spec)
        policy.check(depth)
        out.append(Contender(spec.split(":")[0], policy.spec, None, patched, policy, shape))
    for budget in () if specs else budgets:
        check_budget(budget)
        for name in shipped():
            try:
                policy = at_budget(name, budget, depth, shape.side)
            except ValueError as error:
                left_out.append({"name": name, "budget": budget, "why": str(error)})
                continue
            out.append(Contender(name, policy.spec, budget, patched, policy, shape))
        side = nearest_side(budget, shape.side)
        narrow = vtr.patch(shapes.with_side(stock, shape, side))
        fewer = shape.downsampled(side)
        out.append(Contender("downsample", f"downsample:side={side}", budget, narrow, None, fewer))
    return out, left_out
