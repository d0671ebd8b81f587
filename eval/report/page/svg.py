"""A small writer of SVG: scales with round ticks, marks, and labels that make room for each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

CHAR, LINE = 7.0, 12.0
"""Width of a (bold, wide) character and height of a line of a label, in units of the drawing."""
SHAPES = ("circle", "square", "triangle", "diamond")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Scale:
    """Data from ``low`` to ``high`` onto units from ``a`` to ``b``."""

    low: float
    high: float
    a: float
    b: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.a + (self.b - self.a) * (at - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the range, at most ``most``."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1, 3), (1,)):
                every = [step * 10.0**e for e in range(first, last + 1) for step in steps]
                found = [t for t in every if self.low * 0.999 <= t <= self.high * 1.001]
                if len(found) <= most:
                    break
            if len(found) > 1:
                return found[:: math.ceil(len(found) / most)]
        raw = (self.high - self.low) / (most - 1)
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(n * step, 10) for n in range(first, first + most + 1) if n * step <= self.high * (1 + 1e-9)]


def padded(values: Sequence[float], log: bool, part: float = 0.06) -> tuple[float, float]:
    """A range around ``values`` with some room."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** part, 1.05)
        return low / room, high * room
    room = (high - low) * part or abs(high) * part or 1.0
    return low - room, high + room


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass
class Drawing:
    """An SVG of so many units; colours come from the page's style sheet by class."""

    width: float
    height: float
    label: str
    kind: str = "plot"
    parts: list[Markup] = field(default_factory=list)
    taken: list[Box] = field(default_factory=list)

    def add(self, tag: str, body: str | Markup = "", **attributes: object) -> None:
        named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        listed = Markup(" ").join(
            Markup('{}="{}"').format(k, f"{v:.1f}" if isinstance(v, float) else v) for k, v in named.items()
        )
        self.parts.append(Markup("<{0} {1}>{2}</{0}>").format(Markup(tag), listed, body))

    def text(self, x: float, y: float, text: str, anchor: str = "start", class_: str = "") -> None:
        self.add("text", text, x=x, y=y, text_anchor=anchor, class_=class_)

    def line(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        self.add("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)

    def mark(
        self, x: float, y: float, shape: str, class_: str, title: str = "", name: str = "", r: float = 4.5
    ) -> None:
        """A data point; its title shows on hover."""
        body = Markup("<title>{}</title>").format(title) if title else ""
        self.add("path", body, d=outline(x, y, shape, r), class_=f"mark {class_}", data_name=name)
        self.taken.append((x - r, y - r, x + r, y + r))

    def name(self, x: float, y: float, text: str, class_: str, within: Box) -> bool:
        """Write ``text`` beside a point where nothing is yet; False where there is no room."""
        width = CHAR * len(text)
        for reach in (8.0, 14.0, 22.0, 32.0):
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
                left = x + dx * reach - (width if dx < 0 else 0 if dx > 0 else width / 2)
                top = y + dy * reach - LINE / 2
                box = (left, top, left + width, top + LINE)
                inside = within[0] <= box[0] and box[2] <= within[2] and within[1] <= box[1] and box[3] <= within[3]
                if inside and not any(overlap(box, other) for other in self.taken):
                    self.taken.append(box)
                    if reach > 14:
                        self.line([(x, y), (x + dx * (reach - 2), y + dy * (reach - 2))], "leader")
                    self.text(left, top + LINE - 3, text, class_=class_)
                    return True
        return False

    def render(self) -> Markup:
        said = Markup('role="img" aria-label="{}"').format(self.label) if self.label else Markup('aria-hidden="true"')
        opening = Markup('<svg class="{}" viewBox="0 0 {:g} {:g}" width="{:g}" height="{:g}" {}>')
        return Markup("").join(
            [
                opening.format(self.kind, self.width, self.height, self.width, self.height, said),
                *self.parts,
                Markup("</svg>"),
            ]
        )


def outline(x: float, y: float, shape: str, r: float) -> str:
    """The path of a mark of about equal weight in every shape.

    Raises:
        ValueError: an unknown shape.
    """
    if shape == "circle":
        return f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1 0 {2 * r},0a{r},{r} 0 1 0 {-2 * r},0z"
    corners = {
        "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
        "triangle": ((0, -1.15), (1.1, 0.8), (-1.1, 0.8)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    }.get(shape)
    if corners is None:
        raise ValueError(f"shape={shape!r}: choose one of {', '.join(SHAPES)}")
    return "M" + "L".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners) + "z"


def compact(value: float) -> str:
    """A tick's label."""
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:,g}" if value < 1e6 else f"{value:g}"
