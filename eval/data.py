"""Questions about pictures to evaluate on: the pocket tasks, JSONL files, folders, Hugging Face data sets; streamed.

What cannot be used (a line that is no JSON, a missing answer, a broken picture) is a :class:`Bad` record with its
reason: never fatal, never left out of the count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vtr

if TYPE_CHECKING:
    from PIL import Image

POCKET = "pocket"
POCKET_QUESTIONS = 1280
"""How many pocket questions there are where no limit is given (the model card's)."""
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


class BadPictureError(ValueError):
    """A picture that cannot be read."""


@dataclass(frozen=True)
class Sample:
    """A question about a picture.

    Attributes:
        index: its place in the data, from 0 (bad ones are counted too).
        answers: one, or those of several people. choices: of a multiple-choice question.
        kind: what sort of question. group: which picture; questions about one picture are drawn together.
        load: opens the picture.
    """

    index: int
    id: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None
    kind: str
    group: str
    load: Callable[[], Image.Image]

    def picture(self) -> Image.Image:
        """The picture, decoded, RGB.

        Raises:
            BadPictureError: missing, truncated, not a picture.
        """
        try:
            return self.load().convert("RGB")
        except Exception as error:  # Pillow raises many kinds, by file format
            raise BadPictureError(f"picture: {_one_line(error)}") from error


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used, and why."""

    index: int
    id: str
    reason: str


@dataclass(frozen=True)
class Source:
    """A name to show and the records, read anew by every iteration."""

    name: str
    read: Callable[[], Iterator[Sample | Bad]]

    def __iter__(self) -> Iterator[Sample | Bad]:
        return self.read()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# -- what there is -----------------------------------------------------------------------------------------------------
def open_data(
    spec: str, *, limit: int | None = None, seed: int = 0, columns: Mapping[str, str] | None = None,
    images: Path | None = None,
) -> Source:  # fmt: skip
    """The data that ``spec`` names.

    ``pocket`` or ``pocket:split=val`` (made from ``seed``; "test" otherwise) · ``FILE.jsonl``, pictures named relative
    to ``images`` or to the file · a folder with one JSONL file, or saved by ``save_to_disk``, or of pictures as
    ``datasets``' imagefolder has it · ``hf:NAME,split=test,…`` (what follows goes to ``datasets.load_dataset``, which
    streams).

    Args:
        limit: read so many records at most. columns: the data's own name for any of :data:`COLUMNS`.

    Raises:
        ValueError: nothing of that kind, or unknown columns.
        FileNotFoundError: no such file or folder.
    """
    columns = dict(columns or {})
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise ValueError(f"columns: there is no {unknown[0]!r}; a sample has {', '.join(COLUMNS)}")
    head, _, rest = spec.partition(":")
    if head == POCKET:
        read = _pocket(POCKET_QUESTIONS if limit is None else limit, seed, settings_of(rest))
    elif head == "hf":
        name, _, rest = rest.partition(",")
        read = _hub(name, settings_of(rest), columns)
    else:
        read = _path(Path(spec), columns, images)
    return Source(spec, partial(_first, read, limit))


def _first(read: Callable[[], Iterator[Sample | Bad]], limit: int | None) -> Iterator[Sample | Bad]:
    for count, record in enumerate(read()):
        if limit is not None and count >= limit:
            return
        yield record


def settings_of(text: str) -> dict[str, str]:
    """``key=value,key=value`` as a dict.

    Raises:
        ValueError: something without ``=``.
    """
    pairs = [item.partition("=") for item in text.split(",") if item]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise ValueError(f"cannot read {wrong[0]!r}: write key=value,key=value")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _path(path: Path, columns: dict[str, str], images: Path | None) -> Callable[[], Iterator[Sample | Bad]]:
    if path.is_dir():
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            return _hub(str(path), {}, columns)
        lines = sorted(path.glob("*.jsonl"))
        if not lines:
            return _hub("imagefolder", {"data_dir": str(path)}, columns)
        if len(lines) > 1:
            raise ValueError(f"{path} holds {len(lines)} JSONL files ({lines[0].name}, …): name one of them")
        path = lines[0]
    if not path.is_file():
        raise FileNotFoundError(
            f"no data at {path}: give pocket, a JSONL file, a folder, or hf:NAME,split=… for a Hugging Face data set"
        )
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        raise ValueError(f"{path} is no JSONL file: write one JSON object a line, e.g. {EXAMPLE}")
    return partial(_lines, path, columns, images or path.parent)


EXAMPLE = '{"image": "cat.png", "question": "what is this?", "answer": "a cat"}'


# -- the pocket tasks --------------------------------------------------------------------------------------------------
def _pocket(count: int, seed: int, settings: dict[str, str]) -> Callable[[], Iterator[Sample | Bad]]:
    split, task = settings.pop("split", "test"), settings.pop("task", "questions")
    if settings or split not in ("train", "val", "test") or task not in ("questions", "listing"):
        raise ValueError(
            "the pocket tasks have two settings: pocket:split=train, val or test, and task=questions or listing "
            "(all objects of a picture; --metric listing)"
        )
    draw = vtr.pocket.samples if task == "questions" else vtr.pocket.listings

    def read() -> Iterator[Sample | Bad]:
        groups: dict[int, int] = {}
        pictures = []  # keeps ids of pictures apart
        for index, made in enumerate(draw(count, split=split, seed=seed)):
            image = made["image"]
            if id(image) not in groups:
                pictures.append(image)
                groups[id(image)] = len(groups)
            group = f"{split}-{seed}-{groups[id(image)]}"
            answers, load = (made["answer"],), partial(_same, image)
            yield Sample(index, f"{group}-{index}", made["question"], answers, None, made["type"], group, load)

    return read


def _same(image: Image.Image) -> Image.Image:
    return image


# -- JSONL -------------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=8)
def _open(path: Path, changed: int) -> Image.Image:
    """The file decoded; several questions in a row about one picture decode it once."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _file(path: Path) -> Image.Image:
    return _open(path, path.stat().st_mtime_ns)


