"""Policies set to a common budget: the mean over decoder layers of the share of an image's tokens that enters.

So those that cut once, at every layer, or before the decoder can stand side by side, in ``vtr eval`` and ``vtr bench``.
"""

from __future__ import annotations

import vtr
from vtr.budget import LEAST, nearest_side, setter_of, settings_for
from vtr.settings import policy_class

__all__ = ["at_budget", "check_budget", "nearest_side", "setter_of", "trained"]


def check_budget(budget: float) -> None:
    """Raise ValueError unless a budget lies between 0 and 1."""
    if not 0 < budget < 1:
        raise ValueError(f"budget={budget!r} is the mean share of tokens that stays: choose one between 0 and 1")


def at_budget(name: str, budget: float, depth: int, side: int) -> vtr.Policy:
    """The policy ``name``, set so that the mean over ``depth`` decoder layers is ``budget`` (of side × side tiles).

    As near as may be, on either side; :func:`vtr.at_budget` stays below.

    Raises:
        ValueError: it cannot be set so, or nothing is known about how much it keeps.
    """
    check_budget(budget)
    return policy_class(name)(**settings_for(name, budget, depth, side))


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
