"""Seeded pictures with questions whose answers can only be read from the picture.

A scene is a cluttered 192 x 192 picture (a few are 192 x 96 or 96 x 192) with 9-14 askable objects at arbitrary
pixel positions: coloured shapes (about two thirds carry a small letter), real handwritten digits in colour, and
short words printed on coloured tags. Letters and words are legible in the full-resolution crops only, not in the
96 px thumbnail a LLaVA-NeXT model also sees.

Splits differ in their random streams and in their handwritten digits, which never overlap.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE, PATCH = 96, 8
GRID = TILE // PATCH
SIZES = ((192, 192), (192, 96), (96, 192))  # width, height

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 210, 40),
    "purple": (140, 50, 170),
    "orange": (240, 130, 30),
    "cyan": (50, 200, 215),
    "pink": (245, 130, 190),
}
COLOR_NAMES = list(COLORS)
SHAPES = ["circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart"]
ROUND = ("circle", "ring")
LETTERS = list("bcdefhklmnprtxyz")
WORDS = ["cat", "dog", "sun", "map", "fig", "box", "jam", "hat", "bus", "cup", "ice", "fox", "owl", "pen", "tea", "zoo"]
DIGITS = [str(i) for i in range(10)]
NUMBERS = ["zero", "one", "two", "three", "four"]
REGIONS = ["top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right"]
TYPES = ["color", "shape", "count", "where", "letter", "find", "digit", "word"]
TYPE_WEIGHTS = dict.fromkeys(TYPES, 1.0) | {"count": 3.0, "digit": 1.5, "word": 1.2}
DARK_TEXT = {"yellow", "orange", "cyan", "pink"}  # tag colours that carry dark instead of white text

# channels of dense_labels
KIND, SHAPE, COLOR, DIGIT, LETTER, WORD, REGION, CENTER = range(8)
KINDS = ["shape", "digit", "word"]
CHANNEL_NAMES = ["kind", "shape", "color", "digit", "letter", "word", "region", "center"]
CHANNEL_WORDS = [KINDS, SHAPES, COLOR_NAMES, DIGITS, LETTERS, WORDS, REGIONS]


@dataclass
class Thing:
    """One askable object: `name` is the shape's name, the digit or the word."""

    kind: str
    name: str
    color: str
    cx: float
    cy: float
    letter: str | None = None


@dataclass
class Scene:
    """A picture, its objects, and a map with 1 + the object's index at every pixel that belongs to an object."""

    image: Image.Image
    objects: list[Thing] = field(default_factory=list)
    owner: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint8))

    def region(self, thing: Thing) -> str:
        """Which of the nine regions of the picture holds the object's centre."""
        return REGIONS[int(thing.cy * 3 / self.image.height) * 3 + int(thing.cx * 3 / self.image.width)]


@dataclass(frozen=True)
class Question:
    """A question of one of TYPES; the word that decides the answer comes last."""

    type: str
    text: str
    answer: str


@functools.cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits (8 x 8) of one split: 1300 for training, 197 for validation, 300 for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.images))
    part = {"train": order[:1300], "val": order[1300:1497], "test": order[1497:]}[split]
    return np.clip(data.images[part] * 17, 0, 255).astype(np.uint8), data.target[part]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _ngon(cx: float, cy: float, radii: list[float], turn: float) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    start = math.radians(turn - 90)
    return [(cx + r * math.cos(start + i * step), cy + r * math.sin(start + i * step)) for i, r in enumerate(radii)]


def _outline(shape: str, cx: float, cy: float, r: float, turn: float) -> list[tuple[float, float]]:
    """Corner points of a shape that is drawn as a polygon."""
    if shape == "square":
        return _ngon(cx, cy, [r * 1.22] * 4, 45 + turn / 2)
    if shape == "triangle":
        return _ngon(cx, cy + r * 0.12, [r * 1.2] * 3, turn)
    if shape == "diamond":
        return _ngon(cx, cy, [r * 1.15, r * 0.8] * 2, turn / 3)
    if shape == "star":
        return _ngon(cx, cy, [r * 1.18, r * 0.52] * 5, turn)
    if shape == "cross":
        t = r * 0.38
        arms = (
            (-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t), (t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t),
        )  # fmt: skip
        return [(cx + x, cy + y) for x, y in arms]
    angles = [2 * math.pi * i / 24 for i in range(24)]  # heart
    return [
        (
            cx + r * 1.08 * math.sin(a) ** 3,
            cy - r * 1.08 / 16 * (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
        )
        for a in angles
    ]


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, turn: float, fill: Any, filled: bool = False
) -> None:
    """Draws a shape of radius r, turned by so many degrees. filled: a ring, too."""
    if shape not in ROUND:
        draw.polygon(_outline(shape, cx, cy, r, turn), fill=fill)
    elif shape == "ring" and not filled:
        draw.ellipse([cx - r, cy - r, cx + r, cy + r], outline=fill, width=max(4, round(r / 3)))
    else:
        draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=fill)


