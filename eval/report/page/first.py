"""The page's first screen: which policy to take, and what that gains. One sentence, three numbers, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from vtr.eval.report.page import plots
from vtr.eval.report.page.cells import number, points
from vtr.eval.report.page.data import BASELINES, Result, unreduced
from vtr.eval.report.page.words import MARGIN, breakable, cheapest, within

import vtr

TIME, WORK = "measured prefill, ms", "prefill and decode, GFLOPs (counted)"
"""What the figure's horizontal axis can be."""
CAPTION = (
    "Upper left is better. A diamond is the model with all its vision tokens, the line joins the policies that no "
    "other one beats in both, bars are 95% intervals. Point at or tap a mark for its numbers."
)


@dataclass(frozen=True)
class Figure:
    """A drawing, the models in it with their colours (class of the style sheet), and what stands under it."""

    drawing: Markup
    models: list[tuple[str, str]]
    caption: str


@dataclass(frozen=True)
class First:
    """What the first screen shows. numbers: (figure, what it is). figures: (what its button says, figure)."""

    sentence: Markup
    numbers: list[tuple[str, str]]
    figures: list[tuple[str, Figure]]
    under: str


# -- what comes first --------------------------------------------------------------------------------------------------
def weight(result: Result) -> tuple[bool, bool, bool, int]:
    """How much an evaluation tells, the largest first on the page.

    It says something about looking at all (no reduction is surely better than no picture); the model is none of the
    pocket models; prefill was measured; how many questions were asked.
    """
    none = unreduced(result)
    blind = [result.data["reference"].get(key) for key in ("no_image", "gray")]
    sees = none is not None and all(share is None or none["low"] > share for share in blind)
    return sees, result.model not in vtr.pocket.NAMES, timed(result), result.shown


def timed(result: Result) -> bool:
    """Whether prefill was measured of no reduction and of some policy."""
    none = unreduced(result)
    return none is not None and bool(none["prefill_ms"]) and any(row["prefill_ms"] for row in cuts(result))


def cuts(result: Result) -> list[dict[str, Any]]:
    """Every row but that of no reduction."""
    return [row for row in result.rows if row["policy"] != "none"]


def by_model(evals: Sequence[Result]) -> dict[str, list[Result]]:
    """Evaluations of each model, both in the order of :func:`weight`."""
    out: dict[str, list[Result]] = {}
    for result in sorted(evals, key=weight, reverse=True):
        out.setdefault(result.model, []).append(result)
    return out


# -- in words and numbers ----------------------------------------------------------------------------------------------
def chosen(result: Result) -> tuple[dict[str, Any] | None, bool]:
    """The policy the page speaks of, and whether it is as good as no reduction within the margin and costs less.

    Where none is: the one whose interval comes nearest; None where nothing was compared.
    """
    none = unreduced(result)
    compared = [row for row in cuts(result) if row.get("versus_none")]
    if none is None or not compared:
        return None, False
    best = cheapest([row for row in compared if gain(row, none)[0] > 1])
    if best is not None:
        return best, True
    return max(compared, key=lambda row: row["versus_none"]["low"]), False


def gain(row: dict[str, Any], none: dict[str, Any]) -> tuple[float, str, str]:
    """How many times cheaper than no reduction; what was compared, as a number's caption and as a sentence has it."""
    if row["prefill_ms"] and none["prefill_ms"]:
        before, after = none["prefill_ms"], row["prefill_ms"]
        times = before["median"] / after["median"]
        what = f"faster prefill, medians (smallest–largest): {spread(before)} → {spread(after)} ms"
        said = f"prefill is {times:.1f}× faster" if times >= 1 else f"prefill takes {1 / times:.1f}× as long"
        return times, what, said
    before, after = none["gflops"], row["gflops"]
    times, what = before / after, f"fewer GFLOPs (time was not measured): {number(before)} → {number(after)}"
    return times, what, f"it needs {times:.1f}× fewer FLOPs" if times >= 1 else f"it needs {1 / times:.1f}× the FLOPs"


def spread(ms: dict[str, float]) -> str:
    """Median, smallest and largest of some times."""
    return f"{number(ms['median'])} ({number(ms['low'])}–{number(ms['high'])})"


def screen(evals: Sequence[Result]) -> First | None:
    """The first screen; None without an evaluation."""
    if not evals:
        return None
    models = by_model(evals)
    result = next(iter(models.values()))[0]
    row, good = chosen(result)
    none = unreduced(result)
    drawn = figures(models, row)
    if row is None or none is None:
        said = Markup("On {}, no policy was compared with no reduction: none can be named.").format(result.model)
        return First(said, [], drawn, "")
    return First(sentence(result, row, none, good), numbers(row, none), drawn, under(result, row, good))


