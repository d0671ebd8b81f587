"""What is compared: policies by spec string, no reduction, input downsampling; and one of each at a common budget."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtr.eval import blind  # noqa: F401  (registers the question-blind selector)
from vtr.eval.downsample import NAME, Downsample

import vtr
from vtr.policies.matryoshka import scales

NONE = "none"
ALL = "all"
BUDGET = 0.25
CUT = 2
"""The layer at which policies of ``all`` that cut once do so (FastV's): the same tokens enter the same layers."""
FIRST = (NONE, "random", "uniform", "pool", NAME)
"""What ``all`` begins with: no reduction and the baselines every policy has to beat."""
FLOOR = 0.02


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        policy: None for no reduction. downsample: what happens to pictures before the processor, or None.
    """

    spec: str
    name: str
    policy: vtr.Policy | None = None
    downsample: Downsample | None = None


@dataclass(frozen=True)
class Shapes:
    """What budgets depend on: decoder layers, and patches along a tile's side."""

    layers: int
    side: int

    @classmethod
    def of(cls, model: Any) -> Shapes:
        """Of a model whose vision tower has square patches."""
        vision = model.config.vision_config
        size, patch = (n[0] if isinstance(n, (list, tuple)) else n for n in (vision.image_size, vision.patch_size))
        shrink = getattr(model.config, "downsample_ratio", 1)
        return cls(len(model.get_decoder().layers), int(size // patch * shrink))


def contender(spec: str) -> Contender:
    """The contender of a spec: ``none``, a policy's, ``downsample:scale=0.5``, or ``downsample:scale=0.5+POLICY``.

    Raises:
        TypeError, ValueError: no such policy, or settings it refuses.
    """
    spec = spec.strip()
    if spec == NONE:
        return Contender(NONE, NONE)
    head, _, rest = spec.partition("+")
    name, _, settings = head.partition(":")
    if name != NAME:
        policy = vtr.policy(spec)
        return Contender(policy.spec, policy.name, policy)
    key, _, value = settings.partition("=")
    if settings and key != "scale":
        raise ValueError(f"{NAME} has no setting {key!r}; it has: scale, e.g. {NAME}:scale=0.5")
    try:
        smaller = Downsample(float(value)) if settings else Downsample()
    except ValueError as error:
        raise ValueError(f"{head!r}: {error}") from error
    more = vtr.policy(rest) if rest else None
    return Contender(smaller.spec + (f"+{more.spec}" if more else ""), NAME, more, smaller)


def contenders(
    specs: Sequence[str], shapes: Shapes, budget: float = BUDGET
) -> tuple[list[Contender], list[Contender], dict[str, str]]:
    """No reduction first, then what ``specs`` name.

    Args:
        specs: each one or several specs joined by ``;``; ``all`` is one per registered policy, at ``budget``.

    Returns:
        All of them; those of them that only ``all`` named; and why registered policies were left out of ``all``.

    Raises:
        TypeError, ValueError: an unknown policy, one that cannot work on this model, the same one twice.
    """
    found, left_out = [Contender(NONE, NONE)], dict[str, str]()
    only_all: list[Contender] = []
    for spec in (part.strip() for text in specs for part in text.split(";") if part.strip()):
        if spec == ALL:
            more, left_out = at_budget(budget, shapes)
            more = [one for one in more if one not in found]
            only_all += more
        else:
            more = [contender(spec)] if spec != NONE else []
        found += more
    for one in found:
        if one.policy is not None:
            one.policy.check(shapes.layers)
    names = [one.spec for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} is there twice: name each policy once")
    return found, only_all, left_out


def at_budget(budget: float, shapes: Shapes) -> tuple[list[Contender], dict[str, str]]:
    """One contender per registered policy, and why others are left out.

    Raises:
        ValueError: a budget that leaves nothing behind the first layers.
    """
    if not isinstance(budget, float) or not CUT / shapes.layers < budget < 1:
        raise ValueError(
            f"budget={budget}: it is the mean share of vision tokens that enters a layer; the first {CUT} of "
            f"{shapes.layers} layers see all of them, so it lies between {CUT / shapes.layers:.2f} and 1"
        )
    registered = [name for name in vtr.list_policies() if name != vtr.Chain.name]
    order = [name for name in FIRST if name in registered or name == NAME]
    made, left_out = [], {}
    for name in order + [name for name in registered if name not in FIRST]:
        try:
            spec = Downsample(round(budget**0.5, 4)).spec if name == NAME else spec_at(name, budget, shapes)
            one = contender(spec)
            if one.policy is not None:
                one.policy.check(shapes.layers)
            made.append(one)
        except (TypeError, ValueError, OSError) as error:
            left_out[name] = str(error)
    return made, left_out


def spec_at(name: str, budget: float, shapes: Shapes) -> str:
    """The spec of policy ``name`` under which a mean share of ``budget`` of the vision tokens enters a layer.

    Found by the settings the policy has: a ``schedule`` of all layers, ``keeps`` of stages, ``keep`` (cut at layer
    :data:`CUT` if it has a ``layer``), a ``grid`` of a tile, ``tokens`` of nested scales (the nearest one),
    ``retention``. A policy with none of them gets its defaults, and the table shows what it keeps by itself.
    """
    from vtr.registry import policy_class

    settings = {field.name for field in dataclasses.fields(policy_class(name))}
    if "schedule" in settings:
        return f"{name}:schedule={_json(staircase(budget, shapes.layers))}"
    if {"keeps", "layers"} <= settings:
        return "{}:keeps={},layers={}".format(name, *map(_json, stages(budget, shapes.layers)))
    if {"keep", "layer"} <= settings:
        return f"{name}:keep={_after(budget, shapes.layers)},layer={CUT}"
    if "keep" in settings:
        return f"{name}:keep={budget}"
    if "grid" in settings:
        return f"{name}:grid={max(1, round(shapes.side * budget**0.5))}"
    if "tokens" in settings:
        known = scales((shapes.side, shapes.side))
        return f"{name}:tokens={min(known, key=lambda tokens: abs(tokens / shapes.side**2 - budget))}"
    if "retention" in settings:
        return f"{name}:retention={budget}"
    return name


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _after(budget: float, layers: int) -> float:
    """What to keep from layer :data:`CUT` on, so that the mean over all layers is ``budget``."""
    return round((budget * layers - CUT) / (layers - CUT), 4)


def stages(budget: float, layers: int) -> tuple[list[float], list[int]]:
    """Three stages, each half of the one before, the first at layer :data:`CUT`, the others evenly behind it."""
    begins = [CUT + (layers - CUT) * i // 3 for i in range(3)]
    spans = [end - begin for begin, end in zip(begins, [*begins[1:], layers], strict=True)]
    first = (budget * layers - CUT) / sum(span / 2**i for i, span in enumerate(spans))
    return [round(min(first / 2**i, 1.0), 4) for i in range(3)], begins


def staircase(budget: float, layers: int) -> list[float]:
    """A keep per layer: all up to layer :data:`CUT`, then each the same share of the one before, none below 2 %."""
    floor = min(FLOOR, _after(budget, layers))

    def keeps(ratio: float) -> list[float]:
        return [round(max(ratio ** max(layer - CUT + 1, 0), floor), 4) for layer in range(layers)]

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(keeps(middle)) < budget * layers else (low, middle)
    return keeps(low)
