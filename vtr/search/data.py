"""Calibration data: questions about pictures, and a split whose sides share no picture."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtr.data.pictures import upright
from vtr.data.records import Bad, Sample, samples_of
from vtr.data.sources import open_data, refuse, undecoded, usable

if TYPE_CHECKING:
    from PIL import Image

WANTED = "data must be (image, question, answer) triples, dicts with these keys, or the path of a JSONL file"


@dataclass(frozen=True)
class Example:
    """A question about a picture.

    Attributes:
        question: as it is put, with its choices. answer: None where only the model's own answers are needed; of choices
            the right one's letter. choices: by which a reply is scored, where there are any.
    """

    image: Image.Image
    question: str
    answer: str | None = None
    choices: tuple[str, ...] | None = None

    @cached_property
    def picture(self) -> str:
        """A digest of the picture's content (size and RGB values): the same picture under another name has the same."""
        rgb = upright(self.image)
        return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()[:32]


@dataclass(frozen=True)
class Split:
    """Examples to search on, and examples to measure on.

    Raises:
        ValueError: a picture is on both sides (by content), or a side is empty.
    """

    calibration: Sequence[Example]
    evaluation: Sequence[Example]

    def __post_init__(self) -> None:
        if not self.calibration or not self.evaluation:
            raise ValueError("a split needs examples on both sides: give more pictures or a smaller calibration side")
        refuse_overlap({one.picture for one in self.calibration}, self.evaluation)


def refuse_overlap(calibration: Iterable[str], evaluation: Iterable[Example]) -> None:
    """Raise ValueError if a picture that was searched on (by its digest) is also measured on."""
    known = set(calibration)
    both = sum(one.picture in known for one in evaluation)
    if both:
        raise ValueError(
            f"{both} evaluation questions are about pictures that the search has seen: what a schedule was chosen on "
            "cannot say how good it is. Use vtr.search.split, which keeps whole pictures apart"
        )


def split(data: Any, calibration: int = 64, seed: int = 0, images: str | Path | None = None) -> Split:
    """Examples in two parts that share no picture; the same for the same data and seed.

    Args:
        data: see :func:`examples`. calibration: so many questions (or a few more: pictures stay whole) to search on.

    Raises:
        ValueError: not enough pictures for two sides.
    """
    groups: dict[str, list[Example]] = {}
    for one in examples(data, images):
        groups.setdefault(one.picture, []).append(one)
    order = sorted(groups)  # not the order in which the data came
    random.Random(seed).shuffle(order)
    sides: tuple[list[Example], list[Example]] = ([], [])
    for name in order:
        sides[len(sides[0]) >= calibration].extend(groups[name])
    return Split(*sides)


def examples(data: Any, images: str | Path | None = None) -> list[Example]:
    """Read calibration data.

    Args:
        data: an iterable of (image, question, answer) or of dicts as ``vtr eval`` reads them (a Hugging Face dataset is
            one); or what ``--data`` takes: the path of a JSON file of such dicts, of the folder it lies in, ``hf:…``.
            image: a PIL picture, a path or encoded bytes; answer: a string, a list of them (the most frequent is taken)
            or missing. Choices go behind the question, and the answer is then the right one's letter.
        images: the folder that file names of pictures are relative to; the JSON file's own by default.

    Raises:
        TypeError, ValueError: something else; the message names the records.
        FileNotFoundError: no such file.
    """
    folder = None if images is None else Path(images)
    if isinstance(data, (str, Path)):
        source = open_data(str(data), images=folder, answers_needed=False)
        return as_examples(usable(source, source.name))
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"{WANTED}, got {type(data).__name__}")
    if hasattr(data, "cast_column"):
        data = undecoded(data)
    found: list[Example | Sample | Bad] = []
    for index, record in enumerate(data):
        found += _read(record, index, folder)
    usable([one for one in found if not isinstance(one, Example)], "the data")
    return as_examples([one for one in found if not isinstance(one, Bad)])


def _read(record: Any, index: int, folder: Path | None) -> Iterable[Example | Sample | Bad]:
    if isinstance(record, Example):
        return [record]
    if isinstance(record, Sequence) and not isinstance(record, (str, bytes)) and len(record) in (2, 3):
        record = dict(zip(("image", "question", "answer"), record, strict=False))
    if not isinstance(record, Mapping):
        raise TypeError(f"record {index}: {WANTED}")
    return samples_of(index, record, {}, folder, f"record {index}", answers_needed=False)


def as_examples(found: Iterable[Example | Sample]) -> list[Example]:
    """Samples with their pictures opened; examples stay as they are.

    Raises:
        ValueError: pictures that cannot be read, answers that are none of their choices, or nothing at all.
    """
    made, problems = [], []
    for one in found:
        try:
            made.append(one if isinstance(one, Example) else Example(one.picture(), one.asked, one.answer, one.choices))
        except ValueError as error:
            problems.append(str(error))
    refuse(problems, len(made) + len(problems))
    if not made:
        raise ValueError("the data has no records")
    return made
