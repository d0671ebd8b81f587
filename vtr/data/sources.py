"""What data there is: the pocket tasks, JSON files, folders, Hugging Face data sets; streamed.

What cannot be used (a line that is no JSON, a missing answer, a broken picture) is a :class:`~vtr.data.records.Bad`
record with its reason: never fatal, never left out of the count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtr import pocket
from vtr.data import files
from vtr.data.pictures import one_line
from vtr.data.records import COLUMNS, Bad, Sample, samples_of
from vtr.data.videos import FRAMES, Video
from vtr.limits import short, similar

if TYPE_CHECKING:
    from PIL import Image

POCKET = "pocket"
FOLDER = "imagefolder"
"""What ``datasets`` calls a folder of pictures."""
POCKET_QUESTIONS, VIDEO_QUESTIONS = 1280, 480
"""How many pocket questions there are about pictures and about videos where no limit is given (the model cards')."""
TASKS = ("questions", "listing", "video", "canvases")
SEVERAL = {"questions": ("per_scene", 8), "canvases": ("per_canvas", 5)}
"""What the number of questions to a picture is called where they are drawn, and how many every picture answers."""
SIDES = (224, 448)
"""Pixels along a side of a canvas: one tile, or four and a thumbnail."""
EXAMPLE = '{"image": "cat.png", "question": "what is this?", "answer": "a cat"}'
Read = Callable[[], Iterator[Sample | Bad]]
Sampled = Callable[..., list[Sample | Bad]]
"""(index, record) → its samples; see :func:`~vtr.data.records.samples_of`."""
NAMED = 3
"""So many bad records are named where they are refused."""


@dataclass(frozen=True)
class Source:
    """A name to show and the records, read anew by every iteration."""

    name: str
    read: Read

    def __iter__(self) -> Iterator[Sample | Bad]:
        return self.read()


def open_data(
    spec: str, *, limit: int | None = None, seed: int = 0, columns: Mapping[str, str] | None = None,
    images: Path | None = None, answers_needed: bool = True, videos: bool = False,
) -> Source:  # fmt: skip
    """The data that ``spec`` names.

    ``pocket``, ``pocket:split=val``, ``pocket:task=video,frames=16``, ``pocket:task=canvases,side=448`` (made from
    ``seed``; "test" otherwise) ·
    ``FILE.jsonl``, or ``FILE.json`` with one array, pictures named relative to ``images`` or to the file · a folder
    with one JSONL file, or saved by ``save_to_disk``, or of pictures as ``datasets``' imagefolder has it ·
    ``hf:NAME,split=test,…`` (what follows goes to ``datasets.load_dataset``, which streams).

    Args:
        limit: read so many samples at most. columns: the data's own name for any of
            :data:`~vtr.data.records.COLUMNS`. answers_needed: a sample without an answer is bad. videos: the caller can
        do with videos.

    Raises:
        ValueError: nothing of that kind, or unknown columns.
        FileNotFoundError: no such file or folder.
    """
    columns = dict(columns or {})
    if unknown := sorted(set(columns) - set(COLUMNS)):
        hint = similar(unknown[0], COLUMNS)
        raise ValueError(f"columns: there is no {unknown[0]!r}{hint}; a sample has {', '.join(COLUMNS)}")
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"images={images}: there is no such folder of pictures")
    head, _, rest = spec.partition(":")
    if head == POCKET:
        if columns or images is not None:
            raise ValueError("the pocket tasks have pictures and columns of their own: leave out images and columns")
        read = _pocket(limit, seed, settings_of(rest), videos)
    else:
        sampled = partial(samples_of, columns=columns, answers_needed=answers_needed)
        if head == "hf":
            name, _, rest = rest.partition(",")
            read = _hub(name, settings_of(rest), partial(sampled, images=images), columns)
        else:
            read = _path(Path(spec), sampled, images, columns)
    return Source(spec, lambda: islice(read(), limit))