def sentence(result: Result, row: dict[str, Any], none: dict[str, Any], good: bool) -> Markup:
    """Which policy to take on this model and what it gains, with its interval; or that there is none to take."""
    named = Markup("<code>{}</code>").format(breakable(row["policy"]))
    versus = row["versus_none"]
    lost = f"{points(versus['difference'])} points against no reduction"
    between = f"95% interval {points(versus['low'])} to {points(versus['high'])}"
    cost = gain(row, none)[2]
    if good:
        share = f"{100 * row['accuracy']:.1f}%"
        return Markup("On {}, take {}: {}, and accuracy is {} on {} questions, {} ({}).").format(
            result.model, named, cost, share, f"{result.shown:,}", lost, between
        )
    return Markup("On {}, no cheaper policy is surely {}; {} comes nearest: {} ({}) on {} questions, and {}.").format(
        result.model, within(), named, lost, between, f"{result.shown:,}", cost
    )


def numbers(row: dict[str, Any], none: dict[str, Any]) -> list[tuple[str, str]]:
    """Time (or FLOPs), cache and accuracy against no reduction."""
    times, what, _ = gain(row, none)
    versus = row["versus_none"]
    kv = [one["kv_mib"] for one in (none, row)]
    smaller = f"{kv[0] / kv[1]:.1f}×" if all(kv) else "–"
    return [
        (f"{times:.1f}×", what),
        (smaller, f"smaller KV cache: {number(kv[0])} → {number(kv[1])} MiB"),
        (
            points(versus["difference"]),
            f"points of accuracy: {100 * none['accuracy']:.1f} → {100 * row['accuracy']:.1f}%, 95% interval "
            f"[{points(versus['low'])}, {points(versus['high'])}]",
        ),
    ]


def under(result: Result, row: dict[str, Any], good: bool) -> str:
    """What was measured, the rule that the sentence follows, and which method does it too where a baseline won."""
    told = (
        f"{result.path.name}: {result.shown:,} questions of {result.task}, {result.machine}. Named is the cheapest "
        f"policy whose 95% interval stays within {100 * MARGIN:g} points of no reduction."
    )
    if not good or row["name"] not in BASELINES:
        return told
    method = cheapest([one for one in cuts(result) if one["name"] not in BASELINES])
    other = (
        "no method does as much" if method is None else f"the cheapest method that stays there is {method['policy']}"
    )
    return f"{told} It is a plain baseline; {other}."


# -- the figure --------------------------------------------------------------------------------------------------------
def figures(models: dict[str, list[Result]], row: dict[str, Any] | None) -> list[tuple[str, Figure]]:
    """Accuracy against measured time, where it was measured, and against counted FLOPs: one line a model."""
    out = []
    for button, axis in (("measured time", TIME), ("FLOPs", WORK)):
        lines = [line for place, found in enumerate(models.values()) if (line := line_of(found, axis, place, row))]
        if lines:
            missing = [name for name in models if name not in {line.name for line in lines}]
            caption = CAPTION + (f" Not measured of {', '.join(missing)}." if missing else "")
            named = [(line.css, line.name) for line in lines]
            out.append((button, Figure(plots.lines(lines, axis), named, caption)))
    return out


def line_of(found: Sequence[Result], axis: str, place: int, row: dict[str, Any] | None) -> plots.Line | None:
    """A model's line: of its evaluation that tells most, those policies that no other one beats in both."""
    for result in found:
        none = unreduced(result)
        if none is None or (axis == TIME and not timed(result)):
            continue
        whole = point(none, axis, False)
        made = [point(one, axis, one is row) for one in cuts(result) if axis == WORK or one["prefill_ms"]]
        if made:
            return plots.Line(result.model, place, [*made, whole], whole)
    return None


def point(row: dict[str, Any], axis: str, named: bool) -> plots.Point:
    """A policy in the figure; only the recommended one is labelled."""
    cost = row["prefill_ms"]["median"] if axis == TIME else row["gflops"]
    unit = "ms" if axis == TIME else "GFLOPs"
    title = f"{row['policy']}: {100 * row['accuracy']:.1f}%, {number(cost)} {unit}"
    label = row["name"] if named else ""
    return plots.Point(row["name"], label, cost, row["accuracy"], row["low"], row["high"], title)
