"""Who is measured: every policy there is, set to a mean budget, beside no reduction and input downsampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtr.eval.cost import midsize, shapes
from vtr.eval.cost.shapes import Shape

import vtr
from vtr.budget import at_share
from vtr.engine.adapters import find_adapter
from vtr.settings import policy_class
from vtr.shares import check_share, nearest_side


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


def shipped() -> list[str]:
    """Names of the policies of the model that come with vtr: those registered by its own modules."""
    own = (name for name in vtr.list_policies() if policy_class(name).__module__.startswith("vtr.policies."))
    own = (name for name in own if not issubclass(policy_class(name), vtr.InputPolicy))
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
        check_share(budget)
        for name in shipped():
            try:
                policy = at_share(name, budget, depth, shape.side)
                policy.check(depth)
                find_adapter(stock).refuse([policy])
            except (ValueError, NotImplementedError, vtr.UnsupportedError) as error:
                left_out.append({"name": name, "budget": budget, "why": str(error)})
                continue
            out.append(Contender(name, policy.spec, budget, patched, policy, shape))
        side = nearest_side(budget, shape.side)
        narrow = vtr.patch(shapes.with_side(stock, shape, side))
        fewer = shape.downsampled(side)
        out.append(Contender("downsample", f"downsample:side={side}", budget, narrow, None, fewer))
    return out, left_out