def _lines(path: Path, columns: dict[str, str], images: Path) -> Iterator[Sample | Bad]:
    with path.open("rb") as file:
        index = -1
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            index += 1
            try:
                record = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one
                yield Bad(index, str(index), f"line {number} is not JSON: {_one_line(error)}")
                continue
            if not isinstance(record, dict):
                yield Bad(index, str(index), f"line {number} is no JSON object")
                continue
            yield sample_of(index, record, columns, images)


# -- Hugging Face ------------------------------------------------------------------------------------------------------
def _hub(name: str, settings: dict[str, str], columns: dict[str, str]) -> Callable[[], Iterator[Sample | Bad]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("Hugging Face data sets need the package datasets: pip install datasets") from error
    wanted = settings.pop("split", None)
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, **settings, streaming=True)  # type: ignore[arg-type]
    except (OSError, ValueError, ConnectionError) as error:
        raise ValueError(f"cannot load data set {name}: {_one_line(error)}") from error
    data: Any = _split(name, found, wanted)
    data = _undecoded(data, datasets)

    def read() -> Iterator[Sample | Bad]:
        for index, record in enumerate(data):
            yield sample_of(index, record, columns, None)

    return read


def _split(name: str, found: Any, wanted: str | None) -> Any:
    if not isinstance(found, dict):
        return found
    if wanted is None and len(found) == 1:
        return next(iter(found.values()))
    if wanted not in found:
        raise ValueError(
            f"{name} has the splits {', '.join(found)}: name one, e.g. hf:{name},split={next(iter(found))}"
        )
    return found[wanted]


def _undecoded(data: Any, datasets: Any) -> Any:
    """``data`` with pictures as bytes or paths: a broken one must not end the stream."""
    raw = datasets.Image(decode=False)
    for column, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, raw)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            data = data.cast_column(column, type(feature)(raw))
    return data


# -- one record --------------------------------------------------------------------------------------------------------
def sample_of(index: int, record: Mapping[str, Any], columns: Mapping[str, str], images: Path | None) -> Sample | Bad:
    """A record's sample, or what is wrong with it. Pictures are opened later.

    Args:
        images: the folder that a picture's file name is relative to; None where names are paths of their own.
    """
    value = {field: _column(record, field, columns) for field in COLUMNS}
    name = str(index if value["id"] is None else value["id"])
    try:
        choices = _choices(record, value["choices"])
        answers = _answers(value["answers"], choices)
        load, group = _picture(value["image"], images)
        question = value["question"]
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"no question (columns: {', '.join(record)})")
    except ValueError as error:
        return Bad(index, name, str(error))
    group = group if value["group"] is None else str(value["group"])
    kind = "all" if value["kind"] is None else str(value["kind"])
    return Sample(index, name, question.strip(), answers, choices, kind, group or name, load)


def _column(record: Mapping[str, Any], field: str, columns: Mapping[str, str]) -> Any:
    names = (columns[field],) if field in columns else COLUMNS[field]
    return next((record[name] for name in names if record.get(name) is not None), None)


def _choices(record: Mapping[str, Any], value: Any) -> tuple[str, ...] | None:
    if value is None and all(isinstance(record.get(letter), str) for letter in "AB"):  # a column a choice
        value = [record[letter] for letter in "ABCDEFGH" if isinstance(record.get(letter), str)]
    if isinstance(value, Mapping):
        value = value.get("text")
    if value is None or (isinstance(value, Sequence) and not len(value)):
        return None
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"choices must be a list, got {value!r}")
    return tuple(map(str, value))


def _answers(value: Any, choices: tuple[str, ...] | None) -> tuple[str, ...]:
    """Texts. With choices an integer is an index (from 0); of people's answers ``{"answer": …}`` is read."""
    values = value if isinstance(value, (list, tuple)) else [value]
    out = []
    for one in values:
        if isinstance(one, Mapping):
            one = one.get("answer")
        if isinstance(one, int) and not isinstance(one, bool) and choices is not None:
            if not 0 <= one < len(choices):
                raise ValueError(f"answer {one} is no index of {len(choices)} choices")
            one = choices[one]
        if one is not None and str(one).strip():
            out.append(str(one).strip())
    if not out:
        raise ValueError("no answer")
    return tuple(out)


def _picture(value: Any, images: Path | None) -> tuple[Callable[[], Image.Image], str | None]:
    """How to open a picture, and what tells it from others (None where nothing does)."""
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise ValueError(f"{len(value)} pictures; a sample has one")
        value = value[0] if value else None
    if isinstance(value, Mapping):  # datasets' picture, not decoded
        if value.get("bytes"):
            return _bytes(value["bytes"])
        value = value.get("path")
    if isinstance(value, str) and value:
        path = Path(value) if images is None else images / value
        return partial(_file, path), value
    if hasattr(value, "convert"):
        return lambda: value, None
    raise ValueError("no picture")


def _bytes(data: bytes) -> tuple[Callable[[], Image.Image], str]:
    import hashlib
    import io

    from PIL import Image

    return lambda: Image.open(io.BytesIO(data)), hashlib.sha1(data).hexdigest()[:16]
