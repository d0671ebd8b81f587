"""The published tables as data: a JSON file each, checked when it is read.

A file is one table of one source: its model, its columns, its unreduced row and its other rows. Nothing is ever taken
from two tables. ``benchmarks.json`` says what a column is (lmms-eval's task and metric, the scale), ``models.json`` how
large a model is. A folder of one's own may have all three kinds; what it names again replaces what is shipped.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import vtr
from vtr.files import read_json

T = TypeVar("T")
SHIPPED = Path(__file__).with_name("data")
BENCHMARKS, MODELS = "benchmarks.json", "models.json"
KINDS = ("mean", "f1", "pairs", "circular", "stderr", "none")
"""How an interval comes about: :mod:`vtr.eval.published.intervals`."""
Number = int | float


@dataclass(frozen=True)
class Benchmark:
    """What a column is.

    Attributes:
        title: as papers write it, with what is counted.
        task: lmms-eval's; None: it cannot be scored here, and ``why`` says so.
        metrics: of the task; their sum is the column.
        scale: times what lmms-eval says is what papers print.
        interval: one of KINDS.
        questions, counted: how many there are, and where that number is from.
        text, answer: tokens of a question with its template, and of an answer; for the estimate of cost alone.
        note: what to know when comparing.
    """

    title: str
    task: str | None = None
    metrics: tuple[str, ...] = ()
    scale: Number = 100
    interval: str = "none"
    questions: int = 0
    counted: str = ""
    text: int = 60
    answer: int = 3
    note: str = ""
    why: str = ""


@dataclass(frozen=True)
class Model:
    """A checkpoint of a table, and sizes for the estimate of cost.

    Attributes:
        checkpoints: names that ``--model`` may have for it.
        text: hidden, intermediate, layers, heads, kv_heads of the decoder.
        vision: hidden, intermediate, layers of the tower, its tokens a tile, tiles, the ``side`` of a tile in tokens of
            the decoder.
        source: where the sizes are from.
    """

    checkpoints: tuple[str, ...]
    text: Mapping[str, int]
    vision: Mapping[str, int]
    source: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A method at a budget, as the table prints it.

    Attributes:
        tokens: as the table says: a count, a share in (0, 1), or None where it says nothing.
        policy: the spec that is this row in vtr; None: vtr cannot be it, and ``why`` says so.
        numbers: column → what is printed. average: its last column.
        certain: whether the numbers were read off the table itself or a copy of its text.
    """

    name: str
    tokens: Number | None = None
    policy: str | None = None
    numbers: Mapping[str, Number] = field(default_factory=dict)
    average: Number | None = None
    certain: bool = True
    note: str = ""
    why: str = ""

    @property
    def label(self) -> str:
        """Name and budget: "VisionZip 64", "HiRED 20 %"."""
        if self.tokens is None:
            return self.name
        return f"{self.name} {self.tokens}" if self.tokens >= 1 else f"{self.name} {100 * self.tokens:g} %"


@dataclass(frozen=True)
class Table:
    """One table of one source.

    Attributes:
        name: of its file. source: paper and table. read: how it was read.
        model: a name of ``models.json``.
        columns: the table's columns → a name of ``benchmarks.json``.
        average: how its last column comes about: ``{"over": columns, "divide": {column: by}}``, with ``"relative":
            true`` the mean of shares of the unreduced row, in percent.
        unreduced: the table's own row without reduction; None: what was read lacks it.
    """

    name: str
    source: str
    read: str
    model: str
    columns: Mapping[str, str]
    rows: tuple[Row, ...]
    unreduced: Mapping[str, Number] | None = None
    average: Mapping[str, Any] | None = None
    certain: bool = True
    notes: tuple[str, ...] = ()

    def runnable(self) -> list[Row]:
        """Rows that vtr can be, and that have numbers to compare with."""
        return [row for row in self.rows if row.policy is not None and row.numbers]


@dataclass(frozen=True)
class Book:
    """All tables that are known, and what they speak of."""

    benchmarks: Mapping[str, Benchmark]
    models: Mapping[str, Model]
    tables: Mapping[str, Table]

    def benchmark(self, table: Table, column: str) -> Benchmark:
        return self.benchmarks[table.columns[column]]

    def scored(self, table: Table) -> list[str]:
        """The columns of a table that lmms-eval can score here."""
        return [column for column in table.columns if self.benchmark(table, column).task is not None]


