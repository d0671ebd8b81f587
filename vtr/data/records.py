"""Records → samples: questions about pictures, their answers and choices. What cannot be used says why.

A record is a JSON object or a row of a data set. LLaVA's ``conversations`` make a sample of every question and answer.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtr.data.choices import LETTERS, letter_of, with_choices
from vtr.data.pictures import BadPictureError, one_line, upright
from vtr.data.videos import Video

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = {
    "id": ("id", "question_id", "uid"),
    "image": ("image", "image_path", "file_name", "img", "images"),
    "question": ("question", "query", "prompt"),
    "answers": ("answers", "answer", "label"),
    "choices": ("choices", "options"),
    "kind": ("kind", "category", "question_type", "type"),
    "group": ("group", "image_id"),
}
"""What a sample is made of, and the columns looked for, in this order, where ``--columns`` names none."""
IMAGE_MARK = "<image>"
"""Where LLaVA's data have the picture in a question's text."""
ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")
"""Who speaks in LLaVA's conversations."""


@dataclass(frozen=True)
class Sample:
    """A question about a picture or a video.

    Attributes:
        index: its place in the data, from 0 (bad ones are counted too).
        answers: one, or those of several people; none only where the reader was told that none are needed.
        choices: of a multiple-choice question.
        kind: what sort of question. group: which picture; questions about one picture are drawn together.
        load: opens the picture, or gives a :class:`~vtr.data.videos.Video`.
        where: the file and line it comes from; "" where there is no file.
        source: the picture's path, bytes or PIL picture; None where there is only ``load``.
    """

    index: int
    id: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None
    kind: str
    group: str
    load: Callable[[], Image.Image | Video]
    where: str = ""
    source: Any = field(default=None, repr=False)

    def seen(self) -> Image.Image | Video:
        """What the question is about: the picture, decoded, upright, RGB; or the video.

        Raises:
            BadPictureError: missing, truncated, not a picture; with file and line of the record.
        """
        try:
            found = self.load()
            return found if isinstance(found, Video) else upright(found)
        except Exception as error:  # of ``load``, which may be anybody's
            told = str(error) if isinstance(error, BadPictureError) else f"picture: {one_line(error)}"
            raise BadPictureError(at(self.where, told)) from error

    def picture(self) -> Image.Image:
        """The picture, as :meth:`seen`.

        Raises:
            BadPictureError: as there; or it is a video.
        """
        found = self.seen()
        if isinstance(found, Video):
            raise BadPictureError(at(self.where, "a video, where a picture is wanted"))
        return found

    @property
    def asked(self) -> str:
        """The question as a model gets it: with its choices, if it has any."""
        return with_choices(self.question, self.choices)

    @property
    def answer(self) -> str | None:
        """The one answer to learn or to score: the most frequent (the first of equals); of choices its letter.

        None where there are no answers.

        Raises:
            ValueError: it is none of the choices.
        """
        if not self.answers:
            return None
        answer = Counter(self.answers).most_common(1)[0][0]
        if self.choices is None:
            return answer
        try:
            return letter_of(answer, self.choices)
        except ValueError as error:
            raise ValueError(at(self.where, str(error))) from error


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used, and why. where: the file and line, which ``reason`` begins with; "" without one."""

    index: int
    id: str
    reason: str
    where: str = ""


def at(where: str, told: str) -> str:
    """A message with the file and line it is about, where there is one."""
    return f"{where}: {told}" if where else told


def samples_of(
    index: int, record: Mapping[str, Any], columns: Mapping[str, str], images: Path | None, where: str = "",
    answers_needed: bool = True,
) -> list[Sample | Bad]:  # fmt: skip
    """A record's sample, or what is wrong with it; of a conversation a sample for every question and its answer.

    Pictures are opened later.

    Args:
        index: of the first. images: the folder that a picture's file name is relative to; None where names are paths
            of their own. where: file and line.
    """
    try:
        value = {name: _column(record, name, columns) for name in COLUMNS}
        name = str(index) if value["id"] is None else _name("id", value["id"])
        turns = _turns(record["conversations"]) if value["question"] is None and "conversations" in record else None
    except (ValueError, TypeError, RecursionError) as error:
        return [Bad(index, str(index), at(where, _reason(error)), where)]
    if turns is None:
        value["choices"] = _lettered(record) if value["choices"] is None else value["choices"]
        return [_sample(index, name, value, images, where, answers_needed)]
    own = [name] if len(turns) == 1 else [f"{name}-{n}" for n in range(len(turns))]
    return [
        _sample(index + n, own[n], {**value, "question": question, "answers": answer}, images, where, answers_needed)
        for n, (question, answer) in enumerate(turns)
    ]


def _sample(
    index: int, name: str, value: Mapping[str, Any], images: Path | None, where: str, answers_needed: bool
) -> Sample | Bad:
    try:
        choices = _choices(value["choices"])
        answers = _answers(value["answers"], choices, answers_needed)
        source, group = _picture(value["image"], images)
        question = _question(value["question"])
        group = _name("group", value["group"]) if value["group"] is not None else group or name
        kind = "all" if value["kind"] is None else _name("kind", value["kind"])
    except (ValueError, TypeError, RecursionError) as error:
        return Bad(index, name, at(where, _reason(error)), where)
    load = partial(_file, source) if isinstance(source, Path) else partial(upright, source)
    return Sample(index, name, question, answers, choices, kind, group, load, where, source)


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]


# -- parts of a record -------------------------------------------------------------------------------------------------
def _column(record: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    names = (columns[name],) if name in columns else COLUMNS[name]
    return next((record[one] for one in names if not _missing(record.get(one))), None)


def _missing(value: Any) -> bool:
    """null, or NaN, as tables write what is not there."""
    return value is None or (isinstance(value, float) and value != value)


def _text(what: str, value: Any) -> str:
    """A text or a number, stripped.

    Raises:
        ValueError: something else, or bytes that are no UTF-8.
    """
    if isinstance(value, (Mapping, list, tuple, set, bytes)) or hasattr(value, "convert"):
        raise ValueError(f"{what} must be text, got {_kind(value)}")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is no valid text: half a surrogate pair, or a file that is not UTF-8") from error
    return text


def _name(what: str, value: Any) -> str:
    return _text(what, str(value))


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", bytes: "bytes", str: "text"}
    return names.get(type(value), type(value).__name__)


def _question(value: Any) -> str:
    """The text without the one mark of where the picture stands."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"the question must be text, got {_kind(value)}")
    text = _text("the question", value or "")
    if (marks := text.count(IMAGE_MARK)) > 1:
        raise ValueError(f"the question has {marks} {IMAGE_MARK} marks; a sample has one picture")
    text = text.replace(IMAGE_MARK, "").strip()
    if not text:
        raise ValueError(f"no question (a column called {', '.join(COLUMNS['question'])} or conversations)")
    return text