def usable(records: Iterable[Sample | Bad], name: str) -> list[Sample]:
    """All records, where all can be used.

    Raises:
        ValueError: some cannot; the message counts them and names the first.
    """
    found = list(records)
    bad = [one for one in found if isinstance(one, Bad)]
    told = [one.reason if one.where else f"record {one.id} of {name}: {one.reason}" for one in bad]
    refuse(told, len(found))
    return [record for record in found if isinstance(record, Sample)]


def refuse(problems: list[str], of: int) -> None:
    """Raise ValueError if there are problems, counted, the first named."""
    if problems:
        more = [f"… and {len(problems) - NAMED} more"] * (len(problems) > NAMED)
        told = "\n".join([*problems[:NAMED], *more])
        raise ValueError(f"{len(problems)} of {of} records cannot be used:\n{told}")


def settings_of(text: str) -> dict[str, str]:
    """``key=value,key=value`` as a dict.

    Raises:
        ValueError: something without ``=``.
    """
    pairs = [item.partition("=") for item in text.split(",") if item]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise ValueError(f"cannot read {wrong[0]!r}: write key=value,key=value")
    return {key.strip(): value.strip() for key, _, value in pairs}


# -- the pocket tasks --------------------------------------------------------------------------------------------------
def _pocket(limit: int | None, seed: int, settings: dict[str, str], videos: bool) -> Read:
    split, task, frames = settings.pop("split", "test"), settings.pop("task", "questions"), settings.pop("frames", None)
    side, each = settings.pop("side", None), settings.pop("per_scene", None)
    if settings or split not in ("train", "val", "test") or task not in TASKS:
        raise ValueError(
            "the pocket tasks have two settings: pocket:split=train, val or test, and task=questions (with per_scene=N "
            "to a picture), listing (all objects of a picture; --metric listing), video (with frames=N) or canvases "
            "(with side=448, per_scene=N)"
        )
    if task == "video":
        if not videos:
            raise ValueError("pocket:task=video asks about videos: only vtr eval takes them")
        draw: Any = partial(pocket.films, frames=_frames(frames))
    elif frames is not None:
        raise ValueError(f"frames={frames}: pictures have none; pocket:task=video has")
    elif task == "canvases":
        draw = partial(pocket.canvases, side=_side(side, split))
    else:
        draw = pocket.samples if task == "questions" else pocket.listings
    if side is not None and task != "canvases":
        raise ValueError(f"side={side}: only pocket:task=canvases has pictures of several sizes")
    if each is not None:
        name, most = SEVERAL.get(task, ("", 0))
        if not each.isdigit() or not 1 <= int(each) <= most:
            raise ValueError(f"per_scene={each}: of task=questions, 1 to 8 to a picture; of task=canvases, 1 to 5")
        draw = partial(draw, **{name: int(each)})
    count = limit if limit is not None else pocket_questions(task)

    def read() -> Iterator[Sample | Bad]:
        groups: dict[int, int] = {}
        seen = []  # keeps ids of pictures apart
        for index, made in enumerate(draw(count, split=split, seed=seed)):
            one = made["frames"] if task == "video" else made["image"]
            if id(one) not in groups:
                seen.append(one)
                groups[id(one)] = len(groups)
            group = f"{split}-{seed}-{groups[id(one)]}"
            source = Video(one, None, list(range(len(one))), len(one)) if task == "video" else one
            answers, load = (made["answer"],), partial(_same, source)
            name = f"{group}-{index}"
            yield Sample(index, name, made["question"], answers, None, made["type"], group, load, source=source)

    return read


def pocket_questions(task: str) -> int:
    """How many questions a pocket task has where no limit is given."""
    return VIDEO_QUESTIONS if task == "video" else POCKET_QUESTIONS


