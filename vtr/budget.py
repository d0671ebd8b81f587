"""Policies set to a common budget: the mean over decoder layers of the vision tokens that enter.

So those that cut once, at every layer, or before the decoder can stand side by side.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from vtr.base import Policy
from vtr.chain import Chain, policy
from vtr.engine.adapters import find_adapter
from vtr.image import Layout
from vtr.learned import Learned
from vtr.shares import NEAR, check_share

STEPS = 200
"""Shares that are tried below a budget, until one costs no more than it."""


def at_share(what: str | Policy, share: float, num_hidden_layers: int, side: int) -> Policy:
    """A policy, set so that the mean over layers is as near to ``share`` as may be, on either side of it.

    A name alone is set as suits the budget; a policy, or a spec with settings, cuts where it says. ``side``: of a tile,
    in tokens. :func:`at_budget` stays below the budget, and needs a model instead.

    Raises:
        NotImplementedError: its class does not say how it is set to a budget.
        ValueError: it cannot be set so, or ``share`` lies not between 0 and 1.
    """
    check_share(share)
    named = isinstance(what, str) and ":" not in what and "+" not in what
    given = policy(what)
    layer = None if named else _layer(given)
    return _changed(given, type(given).settings_at(share, num_hidden_layers, side, layer))


def _layer(given: Policy) -> int | None:
    """The layer that a policy cuts in; None if it has none."""
    return 0 if getattr(given, "before_decoder", False) else getattr(given, "layer", None)


def at_budget(what: str | Policy, model: Any, mean: float = 192, total: int | None = None) -> Policy:
    """A policy, set so that at most ``mean`` vision tokens enter a decoder layer, in the mean over all of them.

    A name alone is set as suits the budget ("fastv" cuts in layer 2, or earlier where it must); of a policy or a spec
    with settings ("fastv:layer=3") only how much it keeps is changed. Which settings those are, its class says
    (:meth:`vtr.Policy.settings_at`).

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
    depth, layout = len(find_adapter(model).text_model(model).layers), typical(model)
    share = _share(mean, total, None if layout is None else len(layout))
    if share == 1:
        share = 1.0 - 1e-9  # what keeps all
    layout = _plain(16) if layout is None else layout
    most = share * len(layout) + 1e-6
    best: tuple[float, Policy] | None = None
    for one in _candidates(given, None if named else _layer(given), share, depth, layout):
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
        laid_out: Layout = anyres_layout(tuple(canvas), tuple(map(tuple, pins)), image, side)
        return laid_out
    return _plain(side)


def _plain(side: int) -> Layout:
    from vtr.integrations.llava import tile_layout

    layout: Layout = tile_layout(side, side)
    return layout


def mean_of(one: Policy, depth: int, layout: Layout) -> float:
    """The mean over layers of the tokens that enter, of a prompt with one picture of this layout.

    Raises:
        ValueError: it depends on more than sizes.
    """
    counts = one.entering_of(depth, layout)
    return sum(counts) / len(counts)


def _candidates(given: Policy, layer: int | None, share: float, depth: int, layout: Layout) -> Iterator[Policy]:
    """Policies whose means fall from about the budget on; those that cannot be are left out.

    Raises:
        ValueError: none can be, or its class does not say how it is set to a budget.
    """
    before: dict[str, Any] = {}
    failed: ValueError | None = None
    for step in range(STEPS):
        try:
            settings = type(given).settings_at(share * (1 - step / STEPS), depth, layout.grid[0], layer)
            if settings != before:
                yield _changed(given, settings)
            before = settings
        except NotImplementedError:
            own = ", ".join(given.config()) or "none"
            raise ValueError(
                f"{given.name} cannot be set to a budget: its own settings say what it keeps ({own}), or it was learnt"
            ) from None
        except ValueError as error:
            failed = failed or error
    if failed is not None and not before:
        raise ValueError(f"{given.spec} cannot be set to {share:.3f} of a prompt's tokens: {failed}") from failed


def _changed(given: Policy, changed: dict[str, Any]) -> Policy:
    made = dataclasses.replace(given, **changed)
    if isinstance(given, Learned):
        made.share(copy.copy(given))  # type: ignore[attr-defined]
    return made