def _lettered(record: Mapping[str, Any]) -> list[str] | None:
    """Choices that have a column each: A, B, …"""
    if not all(isinstance(record.get(letter), str) for letter in "AB"):
        return None
    return [record[letter] for letter in "ABCDEFGH" if isinstance(record.get(letter), str)]


def _choices(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, Mapping):  # {"text": […], "label": […]}, or {"A": …, "B": …}
        value = value["text"] if "text" in value else _lettered(value) or value
    if value is None or (isinstance(value, Sequence) and not len(value)):
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"choices must be a list, got {_kind(value)}")
    if len(value) > len(LETTERS):
        raise ValueError(f"{len(value)} choices; there are letters for {len(LETTERS)}")
    if any(map(_missing, value)):
        raise ValueError("a choice is null")
    return tuple(_text("a choice", one) for one in value)


def _answers(value: Any, choices: tuple[str, ...] | None, needed: bool) -> tuple[str, ...]:
    """Texts. With choices an integer is an index (from 0); of people's answers ``{"answer": …}`` is read."""
    values = value if isinstance(value, (list, tuple)) else [value]
    out = []
    for one in values:
        if isinstance(one, Mapping):
            one = one.get("answer")
        if _missing(one):
            continue
        if isinstance(one, int) and not isinstance(one, bool) and choices is not None:
            if not 0 <= one < len(choices):
                raise ValueError(f"answer {one} is no index of {len(choices)} choices")
            one = choices[one]
        text = _text("an answer", one)
        if IMAGE_MARK in text:
            raise ValueError(f"an answer has an {IMAGE_MARK} mark")
        out.append(text)
    if out and not any(out):
        raise ValueError("an empty answer")
    if not out and needed:
        raise ValueError("no answer")
    return tuple(text for text in out if text)


def _turns(value: Any) -> list[tuple[str, str]]:
    """Questions and answers of ``[{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]``.

    Raises:
        ValueError: no such list, or the two do not take turns.
    """
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError('conversations must be a list of {"from": "human" or "gpt", "value": …}')
    for number, turn in enumerate(value):
        if turn.get("from") not in (ASKS, ANSWERS)[number % 2]:
            raise ValueError(f"turn {number + 1} is from {str(turn.get('from'))[:40]!r}: human and gpt take turns")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number + 1} must be text, got {_kind(turn.get('value'))}")
    if len(value) % 2:
        raise ValueError("the last turn has no answer")
    return [(asks["value"], says["value"]) for asks, says in zip(value[::2], value[1::2], strict=True)]


# -- its picture -------------------------------------------------------------------------------------------------------
def _picture(value: Any, images: Path | None) -> tuple[Any, str | None]:
    """A picture's path, bytes or PIL picture, and what tells it from others (None where nothing does)."""
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise ValueError(f"{len(value)} pictures; a sample has one")
        value = value[0] if value else None
    if isinstance(value, Mapping):  # datasets' picture, not decoded
        data = value.get("bytes")
        if data is not None and not isinstance(data, bytes):
            raise ValueError(f"no picture: its bytes are {_kind(data)}")
        value = data or value.get("path")
    if isinstance(value, bytes) and value:
        return value, hashlib.sha1(value).hexdigest()[:16]
    if isinstance(value, (str, Path)) and _text("the picture's name", value):
        name = str(value)
        return Path(name) if images is None else images / name, name
    if hasattr(value, "convert"):
        return value, None
    raise ValueError("no picture" if not value else f"no picture: a file's name is text, got {_kind(value)}")


@lru_cache(maxsize=8)
def _open(path: Path, changed: int) -> Image.Image:
    """The file decoded; several questions in a row about one picture decode it once."""
    return upright(path)


def _file(path: Path) -> Image.Image:
    return _open(path, path.stat().st_mtime_ns)
