"""Sliders of a policy, made of what its class says: a new policy has them by itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtr.about import meanings_of
from vtr.base import Policy
from vtr.budget import at_share, typical
from vtr.chain import policy
from vtr.learned import Learned
from vtr.settings import policy_class

NONE = "none"
BUDGET = "budget"
MOST = 2
"""Sliders a policy has; other settings are written into its spec."""
SHARE, ALL = 0.25, 1 - 1e-9
"""Where a budget begins, and the one that keeps all."""
SIDE = 16
"""Of a tile, in tokens, where that depends on the picture."""


@dataclass(frozen=True)
class Knob:
    """A slider.

    Attributes:
        setting: what it sets; :data:`BUDGET`: the mean over layers of the share of vision tokens that enter.
        label: what stands above it. low, high, step, value: its ends, its grain, where it begins.
        whole: whether its values are ints.
    """

    setting: str
    label: str
    low: float
    high: float
    step: float
    value: float
    whole: bool = False


def knobs(name: str) -> list[Knob]:
    """The sliders of a policy, :data:`MOST` at most.

    A policy that says how it is set to a budget (:meth:`vtr.Policy.settings_at`) has one for that; others have one for
    each of their first numbers. "none", and a policy without numbers, has none.
    """
    if name == NONE:
        return []
    cls = policy_class(name)
    if has_budget(cls):
        return [Knob(BUDGET, "share of the vision tokens, mean over layers", 0.02, 1.0, 0.01, SHARE)]
    meanings = meanings_of(cls)
    found = [_knob(field, meanings.get(field.name, "")) for field in dataclasses.fields(cls) if field.init]
    return [knob for knob in found if knob is not None][:MOST]


def has_budget(cls: type[Policy]) -> bool:
    """Whether a class says how it is set to a budget, be it this one or another."""
    try:
        cls.settings_at(0.5, 32, 24)
    except NotImplementedError:
        return False
    except ValueError:
        return True
    return True


def _knob(field: dataclasses.Field[Any], meaning: str) -> Knob | None:
    """Of a number: shares go to 1, others to four times their default. None: its default is no number."""
    value, label = field.default, f"{field.name}: {meaning}" if meaning else field.name
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int):
        return Knob(field.name, label, 1, max(4 * value, 8), 1, max(value, 1), whole=True)
    high = 1.0 if value <= 1 else 4 * value
    return Knob(field.name, label, 0.005 * high, high, 0.005 * high, value)


def first_spec(name: str, model: Any, weights: str = "pocket") -> str:
    """Where a panel begins that shows this policy: its sliders as they are, or its example where they cannot be so."""
    try:
        return spec_at(name, [knob.value for knob in knobs(name)], model, weights)
    except ValueError:
        return _example(name, weights)


def spec_at(name: str, values: Sequence[float], model: Any, weights: str = "pocket") -> str:
    """The spec string of a policy whose sliders stand at ``values``; all else is as by default. A budget that it can
    only take steps to is the nearest one on either side.

    Args:
        model: patched; of a budget, its layers and tiles are read. weights: of policies that have some, a shipped name.

    Raises:
        ValueError: it cannot be set so; the message says what to do.
    """
    if name == NONE:
        return NONE
    found, example = knobs(name), _example(name, weights)
    if found and found[0].setting == BUDGET:
        layout, share = typical(model), min(float(values[0]), ALL)
        what = policy(example) if issubclass(policy_class(name), Learned) else name
        return at_share(what, share, len(model.get_decoder().layers), SIDE if layout is None else layout.grid[0]).spec
    written = [
        f"{knob.setting}={json.dumps(round(value) if knob.whole else round(float(value), 4))}"
        for knob, value in zip(found, values, strict=False)
    ]
    return policy(",".join([example, *written])).spec


def _example(name: str, weights: str) -> str:
    cls = policy_class(name)
    return f"{name}:weights={weights}" if issubclass(cls, Learned) else cls.example()
