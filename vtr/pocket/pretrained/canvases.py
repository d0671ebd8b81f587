"""Pictures of one to four things at places of a canvas, and questions about them whose answers are known.

What is where, of which kind, is there a thing, how many of a kind: to answer, a model has to look at *some* tokens, and
which ones depends on the question.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .drawings import Drawing, Thing, things

PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
OPTIONS = 4
SIDE = 224


@dataclass(frozen=True)
class Question:
    """What is asked of a picture. ``type``: name, kind, options, where, there, count."""

    text: str
    answer: str
    type: str


@dataclass(frozen=True)
class Canvas:
    """A picture and what is on it.

    Attributes:
        shown: place → thing (a single thing's place is ""). inked: place → bool [side, side], the thing's own pixels.
    """

    image: Image.Image
    shown: dict[str, Thing]
    inked: dict[str, np.ndarray]


# -- pictures ----------------------------------------------------------------------------------------------------------
def paint(draw: random.Random, drawings: Sequence[Drawing], side: int = SIDE) -> Canvas:
    """One to four drawings on a canvas of ``side`` pixels; a single one may be anywhere and larger."""
    count = draw.choices((1, 2, 3, 4), (45, 25, 10, 20))[0]
    chosen = _differing(draw, drawings, count)
    image = _background(draw, side)
    half = side // 2
    if count == 1:
        size = draw.randint(side // 2, side - 8)
        spot = (draw.randint(0, side - size), draw.randint(0, side - size))
        return Canvas(image, {"": chosen[0].thing}, {"": _put(draw, image, chosen[0], size, spot)})
    shown, inked = {}, {}
    for place, one in zip(draw.sample(PLACES, count), chosen, strict=True):
        size = draw.randint(half * 3 // 4, half - 4)
        left, top = ((half if far in place else 0) + draw.randint(2, half - size - 2) for far in ("right", "bottom"))
        inked[place] = _put(draw, image, one, size, (left, top))
        shown[place] = one.thing
    return Canvas(image, {place: shown[place] for place in PLACES if place in shown}, inked)


def _differing(draw: random.Random, drawings: Sequence[Drawing], count: int) -> list[Drawing]:
    """Drawings of different things; every second canvas shows some of one kind, so that counting is worth asking."""
    kind = draw.choice(drawings).thing.kind if draw.random() < 0.5 else None
    found: dict[str, Drawing] = {}
    while len(found) < count:
        one = draw.choice(drawings)
        if kind is None or one.thing.kind == kind or draw.random() < 0.1:
            found.setdefault(one.thing.name, one)
    return list(found.values())


def _background(draw: random.Random, side: int) -> Image.Image:
    """White, gray or a light colour; every third one turns into another light colour."""
    light = [tuple(draw.randint(190, 255) for _ in range(3)) for _ in range(2)]
    if draw.random() < 0.33:
        small = Image.new("RGB", (1, 2))
        small.putdata(light)
        return small.resize((side, side), Image.Resampling.BICUBIC)
    return Image.new("RGB", (side, side), draw.choice(((255, 255, 255), (235, 235, 235), light[0])))


def _put(draw: random.Random, image: Image.Image, one: Drawing, size: int, spot: tuple[int, int]) -> np.ndarray:
    """Paste a drawing, every second one mirrored. Returns its pixels, bool [side, side]."""
    drawn = Image.fromarray(one.pixels)
    if draw.random() < 0.5:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawn = drawn.resize((size, size), Image.Resampling.LANCZOS)
    image.paste(drawn, spot, drawn)
    inked = np.zeros((image.height, image.width), bool)
    inked[spot[1] : spot[1] + size, spot[0] : spot[0] + size] = np.asarray(drawn)[..., 3] > 128
    return inked


# -- questions ---------------------------------------------------------------------------------------------------------
def ask(draw: random.Random, canvas: Canvas, names: bool = False) -> list[Question]:
    """One question of every type that the canvas allows, about things and places that are drawn.

    Args:
        names: ask for the name of every thing.
    """
    place, thing = draw.choice(list(canvas.shown.items()))
    asked = place
    found = [
        Question(what(place), thing.name, "name"),
        Question(f"{what(place)} {_choices(draw, thing, canvas)}", thing.name, "options"),
        Question(f"What kind of thing is {'this' if not place else 'at the ' + place}?", thing.kind, "kind"),
    ]
    if place:
        place, thing = draw.choice(list(canvas.shown.items()))
        found.append(Question(f"Where is the {thing.name}?", place, "where"))
    found.append(_there(draw, canvas))
    if names:
        found += [Question(what(at), one.name, "name") for at, one in canvas.shown.items() if at != asked]
    kind = draw.choice(list(canvas.shown.values())).kind
    if draw.random() < 0.15:
        kind = draw.choice(things()).kind
    many = sum(one.kind == kind for one in canvas.shown.values())
    found.append(Question(f"How many {plural(kind)} are there?", NUMBERS[many], "count"))
    return found


def what(place: str) -> str:
    """The question for a name."""
    return f"What is at the {place}?" if place else "What is this?"


def plural(kind: str) -> str:
    """Of a kind's name."""
    irregular = {"thing of the sky": "things of the sky", "food": "foods", "clothing": "pieces of clothing"}
    return irregular.get(kind, kind + "s")


def _choices(draw: random.Random, thing: Thing, canvas: Canvas) -> str:
    """Four names, the right one among them; others on the canvas and of the same kind come first."""
    others = {one.name for one in canvas.shown.values() if one != thing}
    free = [one for one in things() if one != thing and one.name not in others]
    alike = [one.name for one in free if one.kind == thing.kind]
    pool = sorted(others) + draw.sample(alike, min(len(alike), OPTIONS - 1))
    pool += [one.name for one in draw.sample(free, OPTIONS) if one.name not in pool][: max(OPTIONS - 1 - len(pool), 0)]
    names = [thing.name, *draw.sample(pool, OPTIONS - 1)]
    draw.shuffle(names)
    return f"Choose one: {', '.join(names[:-1])} or {names[-1]}."


def _there(draw: random.Random, canvas: Canvas) -> Question:
    shown = list(canvas.shown.values())
    if draw.random() < 0.5:
        return Question(f"Is there a {draw.choice(shown).name}?", "yes", "there")
    kind = draw.choice(shown).kind
    absent = [one for one in things() if one not in shown]
    alike = [one for one in absent if one.kind == kind]
    chosen = draw.choice(alike if alike and draw.random() < 0.8 else absent)
    return Question(f"Is there a {chosen.name}?", "no", "there")


def samples(
    n: int, drawings: Sequence[Drawing], seed: int | str = 0, side: int = SIDE, per_canvas: int = 2
) -> Iterator[dict[str, Any]]:
    """n questions as dict(image, question, answer, type), some of each canvas.

    Args:
        side: of the canvas in pixels. per_canvas: questions of one.
    """
    draw = random.Random(f"canvases-{seed}")
    left = n
    while left > 0:
        canvas = paint(draw, drawings, side)
        asked = ask(draw, canvas)
        for one in draw.sample(asked, min(per_canvas, len(asked), left)):
            left -= 1
            yield {"image": canvas.image, "question": one.text, "answer": one.answer, "type": one.type}
