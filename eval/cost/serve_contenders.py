"""Who is compared behind a server (``vtr bench serve``): what the requests of a load ask for, in turn."""

from __future__ import annotations

from collections.abc import Sequence

import vtr
from vtr.budget import at_share
from vtr.limits import short

NONE = "none"
CONTENDERS: dict[str, list[str]] = {
    NONE: [NONE],
    "fixed": ["m3:tokens=36"],
    "mixed": [NONE, "m3:tokens=36", 'globalcom2:retention=0.25,budget="exact"', "m3:tokens=9"],
}
"""On any server. "mixed": what a server gets whose clients choose."""
FASTV, PYRAMID = "fastv:keep=0.25,layer=2", "pyramid:positions=keep"
SIDE = 24
"""Of a tile, in tokens: G-Search's schedule does not depend on it."""


def inside(depth: int) -> dict[str, list[str]]:
    """Policies inside a decoder of ``depth`` layers, beside one before it of FastV's mean budget.

    G-Search is set to that budget too: a keep that falls in equal steps, a cut at every layer. PyramidDrop has the
    stages of its paper, which keep more.

    Raises:
        ValueError: too few layers.
    """
    from vtr.integrations.vllm.specs import mean_keep, same_budget

    share = mean_keep(vtr.policy(FASTV), depth)
    if depth < 5 or share is None:
        raise ValueError(f"a decoder of {depth} layers is too shallow for policies inside it: 5 at least")
    before, falling = same_budget(share), at_share("gsearch", share, depth, SIDE).spec
    return {
        NONE: [NONE], "before": [before], "fastv": [FASTV], "gsearch": [falling], "pyramid": [PYRAMID],
        "mixed": [NONE, before, FASTV, falling],
    }  # fmt: skip


def named(given: Sequence[str]) -> dict[str, list[str]]:
    """Contenders of one's own behind ``none``: ``fastv:keep=0.5,layer=2``, or ``mine=none;pool:grid=6`` with a name.

    Raises:
        ValueError: no specs, or two of one name.
    """
    found: dict[str, list[str]] = {NONE: [NONE]}
    for one in given:
        name, equals, rest = one.partition("=")
        if not equals or not name.replace("-", "").replace("_", "").replace(" ", "").isalnum():
            name, rest = one.split(";")[0].partition(":")[0].strip(), one
        specs = [spec.strip() for spec in rest.split(";") if spec.strip()]
        if not specs:
            raise ValueError(
                f"--policy {short(one)}: write NAME=SPEC, or specs joined by ; which requests ask for in turn"
            )
        if specs == [NONE]:
            continue
        if name in found:
            raise ValueError(f"--policy {short(one)}: there is a {name!r} already: give it a name, as in mine=SPEC")
        found[name] = specs
    return found