class Canvas:
    """Draws objects onto the picture and, in parallel, onto the owner map; finds free places for them."""

    def __init__(self, rng: random.Random, width: int, height: int) -> None:
        self.rng, self.width, self.height = rng, width, height
        self.noise = np.random.default_rng(rng.getrandbits(32))
        dark = rng.random() < 0.35
        self.base = rng.randint(15, 60) if dark else rng.randint(190, 245)
        tint = np.array([self.base + rng.randint(-12, 12) for _ in range(3)], np.float32)
        coarse = np.clip(tint + self.noise.normal(0, 10, (6, 6, 1)), 0, 255).astype(np.uint8)
        self.image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        self.owner = Image.new("L", (width, height), 0)
        self.draw, self.mark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.owner)
        self.boxes: list[tuple[float, float, float, float]] = []
        self.objects: list[Thing] = []
        for _ in range(rng.randint(0, 5)):
            g = self.base + rng.randint(-45, 45)
            line = [rng.randrange(width), rng.randrange(height), rng.randrange(width), rng.randrange(height)]
            self.draw.line(line, fill=(g, g, g), width=1)

    def place(self, hw: float, hh: float, seam_x: float, seam_y: float) -> tuple[float, float] | None:
        """A free centre for a 2hw x 2hh object, at least seam_x/seam_y away from the border between two tiles."""
        for _ in range(90):
            cx = self.rng.randint(math.ceil(hw * 2), math.floor((self.width - hw) * 2)) / 2
            cy = self.rng.randint(math.ceil(hh * 2), math.floor((self.height - hh) * 2)) / 2
            cut_x = self.width > TILE and abs(cx - TILE) < seam_x
            if cut_x or (self.height > TILE and abs(cy - TILE) < seam_y):
                continue
            if all(abs(cx - x) >= hw + w + 2 or abs(cy - y) >= hh + h + 2 for x, y, w, h in self.boxes):
                self.boxes.append((cx, cy, hw, hh))
                return cx, cy
        return None

    def paint(self, color: str) -> tuple[int, int, int]:
        """The named colour, slightly varied."""
        r, g, b = (max(0, min(255, v + self.rng.randint(-18, 18))) for v in COLORS[color])
        return r, g, b

    def add_shape(self, shape: str, color: str, letter: str | None) -> None:
        rng = self.rng
        r = rng.uniform(13, 15) if letter else rng.uniform(11.5, 15)
        seam = 9 if letter else 0
        spot = self.place(r * 1.08, r * 1.08, seam, seam)
        if spot is None:
            return
        (cx, cy), fill, tag = spot, self.paint(color), len(self.objects) + 1
        turn = 0.0 if shape in ROUND else rng.uniform(-15, 15)
        draw_shape(self.draw, shape, cx, cy, r, turn, fill)
        draw_shape(self.mark, shape, cx, cy, r, turn, tag, filled=True)
        if letter:
            plate = [round(cx - 5.5), round(cy - 5.5), round(cx + 5.5), round(cy + 5.5)]
            self.draw.rectangle(plate, fill=(255, 255, 255))
            self.draw.text((cx + 0.5, cy + 0.5), letter.upper(), fill=(10, 10, 10), font=_font(11), anchor="mm")
            self.mark.rectangle(plate, fill=tag)
        self.objects.append(Thing("shape", shape, color, cx, cy, letter))

    def add_digit(self, split: str, color: str) -> None:
        rng = self.rng
        images, targets = _digits(split)
        k = rng.randrange(len(images))
        side = rng.randint(28, 31)
        mask = Image.fromarray(images[k]).resize((side, side), Image.Resampling.BICUBIC)
        if split == "train":
            mask = _jiggle(mask, rng)
        spot = self.place(side / 2 - 1, side / 2 - 1, 11, 11)
        if spot is None:
            return
        x, y = round(spot[0] - side / 2), round(spot[1] - side / 2)
        self.image.paste(Image.new("RGB", (side, side), self.paint(color)), (x, y), mask)
        self.mark.rectangle([x + 4, y + 2, x + side - 5, y + side - 3], fill=len(self.objects) + 1)
        self.objects.append(Thing("digit", str(targets[k]), color, x + side / 2, y + side / 2))

    def add_word(self, word: str, color: str) -> None:
        half = math.ceil(_font(11).getlength(word) / 2) + 2
        spot = self.place(half, 7, half - 2, 6)
        if spot is None:
            return
        cx, cy = spot
        box = [round(cx - half), round(cy - 7), round(cx + half), round(cy + 7)]
        self.draw.rectangle(box, fill=self.paint(color))
        ink = (10, 10, 10) if color in DARK_TEXT else (255, 255, 255)
        self.draw.text((cx + 0.5, cy + 0.5), word, fill=ink, font=_font(11), anchor="mm")
        self.mark.rectangle(box, fill=len(self.objects) + 1)
        self.objects.append(Thing("word", word, color, cx, cy))

    def finish(self) -> Scene:
        grain = self.noise.integers(-7, 8, (self.height, self.width, 1), dtype=np.int16)
        pixels = np.clip(np.asarray(self.image).astype(np.int16) + grain, 0, 255).astype(np.uint8)
        return Scene(Image.fromarray(pixels), self.objects, np.asarray(self.owner))


