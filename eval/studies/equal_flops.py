"""Policies set to a common cost: decoder prefill FLOPs as a ratio to no reduction, worked out on given prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import vtr
from vtr.search import Cost

CUT = 2
"""FastV's layer, and the baselines'; earlier where the ratio is so small that it must be."""
LEAST = 0.01
STAGE = 1 / 3
"""Pyramid's stages begin earlier if each would have to keep less than this share of the one before."""
STEPS = 50


def dearest(make: Callable[[float], Sequence[float]], ratio: float, cost: Cost) -> float | None:
    """The largest share in (0, 1] whose schedule costs at most ``ratio``; None if there is none.

    Args:
        make: share → keeps of all layers; costs must grow with the share.
    """
    low, high = 0.0, 1.0
    if cost.ratio(make(high), "flops") <= ratio:
        return high
    for _ in range(STEPS):
        share = (low + high) / 2
        low, high = (share, high) if cost.ratio(make(share), "flops") <= ratio else (low, share)
    return low if cost.ratio(make(max(low, 1e-6)), "flops") <= ratio and low > 0 else None


def one_cut(ratio: float, cost: Cost) -> tuple[float, int]:
    """(keep, layer) of a single cut: in layer :data:`CUT`, or as much earlier as it must be.

    Raises:
        ValueError: not even a cut in layer 1 reaches the ratio.
    """
    depth = cost.geometry.num_hidden_layers
    for layer in range(min(CUT, depth - 1), 0, -1):
        keep = dearest(lambda share, at=layer: [1.0] * at + [max(share, 1e-6)] * (depth - at), ratio, cost)  # type: ignore[misc]
        if keep is not None and keep >= LEAST:
            return round(keep - 5e-5, 4), layer
    raise ValueError(f"a cut in layer 1 of {depth} costs more than {ratio:.3f}")


def stages(ratio: float, cost: Cost) -> tuple[list[float], list[int]]:
    """(keeps, layers) of three stages, each the same share of the one before; the earlier, the smaller the ratio.

    Raises:
        ValueError: no three stages in so many layers reach the ratio.
    """
    depth, found = cost.geometry.num_hidden_layers, list[tuple[float, list[int]]]()
    for parts in (4, 8, 16, 32):
        layers = [depth * (stage + 1) // parts for stage in range(3)]
        if len({0, *layers}) == 4 and (share := dearest(lambda s, at=layers: _stairs(s, at, depth), ratio, cost)):  # type: ignore[misc]
            found.append((share, layers))
    late = [one for one in found if one[0] >= STAGE]
    if not found:
        raise ValueError(f"no three stages in {depth} layers cost {ratio:.3f}")
    share, layers = late[0] if late else max(found)
    return [round(share**stage - 5e-5, 4) for stage in (1, 2, 3)], layers


def _stairs(share: float, layers: Sequence[int], depth: int) -> list[float]:
    return [max(share ** sum(layer >= begin for begin in layers), 1e-6) for layer in range(depth)]


def baselines(ratio: float, cost: Cost) -> dict[str, vtr.Policy]:
    """FastV, Pyramid, and tokens spread evenly over the picture, each at this cost (or a little less); by name.

    One that cannot cost so little is left out.
    """
    makers: dict[str, Callable[[], vtr.Policy]] = {
        "FastV": lambda: vtr.FastV(*one_cut(ratio, cost)),
        "Pyramid": lambda: vtr.Pyramid(*stages(ratio, cost)),
        "uniform": lambda: vtr.UniformGrid(*one_cut(ratio, cost)),
    }
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ValueError:
            continue
    return found
