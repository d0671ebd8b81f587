"""Policies set to a common budget: the mean over decoder layers of the vision tokens that enter.

So those that cut once, at every layer, or before the decoder can stand side by side.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from vtr.base import Policy
from vtr.chain import Chain, policy
from vtr.engine.adapters import find_adapter
from vtr.image import Layout, scales
from vtr.learned import Learned
from vtr.settings import policy_class

CUT = 2
"""The layer at which policies that cut once do so (FastV's): the same tokens enter the same layers. Earlier where the
budget is so small that it must be."""
LEAST = 0.02
"""A cut that would have to leave less than this to reach a mean budget is made in an earlier layer."""
STAGE = 1 / 3
"""Stages that would have to keep less than this share of the one before begin earlier."""
NEAR = 0.6
"""A policy that can only take steps must reach this share of the budget."""
STEPS = 200
"""Shares that are tried below a budget, until one costs no more than it."""


def _four_digits(exact: float) -> float:
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


def _schedule(cls: type[Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """A keep at every layer, each the same share of the one before."""
    if budget * depth < 1 + LEAST:
        raise ValueError(f"layer 0 takes all tokens, so the mean over {depth} layers is at least {1 / depth:.3f}")
    share = share_of([1] * depth, budget)
    return {"schedule": [1.0, *(_four_digits(share**layer) for layer in range(1, depth))]}


def _stages(cls: type[Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
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


def _one_cut(cls: type[Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """One cut, in layer CUT or as much earlier as it must be; before the decoder if the policy has no layer."""
    if "layer" not in {field.name for field in dataclasses.fields(cls)}:
        return {"keep": _four_digits(budget)}
    lowest = 1 if cls.question_guided else 0
    for layer in range(CUT, lowest - 1, -1):
        if layer < depth and (keep := (budget * depth - layer) / (depth - layer)) >= LEAST:
            return {"keep": round(keep, 4), "layer": layer}
    raise ValueError(f"a cut in layer {lowest} of {depth} keeps the mean above it")


def _grid(cls: type[Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """The grid whose number of cells is nearest."""
    return {"grid": nearest_side(budget, side)}


def _tokens(cls: type[Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """The nested scale whose number of tokens is nearest, if one is near."""
    known = scales((side, side))
    nearest = min(known, key=lambda tokens: abs(tokens / side**2 - budget))
    if not NEAR < nearest / side**2 / budget < 1 / NEAR:
        raise ValueError(f"none of the nested scales {', '.join(map(str, known))} is near this share of {side**2}")
    return {"tokens": nearest}


def _retention(cls: type[Policy], budget: float, depth: int, side: int) -> dict[str, Any]:
    """The share itself."""
    return {"retention": _four_digits(budget)}


SETTERS: dict[str, Callable[[type[Policy], float, int, int], dict[str, Any]]] = {
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


def setter_of(name: str) -> Callable[[type[Policy], float, int, int], dict[str, Any]] | None:
    """How the policy ``name`` is set to a budget; None if it has none of the settings known here."""
    known = {field.name for field in dataclasses.fields(policy_class(name))}
    return next((how for setting, how in SETTERS.items() if setting in known), None)


def settings_for(name: str, budget: float, depth: int, side: int) -> dict[str, Any]:
    """The settings with which the mean over ``depth`` layers of the policy ``name`` is near ``budget``, a share.

    Raises:
        ValueError: it cannot be set so, or nothing is known about how much it keeps.
    """
    how = setter_of(name)
    if how is None:
        raise ValueError(f"it has none of the settings {', '.join(SETTERS)} to set a budget by")
    return how(policy_class(name), budget, depth, side)


# -- for a model -------------------------------------------------------------------------------------------------------
def at_budget(what: str | Policy, model: Any, mean: float = 192, total: int | None = None) -> Policy:
    """A policy, set so that at most ``mean`` vision tokens enter a decoder layer, in the mean over all of them.

    A name alone is set as suits the budget ("fastv" cuts in layer 2, or earlier where it must); of a policy or a spec
    with settings ("fastv:layer=3") only how much it keeps is changed. Which setting that is: ``keep``, ``schedule``,
    ``keeps``, ``grid``, ``tokens`` or ``retention``.

    Args:
        what: a policy's name, its spec string or a policy; one with weights keeps them.
        model: patched or not; its decoder layers and the grid of its tiles are read.
        mean: an int is a count of tokens of a typical prompt, a float in (0, 1] a share of any prompt's.
        total: the vision tokens of a typical prompt; None: of one picture that fills a tile (LLaVA-1.5, InternVL) or
            the squarest canvas of four tiles (AnyRes).

    Returns:
        A new policy. Its mean is the largest that is no more than the budget, among those its setting can have.

    Raises:
        TypeError: ``mean`` or ``total`` is no number.
        ValueError: a number out of range, a policy that has no such setting or cannot reach the budget, or a model
            whose prompts have no typical size (the message says what to give instead).
    """
    named = isinstance(what, str) and ":" not in what and "+" not in what
    given = what if isinstance(what, Policy) else policy(what)
    if isinstance(given, Chain):
        raise ValueError(f"{given.spec}: a chain has no one setting for a budget: set its parts, and join them with +")
    if setter_of(given.name) is None:
        raise ValueError(
            f"{given.name} has none of the settings {', '.join(SETTERS)}: what it keeps is set by its own ("
            f"{', '.join(given.config()) or 'none'}), or was learnt"
        )
    depth, layout = len(find_adapter(model).text_model(model).layers), typical(model)
    share = _share(mean, total, None if layout is None else len(layout))
    if share == 1:
        share = 1.0 - 1e-9  # what keeps all
    layout = _plain(16) if layout is None else layout
    most = share * len(layout) + 1e-6
    best: tuple[float, Policy] | None = None
    for one in _candidates(given, named, share, depth, layout):
        found = mean_of(one, depth, layout)
        if found <= most and (best is None or found > best[0]):
            best = found, one
            if found >= 0.995 * share * len(layout):
                break
    if best is None or best[0] < NEAR * share * len(layout):
        near = "" if best is None else f" (the nearest below, {best[1].spec}, has {best[0]:.0f} of {len(layout)})"
        raise ValueError(
            f"{given.spec} cannot be set to a mean of {share * len(layout):.0f} of {len(layout)} vision tokens over "
            f"{depth} layers{near}: give another mean{', or a smaller layer' if hasattr(given, 'layer') else ''}"
        )
    return best[1]


def _share(mean: float, total: int | None, usual: int | None) -> float:
    """``mean`` as a share of a prompt's tokens."""
    for name, value in (("mean", mean), ("total", total)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name}={value!r}: a number of tokens (int), or a share (a float in (0, 1])")
    if total is not None and (not isinstance(total, int) or total < 1):
        raise ValueError(f"total={total!r}: how many vision tokens a typical prompt has, at least 1")
    if isinstance(mean, float) and not 0 < mean <= 1:
        raise ValueError(f"mean={mean!r}: a float is a share in (0, 1]; for a count of tokens give an int, e.g. 192")
    if isinstance(mean, float):
        return mean
    if mean < 1:
        raise ValueError(f"mean={mean!r}: a count of tokens is at least 1; for a share give a float, e.g. 0.25")
    whole = total or usual
    if whole is None:
        raise ValueError(
            "how many vision tokens a picture has depends on its size in this model: give total= (the vision tokens of "
            "a typical prompt), or mean as a share, e.g. 0.25"
        )
    if mean > whole:
        raise ValueError(
            f"mean={mean}: a typical prompt of this model has {whole} vision tokens; give fewer, or total="
        )
    return mean / whole


def typical(model: Any) -> Layout | None:
    """How the tokens of a typical picture lie; None where they depend on the picture alone."""
    from vtr.integrations.llava import tile_layout
    from vtr.integrations.llava_next import anyres_layout

    config = model.config
    vision = getattr(config, "vision_config", None)
    image, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not image or not patch or find_adapter(model).family.startswith(("Qwen", "Idefics3")):
        return None
    image, patch = (n[0] if isinstance(n, (list, tuple)) else n for n in (image, patch))
    side = int(image // patch * (getattr(config, "downsample_ratio", None) or 1))
    pins = getattr(config, "image_grid_pinpoints", None)
    if pins and isinstance(pins[0], (list, tuple)):
        canvas = min(pins, key=lambda p: (abs(p[0] - p[1]), abs(p[0] * p[1] - 4 * image**2)))
        return anyres_layout(tuple(canvas), tuple(map(tuple, pins)), image, side)
    return tile_layout(side, side)


def _plain(side: int) -> Layout:
    from vtr.integrations.llava import tile_layout

    return tile_layout(side, side)


def mean_of(one: Policy, depth: int, layout: Layout) -> float:
    """The mean over layers of the tokens that enter, of a prompt with one picture of this layout.

    Raises:
        ValueError: it depends on more than sizes.
    """
    first = one.kept_of(layout) if one.asks("compress") else len(layout)
    counts = one.entering(depth, first)
    return sum(counts) / len(counts)


def _candidates(given: Policy, named: bool, share: float, depth: int, layout: Layout) -> Any:
    """Policies whose means fall from about the budget on; those that cannot be are left out."""
    side = layout.grid[0]
    known = {field.name for field in dataclasses.fields(given)}
    setting = next(name for name in SETTERS if name in known)
    if setting in ("grid", "tokens"):
        steps = range(side, 0, -1) if setting == "grid" else sorted(scales(layout.grid), reverse=True)
        for value in steps:
            yield _changed(given, {setting: value})
        return
    failed: ValueError | None = None
    for step in range(STEPS):
        part = share * (1 - step / STEPS)
        try:
            if named or setting != "keep" or "layer" not in known:
                changed = settings_for(given.name, part, depth, side)
            else:
                layer = 0 if getattr(given, "before_decoder", False) else given.layer  # type: ignore[attr-defined]
                keep = (part * depth - layer) / (depth - layer)
                changed = {"keep": _four_digits(keep)}
            if setting == "keeps" and not named:
                changed = settings_for(given.name, part, depth, side)
            yield _changed(given, changed)
        except ValueError as error:
            failed = error
            if step == 0:
                break
    if failed is not None and step == 0:
        raise ValueError(f"{given.spec} cannot be set to {share:.3f} of a prompt's tokens: {failed}") from failed


def _changed(given: Policy, changed: dict[str, Any]) -> Policy:
    made = dataclasses.replace(given, **changed)
    if isinstance(given, Learned):
        made.share(copy.copy(given))  # type: ignore[attr-defined]
    return made
