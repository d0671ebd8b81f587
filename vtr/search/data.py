"""Calibration data: questions about pictures, and a split whose sides share no picture."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

WANTED = "data must be (image, question, answer) triples, dicts with these keys, or the path of a JSONL file"


@dataclass(frozen=True)
class Example:
    """A question about a picture. answer: None where only the model's own answers are needed."""

    image: Image.Image
    question: str
    answer: str | None = None

    @cached_property
    def picture(self) -> str:
        """A digest of the picture's content (size and RGB values): the same picture under another name has the same."""
        rgb = self.image.convert("RGB")
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
        data: an iterable of (image, question, answer) or of dicts with such keys (a Hugging Face dataset is one); the
            path of a JSONL file of such dicts, or of the folder it lies in. image: a PIL picture or a path; answer: a
            string, a list of them (the most frequent is taken) or missing.
        images: the folder that file names of pictures are relative to; the JSONL file's own by default.

    Raises:
        TypeError, ValueError: something else; the message names the record.
        FileNotFoundError: no such file.
    """
    folder = None if images is None else Path(images)
    if isinstance(data, (str, Path)):
        path = _jsonl(Path(data))
        folder, data = folder or path.parent, _lines(path)
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"{WANTED}, got {type(data).__name__}")
    found = [_example(record, index, folder) for index, record in enumerate(data)]
    if not found:
        raise ValueError("the data has no records")
    return found


def _jsonl(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if len(files) != 1:
            raise ValueError(f"{path} holds {len(files)} JSONL files: name one")
        return files[0]
    if not path.is_file():
        raise FileNotFoundError(f"no data at {path}: give a JSONL file, or a folder with one")
    return path


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from error


def _example(record: Any, index: int, folder: Path | None) -> Example:
    if isinstance(record, Example):
        return record
    if isinstance(record, Mapping):
        answer = next((record[key] for key in ("answer", "answers", "label") if record.get(key) is not None), None)
        image, question = record.get("image"), record.get("question")
    elif isinstance(record, Sequence) and not isinstance(record, str) and len(record) in (2, 3):
        image, question, answer = (*record, None)[:3]
    else:
        raise TypeError(f"record {index}: {WANTED}")
    if isinstance(answer, (list, tuple)):
        answer = Counter(map(str, answer)).most_common(1)[0][0] if answer else None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"record {index} has no question")
    if answer is not None and not str(answer).strip():
        raise ValueError(f"record {index} has an empty answer")
    return Example(_picture(image, index, folder), question.strip(), None if answer is None else str(answer).strip())


def _picture(image: Any, index: int, folder: Path | None) -> Image.Image:
    from PIL import Image

    if isinstance(image, (str, Path)):
        try:
            return Image.open(Path(image) if folder is None else folder / image).convert("RGB")
        except OSError as error:
            raise ValueError(f"record {index}: cannot read its picture: {error}") from error
    if not hasattr(image, "convert"):
        raise ValueError(f"record {index}: an image is a PIL picture or a path, got {type(image).__name__}")
    return image.convert("RGB")
