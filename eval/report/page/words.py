"""What the page says in words: what was measured, what came out, and what these numbers cannot tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from vtr.eval.report.page.cells import number, points
from vtr.eval.report.page.data import BASELINES, Result, unreduced

MARGIN = 0.02
"""A policy is called as good as none where the interval of its difference stays above minus this."""


def headline(found: Sequence[Result]) -> str:
    """The page's title: the question that its first screen answers."""
    if any(result.kind == "eval" for result in found):
        return "Which vision-token policy, and what does it gain?"
    return "Vision-token reduction: what it costs"


def name(result: Result, evals: Sequence[Result]) -> str:
    """What tells a leaderboard from the page's others: model and questions, and the file where these are the same."""
    if result.kind != "eval":
        return ""
    mine, *others = (f"{one.model}, {one.shown:,} questions of {one.task}" for one in (result, *evals))
    return mine + (f" ({result.path.stem})" if others.count(mine) > 1 else "")


def within() -> str:
    """The margin in words."""
    return f"within {100 * MARGIN:g} points of no reduction"


def facts(result: Result) -> list[tuple[str, str]]:
    """The numbers that every policy is read against."""
    data, reference = result.data["data"], result.data["reference"]
    kinds = len(data.get("kinds") or [])
    out = [(f"{data['samples']:,}", f"questions of {data['name']}" + (f", {kinds} kinds" if kinds > 1 else ""))]
    named = {
        "none": "right with all vision tokens",
        "no_image": "right without an image (MMStar’s S_wv)",
        "gray": "right with a gray picture",
        "base_lm": "right by the base language model, without an image (MMStar’s S_t)",
        "majority": "right by the most frequent answer",
    }
    out += [(f"{100 * reference[k]:.1f}%", text) for k, text in named.items() if reference.get(k) is not None]
    none = unreduced(result)
    if none is not None and none.get("gain") is not None:
        leaked, what = none.get("leakage"), "multi-modal leakage (S_wv − S_t)"
        out.append((points(none["gain"]), "points of multi-modal gain without reduction (S_v − S_wv)"))
        out.append(("–", f"{what}: needs --base-lm") if leaked is None else (points(leaked), f"points of {what}"))
    return out


def breakable(spec: str) -> Markup:
    """A spec that may be broken after its marks, not within its words."""
    return Markup("").join(part + Markup("<wbr>") if part in ":,+_" else part for part in re.split("([:,+_])", spec))


def cheapest(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The policy with the fastest prefill (the fewest FLOPs if any was not timed) as good as none within the margin."""
    good = [row for row in rows if row.get("versus_none") and row["versus_none"]["low"] >= -MARGIN]
    timed = all(row["prefill_ms"] for row in good)
    return min(good, key=lambda row: row["prefill_ms"]["median"] if timed else row["gflops"], default=None)


def finding(result: Result) -> list[Markup]:
    """What came out, as sentences."""
    none = unreduced(result)
    cuts = [row for row in result.rows if row["name"] != "none"]
    best = cheapest([row for row in cuts if row["name"] not in BASELINES])
    plain = cheapest([row for row in cuts if row["name"] in BASELINES])
    named = Markup(" <code>{}</code>: {}.")
    if best is None:
        out = [Markup("No method’s interval stays {}.").format(within())]
    else:
        said = Markup("The cheapest method whose interval stays {} is").format(within())
        out = [said + named.format(breakable(best["policy"]), gains(best, none))]
    if plain is not None:
        out.append(
            Markup("The cheapest plain baseline that does is")
            + named.format(breakable(plain["policy"]), gains(plain, none))
        )
    elif best is not None and any(row["name"] in BASELINES for row in cuts):
        out.append(Markup("No plain baseline (random, uniform, pooled or smaller pictures) does."))
    return out


def gains(row: dict[str, Any], none: dict[str, Any] | None) -> str:
    """A policy against none: points, tokens, and how much faster and smaller."""
    versus = row["versus_none"]
    parts = [
        f"{points(versus['difference'])} points [{points(versus['low'])}, {points(versus['high'])}]",
        f"{100 * row['mean_keep']:.0f}% of the vision tokens, mean over layers",
    ]
    if none is not None:
        if row["prefill_ms"] and none["prefill_ms"]:
            parts.append(f"prefill {none['prefill_ms']['median'] / row['prefill_ms']['median']:.1f}× faster")
        if row["kv_mib"]:
            parts.append(f"KV cache {none['kv_mib'] / row['kv_mib']:.1f}× smaller")
    return ", ".join(parts)


def limits(found: Sequence[Result]) -> list[str]:
    """What these numbers do not say, as far as it follows from what was measured."""
    out: list[str] = []
    kinds = {result.kind for result in found}
    evals = [result for result in found if result.kind == "eval"]
    compared = sum(len(result.rows) - 1 for result in evals)
    if any("pocket" in result.model for result in evals):
        out.append(
            "A pocket model has 3.5 M parameters and answers in one word about rendered pictures. The order of "
            "policies on it is a first hint, not a forecast for a large model on photographs."
        )
    if evals:
        n = min(result.shown for result in evals)
        out.append(
            f"Intervals are 95% bootstrap intervals over the questions asked ({n:,} or more): another draw "
            "of questions gives other numbers, another data set may give another order."
        )
        out.append(
            "A policy sees the picture through a model that may not need it: the column “indispensable” counts only "
            "questions that this model gets right neither without an image nor with a gray one."
        )
    if compared > 1:
        level = number(0.05 / compared, 2)
        out.append(
            f"p is not corrected for the {compared} comparisons; after Bonferroni only p\u00a0<\u00a0{level} counts "
            "at 5%. Whatever is picked as the best of many is flattered by the picking."
        )
    bad = sum(result.data["data"]["bad"] for result in evals)
    if bad:
        out.append(f"{bad} samples could not be read and are in no number.")
    out += time_limits(found, kinds)
    return out


def time_limits(found: Sequence[Result], kinds: set[str]) -> list[str]:
    """About times, FLOPs and peers."""
    out = []
    machines = list(dict.fromkeys(result.machine for result in found))
    if len(machines) > 1:
        out.append("Parts were measured on different machines: compare times within a table, not between tables.")
    if any(result.data["hardware"]["device"] == "cpu" for result in found):
        out.append(
            "Times come from CPU cores. Ratios between policies carry over better than milliseconds do, and on a GPU "
            "small models are bound by launches, not by tokens."
        )
    out.append(
        "GFLOPs and KV are the text model's alone; image tower and projector, the same for most policies, come on top."
    )
    if kinds & {"policies", "batch", "scale", "engine", "decode"}:
        out.append("The benches run models with random weights where they say so: they show cost, never quality.")
    if "launches" in kinds:
        out.append("Launches, waits and copies were counted on a pretended GPU: they say nothing about times.")
    if "serve" in kinds:
        out.append("A server's rate includes its own work and the client's, which run on the same cores.")
    if "peers" in kinds:
        out.append("A peer's error is what its package said on this machine; it may run elsewhere.")
    return out
