"""The page's drawings: accuracy against cost, growth of cost, radars, and the small ones inside tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup
from vtr.eval.report.page.data import BASELINES
from vtr.eval.report.page.svg import SHAPES, Drawing, Scale, compact, padded

WIDTH, HEIGHT = 370.0, 300.0
AREA = (44.0, 14.0, WIDTH - 12.0, HEIGHT - 44.0)
"""Left, top, right, bottom of the axes."""
COLORS = 8
AXES = {"vision_tokens": "vision tokens", "batch": "batch size", "answer": "answer length, tokens"}


@dataclass(frozen=True)
class Style:
    """How a policy looks in all plots."""

    css: str
    shape: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Methods filled in colours, baselines hollow and gray, in the order given."""
    methods = [name for name in dict.fromkeys(names) if name not in BASELINES]
    out = {n: Style("base", SHAPES[i % len(SHAPES)]) for i, n in enumerate(BASELINES[1:]) if n in names}
    out["none"] = Style("none", "diamond")
    return out | {n: Style(f"c{i % COLORS}", SHAPES[i // COLORS % len(SHAPES)]) for i, n in enumerate(methods)}


def key(style: Style) -> Markup:
    """A legend's mark."""
    drawing = Drawing(14, 14, "", "key")
    drawing.mark(7, 7, style.shape, style.css)
    return drawing.render()


# -- accuracy against cost ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Point:
    """A policy in a plot of accuracy against a cost."""

    name: str
    label: str
    cost: float
    accuracy: float
    low: float
    high: float
    title: str


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both: cheapest first, each more accurate than all cheaper ones."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def framed(points: Sequence[Point], cost: str, of: str) -> tuple[Drawing, Scale, Scale]:
    """An empty plot of accuracy over ``cost`` that holds these points. of: who is drawn, for those who cannot see."""
    costs = [point.cost for point in points]
    log = min(costs) > 0 and max(costs) / min(costs) > 5
    left, top, right, bottom = AREA
    x = Scale(*padded(costs, log), left, right, log)
    low, high = padded([v for p in points for v in (p.low, p.high)], False, 0.04)
    y = Scale(max(low, 0.0), min(high, 1.015), bottom, top)
    drawing = Drawing(WIDTH, HEIGHT, f"Accuracy against {cost} of {of}")
    axes(drawing, x, y, cost, [f"{100 * t:g}" for t in y.ticks()])
    drawing.text(left - 30, top - 3, "accuracy, %", class_="axis")
    return drawing, x, y


def pareto(points: Sequence[Point], cost: str, look: Mapping[str, Style]) -> Markup:
    """Accuracy over ``cost``, its front drawn and named; the best is upper left."""
    left, top, right, bottom = AREA
    drawing, x, y = framed(points, cost, f"{len(points)} policies; the table has the numbers.")
    best = front(points)
    stairs = [(x(best[0].cost), y(best[0].accuracy))]
    for point in best[1:]:
        stairs += [(x(point.cost), stairs[-1][1]), (x(point.cost), y(point.accuracy))]
    stairs.append((right, stairs[-1][1]))
    drawing.line(stairs, "front")
    drawing.taken += [(min(a, c), min(b, d) - 1, max(a, c), max(b, d) + 1) for (a, b), (c, d) in pairwise(stairs)]
    for p in points:
        drawing.line([(x(p.cost), y(p.low)), (x(p.cost), y(p.high))], f"whisker {look[p.name].css}")
    for p in points:
        drawing.mark(x(p.cost), y(p.accuracy), look[p.name].shape, look[p.name].css, p.title, p.name)
    for p in best:
        drawing.name(x(p.cost), y(p.accuracy), p.label, f"label {look[p.name].css}", (left, top, WIDTH, bottom))
    return drawing.render()


@dataclass(frozen=True)
class Line:
    """A model in the plot of models: all its points, and which of them is no reduction. place: which colour."""

    name: str
    place: int
    points: list[Point]
    whole: Point

    @property
    def css(self) -> str:
        return f"c{self.place % COLORS}"


def lines(models: Sequence[Line], cost: str) -> Markup:
    """Accuracy over ``cost``, one line a model: through its front, to no reduction, which is a diamond."""
    left, top, _, bottom = AREA
    every = [point for line in models for point in line.points]
    drawn = ", ".join(line.name for line in models)
    drawing, x, y = framed(every, cost, f"{drawn}; the tables have the numbers.")
    for line in models:
        _line(drawing, line, x, y)
    for line in models:
        for p in line.points:
            if label := line.name if p is line.whole else p.label:
                box = (left, top, WIDTH, bottom)
                drawing.name(x(p.cost), y(p.accuracy), label, f"label {line.css}", box)
    return drawing.render()


def _line(drawing: Drawing, line: Line, x: Scale, y: Scale) -> None:
    css, best = line.css, front(line.points)
    run = [p for p in sorted(line.points, key=lambda p: p.cost) if p in best or p is line.whole]
    at = [(x(p.cost), y(p.accuracy)) for p in run]
    drawing.line(at, f"curve {css}")
    for (ax, ay), (bx, by) in pairwise(at):  # labels keep off it
        way = [(ax + i / 16 * (bx - ax), ay + i / 16 * (by - ay)) for i in range(17)]
        drawing.taken += [(px - 1, py - 1, px + 1, py + 1) for px, py in way]
    for p in run:
        drawing.line([(x(p.cost), y(p.low)), (x(p.cost), y(p.high))], f"whisker {css}")
    for p in line.points:
        shape, r = ("diamond", 6.0) if p is line.whole else ("circle", 6.0 if p.label else 3.5)
        drawing.mark(
            x(p.cost), y(p.accuracy), shape, css if p in run else f"{css} beaten", f"{line.name}, {p.title}", r=r
        )


def axes(drawing: Drawing, x: Scale, y: Scale, title: str, y_labels: Sequence[str]) -> None:
    """Grid lines, ticks and the title of the horizontal axis."""
    for tick, label in zip(y.ticks(), y_labels, strict=True):
        drawing.line([(x.a, y(tick)), (x.b, y(tick))], "grid")
        drawing.text(x.a - 6, y(tick) + 4, label, "end", "tick")
    for tick in x.ticks():
        drawing.line([(x(tick), y.a), (x(tick), y.a + 4)], "grid")
        drawing.text(x(tick), y.a + 17, compact(tick), "middle", "tick")
    drawing.line([(x.a, y.a), (x.b, y.a)], "frame")
    drawing.text((x.a + x.b) / 2, y.a + 36, title, "middle", "axis")


# -- growth of cost ----------------------------------------------------------------------------------------------------
def growth(series: Sequence[Mapping[str, Any]], axis: str, look: Mapping[str, Style]) -> Markup:
    """Time over size, both logarithmic, with the slope at each line's end and a dashed line of slope 1."""
    xs = [float(x) for one in series for x in one["x"]]
    times = [ms[k] for one in series for ms in one["ms"] for k in ("low", "high")]
    left, top, right, bottom = AREA
    x = Scale(*padded(xs, True), left, right - 34, True)
    y = Scale(*padded(times, True), bottom, top, True)
    drawing = Drawing(WIDTH, HEIGHT, f"Time against {AXES.get(axis, axis)}, both logarithmic; slopes are in the table.")
    axes(drawing, x, y, AXES.get(axis, axis), [compact(t) for t in y.ticks()])
    drawing.text(left - 30, top - 3, "ms", class_="axis")
    proportional(drawing, x, y)
    ends: list[tuple[float, str, str]] = []
    for one in series:
        style = look[name_of(one["policy"])]
        at = [(x(a), y(ms["median"])) for a, ms in zip(one["x"], one["ms"], strict=True)]
        drawing.line(at, f"curve {style.css}")
        for (px, py), a, ms in zip(at, one["x"], one["ms"], strict=True):
            drawing.line([(px, y(ms["low"])), (px, y(ms["high"]))], f"whisker {style.css}")
            title = f"{one['policy']}: {a:,} → {ms['median']:.4g} ms ({ms['low']:.4g}–{ms['high']:.4g})"
            drawing.mark(px, py, style.shape, style.css, title, name_of(one["policy"]), r=3.5)
        if one["slope"] is not None:
            ends.append((at[-1][1], f"{one['slope']:.2f}", style.css))
    at_y = -math.inf
    for want, slope, css in sorted(ends):
        at_y = max(want + 4, at_y + 12)
        drawing.text(x.b + 4, at_y, slope, class_=f"label {css}")
    return drawing.render()


def proportional(drawing: Drawing, x: Scale, y: Scale) -> None:
    """A line of slope 1 through the lower left corner, as far as it stays inside."""
    grows = min(x.high / x.low, y.high / y.low)
    drawing.line([(x.a, y.a), (x(x.low * grows), y(y.low * grows))], "guide")


def name_of(spec: str) -> str:
    """A spec's first policy."""
    return spec.split("+")[0].split(":")[0]


# -- accuracy by kind --------------------------------------------------------------------------------------------------
def radar(
    kinds: Sequence[str], values: Sequence[float | None], reference: Sequence[float | None], middle: float, css: str
) -> Markup:
    """One policy's accuracy by kind (``middle`` in the middle, 1.0 at the rim) over the reference's outline."""
    width, height, r = 190.0, 168.0, 56.0
    cx, cy = width / 2, height / 2
    described = ", ".join(f"{k} {100 * (v or 0):.0f}%" for k, v in zip(kinds, values, strict=True))
    drawing = Drawing(width, height, described, "radar")

    def at(i: int, share: float) -> tuple[float, float]:
        angle = 2 * math.pi * i / len(kinds)
        return cx + r * share * math.sin(angle), cy - r * share * math.cos(angle)

    def reach(share: float | None) -> float:
        return 0.0 if share is None else max(share - middle, 0.0) / (1 - middle)

    def ring(shares: Sequence[float | None]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*at(i, reach(share))) for i, share in enumerate(shares))

    for rim in ((1 + middle) / 2, 1.0):
        drawing.add("polygon", points=ring([rim] * len(kinds)), class_="grid")
    for i, kind in enumerate(kinds):
        drawing.line([(cx, cy), at(i, 1.0)], "grid")
        px, py = at(i, 1.12)
        anchor = "middle" if abs(px - cx) < 6 else "start" if px > cx else "end"
        drawing.text(px, py + 3.5 + 3 * (py - cy) / r, kind, anchor, "tick")
    drawing.add("polygon", points=ring(reference), class_="reference")
    drawing.add("polygon", points=ring(values), class_=f"area {css}")
    for i, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        title = f"{kind}: {'–' if value is None else f'{100 * value:.1f}%'}"
        drawing.mark(*at(i, reach(value)), "circle", css, title, r=2.2)
    return drawing.render()


# -- inside tables -----------------------------------------------------------------------------------------------------
def whisker(value: float, low: float, high: float, least: float, most: float, zero: float) -> Markup:
    """A value with its interval on a common scale, against a line at ``zero``."""
    drawing = Drawing(76, 14, "", "mini")
    x = Scale(least, most, 3, 73)
    drawing.line([(x(zero), 0), (x(zero), 14)], "frame")
    drawing.line([(x(low), 7), (x(high), 7)], "bar")
    drawing.mark(x(value), 7, "circle", "dot", r=2.6)
    return drawing.render()


def spark(tokens: Sequence[float], most: float) -> Markup:
    """Vision tokens entering each layer, as steps; ``most`` is the full height."""
    drawing = Drawing(60, 14, "", "mini")
    step = 60 / max(len(tokens), 1)
    path = [(i * step + side * step, 14 - max(13 * n / most, 0.7)) for i, n in enumerate(tokens) for side in (0, 1)]
    drawing.line([(0, 13.5), (60, 13.5)], "grid")
    drawing.add("polygon", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in [(0, 14), *path, (60, 14)]), class_="steps")
    return drawing.render()
