"""Seeded films with questions that need time: what moved and where to, what came first or last, how many, what went.

A film is a still, cluttered picture of 96 x 96 (drawn at twice the size, as the pocket models' thumbnails are) in which
one shape moves along a line, some appear, some vanish; every frame has its own grain. All shapes of a film differ in
kind and in colour. How many appear does not depend on how many are there in the end. Splits differ in their random
streams.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..scenes import COLOR_NAMES, NUMBERS, SHAPES, SIZES, TILE, WORDS, Canvas, draw_shape

FRAMES = 8
"""In a film, unless told otherwise; no film that is asked about has fewer."""
CLIP = 4
"""Frames of the clips that training begins with: fewer shapes appear in them."""
SIDE = SIZES[0][0]
"""Of the picture that frames are made of, in pixels; all places below are in it."""
WAYS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
TYPES = ["moved", "direction", "first", "last", "appeared", "vanished", "still"]
"""Kinds of questions. "still" is the control: any one frame answers it."""
VANISHING = (0.35, 0.45, 0.2)
"""How often none, one, two shapes vanish."""


@dataclass
class Actor:
    """A shape of a film.

    Attributes:
        x, y: its centre before it moves. way: a key of WAYS, or "" if it stays. length: of its way, in pixels.
        begins, ends: the frames between which it moves. there: the first frame it is in, and the one it is gone in.
    """

    shape: str
    color: str
    radius: float
    turn: float
    fill: tuple[int, int, int]
    x: float
    y: float
    there: tuple[int, int]
    way: str = ""
    length: float = 0.0
    begins: int = 0
    ends: int = 1

    def shown(self, frame: int) -> bool:
        """Whether it is in a frame (from 0)."""
        return self.there[0] <= frame < self.there[1]

    def place(self, frame: int) -> tuple[float, float]:
        """Its centre in a frame."""
        if not self.way:
            return self.x, self.y
        done = min(1.0, max(0.0, (frame - self.begins) / (self.ends - self.begins)))
        dx, dy = WAYS[self.way]
        return self.x + dx * done * self.length, self.y + dy * done * self.length


@dataclass
class Film:
    """Frames of 96 x 96 and the shapes in them."""

    frames: list[Image.Image]
    actors: list[Actor]


@dataclass(frozen=True)
class Question:
    """A question of one of TYPES; the word that decides the answer comes last."""

    type: str
    text: str
    answer: str


def make_film(rng: random.Random, frames: int = FRAMES) -> Film:
    """Draws one film.

    Raises:
        ValueError: fewer frames than FRAMES, and not as many as a CLIP.
    """
    if frames < FRAMES and frames != CLIP:
        raise ValueError(f"frames={frames}: a film has at least {FRAMES}, so that all that happens has a frame")
    canvas = Canvas(rng, SIDE, SIDE)
    gone = rng.choices(range(3), VANISHING)[0]
    last = rng.randint(6, 7 if gone < 2 else 6)  # shapes in the last frame
    fresh = rng.randint(0, min(4, frames - 1 - gone))  # of these, that appeared
    shapes, colors = rng.sample(SHAPES, 8), rng.sample(COLOR_NAMES, 8)
    times = rng.sample(range(1, frames), gone + fresh)
    spans = [(0, time) for time in times[:gone]] + [(time, frames) for time in times[gone:]]
    spans += [(0, frames)] * (last - fresh - 1)
    actors = [_mover(canvas, shapes[0], colors[0], frames)]
    for shape, color, span in zip(shapes[1:], colors[1:], spans, strict=False):
        radius = rng.uniform(11.5, 15)
        if (spot := canvas.place(radius * 1.08, radius * 1.08, 0, 0)) is None:
            return make_film(rng, frames)  # so full that not all can be placed: another one
        actors.append(Actor(shape, color, radius, rng.uniform(-15, 15), canvas.paint(color), *spot, span))
    for word in rng.sample(WORDS, rng.randint(0, 2)):
        canvas.add_word(word, rng.choice(COLOR_NAMES))
    return Film([_frame(canvas, actors, t) for t in range(frames)], actors)


def _mover(canvas: Canvas, shape: str, color: str, frames: int) -> Actor:
    """The shape that moves. The middle of its way, not its beginning, is drawn, whatever the direction."""
    rng = canvas.rng
    way, radius, length = rng.choice(list(WAYS)), rng.uniform(11.5, 15), rng.uniform(44, 72)
    dx, dy = WAYS[way]
    spot = canvas.place(radius * 1.08 + abs(dx) * length / 2, radius * 1.08 + abs(dy) * length / 2, 0, 0)
    assert spot is not None  # the first one has the picture to itself
    x, y = spot[0] - dx * length / 2, spot[1] - dy * length / 2
    begins = rng.randint(0, frames // 4)
    ends = rng.randint(begins + frames // 2, frames - 1)
    turn, fill = rng.uniform(-15, 15), canvas.paint(color)
    return Actor(shape, color, radius, turn, fill, x, y, (0, frames), way, length, begins, ends)


def _frame(canvas: Canvas, actors: list[Actor], frame: int) -> Image.Image:
    image = canvas.image.copy()
    draw = ImageDraw.Draw(image)
    for actor in actors:
        if actor.shown(frame):
            draw_shape(draw, actor.shape, *actor.place(frame), actor.radius, actor.turn, actor.fill)
    small = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = canvas.noise.integers(-4, 5, (TILE, TILE, 1), dtype=np.int16)
    return Image.fromarray(np.clip(small + grain, 0, 255).astype(np.uint8))


def all_questions(film: Film) -> dict[str, list[Question]]:
    """Every question that can be asked about a film, by kind."""
    out: dict[str, list[Question]] = {kind: [] for kind in TYPES}
    length = len(film.frames)

    def named(kind: str, actor: Actor, what: str) -> None:
        out[kind].append(Question(kind, f"what shape {what}", actor.shape))
        out[kind].append(Question(kind, f"what color {what}", actor.color))

    fresh = sorted((a for a in film.actors if a.there[0] > 0), key=lambda a: a.there)
    gone = [a for a in film.actors if a.there[1] < length]
    for actor in film.actors:
        if actor.way:
            named("moved", actor, "moved")
            for key in (actor.shape, actor.color):
                out["direction"].append(Question("direction", f"where moved the {key}", actor.way))
        if actor.there == (0, length):
            out["still"].append(Question("still", f"what color is the {actor.shape}", actor.color))
            out["still"].append(Question("still", f"what shape is {actor.color}", actor.shape))
    out["appeared"].append(Question("appeared", "how many shapes appeared", NUMBERS[len(fresh)]))
    if len(fresh) > 1:
        named("first", fresh[0], "appeared first")
        named("last", fresh[-1], "appeared last")
    if len(gone) == 1:
        named("vanished", gone[0], "vanished")
    return out


def film_stream(split: str, seed: int | str = 0, frames: int = FRAMES) -> Iterator[tuple[Film, random.Random]]:
    """Endless films of a split with the random stream that drew them."""
    rng = random.Random(f"film-{split}-{seed}")
    while True:
        yield make_film(rng, frames), rng


def samples(
    n: int, split: str = "test", seed: int = 0, frames: int = FRAMES, per_film: int = len(TYPES)
) -> Iterator[dict[str, Any]]:
    """n questions as dict(frames, question, answer, type): at most one of a kind and ``per_film`` about a film."""
    stream, made = film_stream(split, seed, frames), 0
    while made < n:
        film, rng = next(stream)
        pool = all_questions(film)
        kinds = [kind for kind in TYPES if pool[kind]]
        for kind in rng.sample(kinds, min(len(kinds), per_film, n - made)):
            q = rng.choice(pool[kind])
            made += 1
            yield {"frames": film.frames, "question": q.text, "answer": q.answer, "type": q.type}