def _side(given: str | None, split: str) -> int:
    if split == "train":
        raise ValueError("the canvases that were trained on are not shipped: split=test or split=val")
    if given is not None and given not in map(str, SIDES):
        raise ValueError(f"side={given}: a canvas has {' or '.join(map(str, SIDES))} pixels along a side")
    return int(given or SIDES[0])


def _frames(given: str | None) -> int:
    if given is None:
        return FRAMES
    if not given.isdigit() or int(given) < FRAMES:
        raise ValueError(f"frames={given}: a film of the pocket task has {FRAMES} frames or more")
    return int(given)


def _same(seen: Image.Image | Video) -> Image.Image | Video:
    return seen


# -- files and folders -------------------------------------------------------------------------------------------------
def _path(path: Path, sampled: Sampled, images: Path | None, columns: Mapping[str, str]) -> Read:
    if path.is_dir():
        lines = sorted(path.glob("*.jsonl"))
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            return _hub(str(path), {}, partial(sampled, images=images), columns)
        if not lines:
            return _hub(FOLDER, {"data_dir": str(path)}, partial(sampled, images=images), columns)
        if len(lines) > 1:
            raise ValueError(f"{path} holds {len(lines)} JSONL files ({lines[0].name}, …): name one of them")
        path = lines[0]
    if not path.is_file():
        there = [str(path.with_name(one.name)) for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"no data at {path}{similar(str(path), [POCKET, *there])}: give pocket, a JSONL file, a folder, or "
            "hf:NAME,split=… for a Hugging Face data set"
        )
    if not files.check(path) and path.suffix not in (".jsonl", ".json", ".ndjson"):
        raise ValueError(f"{path} is no JSONL file: write one JSON object a line, e.g. {EXAMPLE}")
    _check_columns(columns, (record for _, record in files.read(path) if isinstance(record, dict)), str(path))
    return partial(_records, path, partial(sampled, images=images or path.parent))


def _check_columns(columns: Mapping[str, str], records: Iterable[Mapping[str, Any]], name: str) -> None:
    """Raise ValueError if no record has a column that was named. Reads on only until each has been seen."""
    unseen, there = {column: what for what, column in columns.items()}, dict[str, None]()
    for record in records if unseen else ():
        there |= dict.fromkeys(map(str, record))
        unseen = {column: what for column, what in unseen.items() if column not in there}
        if not unseen:
            return
    for column, what in unseen.items() if there else ():
        said = f"columns: {what}={column}, but {name} has no column {column!r}{similar(column, there)}"
        raise ValueError(f"{said}; it has: {short(', '.join(there))}")


def _records(path: Path, sampled: Sampled) -> Iterator[Sample | Bad]:
    index = 0
    for line, found in files.read(path):
        where = f"{path}, line {line}"
        if isinstance(found, str):
            made: list[Sample | Bad] = [Bad(index, str(index), f"{where} {found}", where)]
        else:
            made = sampled(index, found, where=where)
        yield from made
        index += len(made)


# -- Hugging Face ------------------------------------------------------------------------------------------------------
def _hub(name: str, settings: dict[str, str], sampled: Sampled, columns: Mapping[str, str]) -> Read:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("Hugging Face data sets need the package datasets: pip install datasets") from error
    wanted = settings.pop("split", None)
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, **settings, streaming=True)
    except (OSError, ValueError, ConnectionError) as error:
        where = settings.get("data_dir", name) if name == FOLDER else name
        raise ValueError(f"cannot load data set {where}: {one_line(error)}") from error
    data = undecoded(_split(name, found, wanted))
    _check_columns(columns, [data.features] if data.features else data if columns else [], name)

    def read() -> Iterator[Sample | Bad]:
        index = 0
        for record in data:
            made = sampled(index, record)
            yield from made
            index += len(made)

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


def undecoded(data: Any) -> Any:
    """A data set of ``datasets`` with pictures as bytes or paths: a broken one must not end the stream."""
    import datasets

    raw = datasets.Image(decode=False)
    for column, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, raw)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            data = data.cast_column(column, type(feature)(raw))
    return data