def read(folders: Iterable[Path] = ()) -> Book:
    """The shipped tables and those of one's own folders.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file that is no such table; names file and place.
    """
    benchmarks: dict[str, Benchmark] = {}
    models: dict[str, Model] = {}
    files: dict[str, Path] = {}
    for folder in (SHIPPED, *folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: --tables names a folder of JSON files")
        for path in sorted(folder.glob("*.json")):
            if path.name == BENCHMARKS:
                benchmarks |= {name: made(Benchmark, one, f"{path}: {name}") for name, one in entries(path)}
            elif path.name == MODELS:
                models |= {name: made(Model, one, f"{path}: {name}") for name, one in entries(path)}
            else:
                files[path.stem] = path
    book = Book(benchmarks, models, {name: table_of(path) for name, path in files.items()})
    for name, one in benchmarks.items():
        check_benchmark(name, one)
    for table in book.tables.values():
        check_table(table, book)
    return book


def entries(path: Path) -> list[tuple[str, Any]]:
    data = read_json(path, "a file of published tables")
    if not isinstance(data, dict):
        raise ValueError(f"{path}: an object of objects by name is wanted")
    return list(data.items())


def table_of(path: Path) -> Table:
    data = dict(entries(path))
    rows = data.pop("rows", None)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{path}: "rows" must be a list of rows')
    kept = tuple(made(Row, row, f"{path}: row {at}") for at, row in enumerate(rows, 1))
    return made(Table, {"name": path.stem, **data, "rows": kept}, str(path))


def made(kind: type[T], data: Any, where: str) -> T:
    """An object of ``kind`` from a JSON object.

    Raises:
        ValueError: names that it does not have, or one that is missing; a value of another kind.
    """
    fields = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    if not isinstance(data, dict):
        raise ValueError(f"{where}: an object is wanted, not {type(data).__name__}")
    if unknown := sorted(set(data) - set(fields)):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}: there are {', '.join(fields)}")
    needed = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - set(data)):
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    for name, value in data.items():
        if not fits(value, hints[name]):
            raise ValueError(f"{where}: {name}={str(value)[:60]!r} is no {fields[name].type}")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the kind that a field is annotated with; NaN and infinity are no numbers."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if kind is Mapping:
        return isinstance(value, dict) and all(fits(one, inner[1]) for one in value.values())
    if kind is tuple:
        return isinstance(value, (list, tuple)) and all(fits(one, inner[0]) for one in value)
    if hint is Any:
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint) and (hint is not float or math.isfinite(value))


def check_benchmark(name: str, one: Benchmark) -> None:
    """Raise ValueError where a benchmark's fields do not go together."""
    if one.interval not in KINDS:
        raise ValueError(f"{BENCHMARKS}: {name}: interval={one.interval!r}: choose one of {', '.join(KINDS)}")
    if one.task is None and not one.why:
        raise ValueError(f"{BENCHMARKS}: {name}: without a task, why says the reason")
    if one.task is not None and not (one.metrics and one.questions > 0 and one.counted):
        raise ValueError(f"{BENCHMARKS}: {name}: a task needs metrics, questions, and counted (where that is from)")


def check_table(table: Table, book: Book) -> None:
    """Raise ValueError unless a table's names are known, its policies are policies, and its numbers have columns."""
    where = f"{table.name}.json"
    if not table.source.strip() or not table.read.strip():
        raise ValueError(f"{where}: every table says its source, and how it was read")
    if table.model not in book.models:
        raise ValueError(f"{where}: model={table.model!r} is not in {MODELS}: {', '.join(book.models)}")
    for column, name in table.columns.items():
        if name not in book.benchmarks:
            raise ValueError(f"{where}: column {column}: {name!r} is not in {BENCHMARKS}")
        if not re.fullmatch(r"[a-z0-9_]+", column):
            raise ValueError(f"{where}: column {column!r}: small letters, digits and _ alone, as --table takes them")
    for row in table.rows:
        if unknown := set(row.numbers) - set(table.columns):
            raise ValueError(f"{where}: {row.label}: numbers of {', '.join(sorted(unknown))}, which is no column")
        if row.policy is None and not row.why:
            raise ValueError(f"{where}: {row.label}: without a policy, why says the reason")
        if row.policy is not None:
            try:
                vtr.policy(row.policy)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}: {row.label}: policy {row.policy!r}: {error}") from error
    if unknown := set(table.unreduced or {}) - set(table.columns):
        raise ValueError(f"{where}: unreduced numbers of {', '.join(sorted(unknown))}, which is no column")
    over = (table.average or {"over": []}).get("over")
    if not isinstance(over, list) or not set(over) <= set(table.columns):
        raise ValueError(f'{where}: average: "over" lists columns of the table, not {str(over)[:60]}')
    labels = [row.label for row in table.rows]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"{where}: two rows are called {', '.join(sorted(twice))}")


def averaged(table: Table, numbers: Mapping[str, Number]) -> float | None:
    """The table's average of a row's numbers; None where a number that it takes is missing."""
    rule = table.average
    if rule is None:
        return None
    over, divide = rule["over"], rule.get("divide", {})
    whole = table.unreduced or {}
    if any(c not in numbers or (rule.get("relative") and c not in whole) for c in over):
        return None
    if rule.get("relative"):
        return sum(100 * numbers[c] / whole[c] for c in over) / len(over)
    return sum(numbers[c] / divide.get(c, 1) for c in over) / len(over)