def _jiggle(mask: Image.Image, rng: random.Random) -> Image.Image:
    """A slightly turned, scaled, slanted and shifted copy of a digit (training split only)."""
    c, a = mask.width / 2, math.radians(rng.uniform(-11, 11))
    sx, sy, slant = rng.uniform(0.92, 1.12), rng.uniform(0.92, 1.12), rng.uniform(-0.12, 0.12)
    m00, m01 = math.cos(a) * sx, (-math.sin(a) + slant) * sx
    m10, m11 = math.sin(a) * sy, math.cos(a) * sy
    dx, dy = rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)
    matrix = (m00, m01, c - m00 * c - m01 * c + dx, m10, m11, c - m10 * c - m11 * c + dy)
    return mask.transform(mask.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def make_scene(rng: random.Random, split: str = "train", size: tuple[int, int] = SIZES[0]) -> Scene:
    """Draws one scene. `size` is one of SIZES; the two small ones hold about half as many objects."""
    canvas = Canvas(rng, *size)
    small = size != SIZES[0]
    shapes, colors = rng.sample(SHAPES, 8), rng.sample(COLOR_NAMES, 8)
    single = rng.randint(2, 3) if small else rng.randint(3, 5)
    specs = list(zip(shapes[:single], colors[:single], strict=True))
    repeat = rng.choice([0, 2]) if small else rng.choice([2, 2, 3, 3, 4, 4])
    if rng.random() < 0.5:  # a group of one shape ...
        specs += [(shapes[single], rng.choice(colors[2:])) for _ in range(repeat)]
    else:  # ... or of one colour
        specs += [(rng.choice(shapes[2:]), colors[single]) for _ in range(repeat)]
    letters = rng.sample(LETTERS, len(specs))
    jobs = [
        functools.partial(canvas.add_shape, s, c, lt if rng.random() < 0.65 else None)
        for (s, c), lt in zip(specs[:8], letters, strict=False)
    ]
    digits = rng.randint(1, 2) if small else rng.randint(2, 4)
    jobs += [functools.partial(canvas.add_digit, split, c) for c in rng.sample(COLOR_NAMES, digits)]
    words = 1 if small else rng.randint(2, 3)
    jobs += [
        functools.partial(canvas.add_word, w, c)
        for w, c in zip(rng.sample(WORDS, words), rng.sample(COLOR_NAMES, words), strict=True)
    ]
    rng.shuffle(jobs)
    for job in jobs:
        job()
    return canvas.finish()


def _all_questions(scene: Scene, rng: random.Random) -> dict[str, list[Question]]:
    """Every question that can be asked about a scene, by type (for `count`: balanced over the answers)."""
    shapes = [o for o in scene.objects if o.kind == "shape"]
    names, colors = Counter(o.name for o in shapes), Counter(o.color for o in shapes)
    out: dict[str, list[Question]] = {t: [] for t in TYPES}

    def ask(kind: str, text: str, answer: str) -> None:
        out[kind].append(Question(kind, text, answer))

    for o in shapes:
        alone_name, alone_color = names[o.name] == 1, colors[o.color] == 1
        if alone_name:
            ask("color", f"what color is the {o.name}", o.color)
            gx, gy = o.cx * 3 / scene.image.width, o.cy * 3 / scene.image.height
            if min(abs(g - b) for g in (gx, gy) for b in (1, 2)) > 0.06:
                ask("where", f"where is the {o.name}", scene.region(o))
        if alone_color:
            ask("shape", f"what shape is {o.color}", o.name)
        if o.letter:
            ask("find", f"what color is letter {o.letter}", o.color)
            keys = [k for k, ok in ((f"the {o.name}", alone_name), (f"the {o.color}", alone_color)) if ok]
            if keys:
                ask("letter", f"which letter is on {rng.choice(keys)}", o.letter)
    by_count: dict[int, list[str]] = {}
    for key in SHAPES + COLOR_NAMES:
        by_count.setdefault(names[key] + colors[key], []).append(key)
    for number in range(5):
        keys = by_count.get(number, [])
        for key in rng.sample(keys, min(len(keys), 2 if number < 2 else 4)):
            ask("count", f"how many shapes are {key}", NUMBERS[number])
    for o in scene.objects:
        if o.kind != "shape":
            ask(o.kind, f"which {o.kind} is {o.color}", o.name)
    return out


def questions(scene: Scene, rng: random.Random, k: int = 8) -> list[Question]:
    """Up to k different questions, the types drawn by TYPE_WEIGHTS."""
    pool = {t: rng.sample(qs, len(qs)) for t, qs in _all_questions(scene, rng).items() if qs}
    out: list[Question] = []
    while pool and len(out) < k:
        kind = rng.choices(list(pool), [TYPE_WEIGHTS[t] for t in pool])[0]
        out.append(pool[kind].pop())
        if not pool[kind]:
            del pool[kind]
    return out


def scene_stream(split: str, seed: int | str = 0) -> Iterator[tuple[Scene, random.Random]]:
    """Endless scenes of a split (one in ten not square) with the random stream that drew them."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        size = SIZES[0] if rng.random() < 0.9 else rng.choice(SIZES[1:])
        yield make_scene(rng, split, size), rng


def samples(n: int, split: str = "test", seed: int = 0, per_scene: int = 8) -> Iterator[dict[str, Any]]:
    """n questions as dict(image, question, answer, type), types balanced, `per_scene` questions to a picture."""
    stream, made = scene_stream(split, seed), 0
    while made < n:
        scene, rng = next(stream)
        pool = _all_questions(scene, rng)
        kinds = [t for t in TYPES if pool[t]]
        for kind in rng.sample(kinds, min(len(kinds), per_scene, n - made)):
            q = rng.choice(pool[kind])
            made += 1
            yield {"image": scene.image, "question": q.text, "answer": q.answer, "type": q.type}


def dense_labels(scene: Scene, fine: bool) -> np.ndarray:
    """Per-patch labels (8, rows, cols): 0 = none, 1 + index of the word in CHANNEL_WORDS, -1 = do not judge.

    fine: the patches of the full-resolution crops; otherwise the 12 x 12 patches of the thumbnail, where letters and
    words count as absent (illegible) and REGION says in which ninth of the picture the patch's object lies.
    A crop that shows less than half of an object is not asked for its name, letter or digit.
    """
    height, width = scene.owner.shape
    rows, cols = (height // PATCH, width // PATCH) if fine else (GRID, GRID)
    ch, cw = height // rows, width // cols
    labels = np.zeros((8, rows, cols), np.int64)
    for i, o in enumerate(scene.objects):
        mask = scene.owner == i + 1
        area = mask.reshape(rows, ch, cols, cw).sum((1, 3))
        inside = area >= 0.25 * ch * cw
        labels[KIND][inside] = 1 + KINDS.index(o.kind)
        labels[COLOR][inside] = 1 + COLOR_NAMES.index(o.color)
        seen = np.ones((rows, cols), bool)
        if fine:
            tiles = area.reshape(rows // GRID, GRID, cols // GRID, GRID).sum((1, 3)) >= 0.5 * mask.sum()
            seen = tiles.repeat(GRID, 0).repeat(GRID, 1)
        channel, words = {"shape": (SHAPE, SHAPES), "digit": (DIGIT, DIGITS), "word": (WORD, WORDS)}[o.kind]
        if fine or o.kind != "word":
            labels[channel][inside] = np.where(seen, 1 + words.index(o.name), -1)[inside]
        if fine and o.letter:
            labels[LETTER][inside] = np.where(seen, 1 + LETTERS.index(o.letter), -1)[inside]
        if not fine:
            labels[REGION][inside] = 1 + REGIONS.index(scene.region(o))
        labels[CENTER, min(rows - 1, int(o.cy / ch)), min(cols - 1, int(o.cx / cw))] = 1
    return labels


def tiles_of(image: Image.Image) -> np.ndarray:
    """The thumbnail and the full-resolution crops (row by row) of a scene's picture, uint8 (1 + crops, 96, 96, 3)."""
    pixels = np.asarray(image)
    thumb = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    height, width = pixels.shape[:2]
    return np.stack(
        [thumb] + [pixels[y : y + TILE, x : x + TILE] for y in range(0, height, TILE) for x in range(0, width, TILE)]
    )
