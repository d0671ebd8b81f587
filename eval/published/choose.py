"""Which table, which of its rows, which of its columns: as asked, or as the model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtr.eval.published.tables import Benchmark, Book, Row, Table

from vtr.limits import similar

NONE = Row("unreduced", policy="none")
NEAREST = 5
"""So many tables are named where none has all that is asked."""


@dataclass(frozen=True)
class Chosen:
    """What is to be compared. ``because``: why this table. ``left_out``: row or column → reason."""

    table: Table
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    because: str
    left_out: dict[str, str]


def choose(book: Book, model: str, source: str | None, columns: Sequence[str], policies: Sequence[str]) -> Chosen:
    """The table, rows and columns that were asked for.

    Args:
        source: a table's name; None: the one about this model that has what is asked, its own unreduced row, and the
            most rows that vtr can be.
        columns: of the table; none: all that lmms-eval can score here.
        policies: names of its rows, with or without the budget, or their specs; none: all that vtr can be.

    Raises:
        ValueError: no table, or several as good; a column or a row that there is not, or that cannot be run.
    """
    if source is None:
        table, because = chosen_by_model(book, model, columns, policies)
    elif source in book.tables:
        table = book.tables[source]
        known = book.models[table.model].checkpoints
        because = "named by --source"
        if model not in known:
            because += f"; the table is about {table.model} ({known[0]}): that {model} is one, you say"
    else:
        raise ValueError(f"--source {source}{similar(source, book.tables)}: there is {', '.join(sorted(book.tables))}")
    left_out: dict[str, str] = {}
    kept = columns_of(book, table, columns, left_out)
    rows = rows_of(table, kept, policies, left_out)
    return Chosen(table, rows, kept, because, left_out)


def chosen_by_model(book: Book, model: str, columns: Sequence[str], policies: Sequence[str]) -> tuple[Table, str]:
    about = [t for t in book.tables.values() if model.lower() in map(str.lower, book.models[t.model].checkpoints)]
    if not about:
        known = sorted({name for t in book.tables.values() for name in book.models[t.model].checkpoints[:1]})
        raise ValueError(
            f"no table is about --model {model}: there are tables about {', '.join(known)}. Of a folder that holds one "
            "of these, name the table too: --source (vtr eval published --list shows all)"
        )
    fit = [t for t in about if fits(book, t, columns, policies)]
    if not fit:
        lacks = {t.name: missing_in(book, t, columns, policies) for t in about}
        near = sorted(lacks, key=lambda name: (len(lacks[name]), name))[:NEAREST]
        wanted = ", ".join([*columns, *policies])
        said = "; ".join(
            f"{name} lacks {', '.join(lacks[name]) or 'numbers of these rows in these columns'}" for name in near
        )
        raise ValueError(f"no single table about {model} has {wanted}, and tables are never mixed: {said}")
    order = {t.name: (t.unreduced is not None, t.certain, len(useful(t, columns))) for t in fit}
    best = [t for t in fit if order[t.name] == max(order.values())]
    if len(best) > 1:
        raise ValueError(f"several tables are as good: --source {' or --source '.join(t.name for t in best)}")
    others = [t.name for t in fit if t is not best[0]]
    if not others:
        return best[0], f"the only table about {model} that has these columns"
    most = "its own unreduced row and " if best[0].unreduced is not None else ""
    many = f"{len(useful(best[0], columns))} rows that vtr can be"
    return best[0], f"it has {most}{many}; these have the columns too (--source): {', '.join(others)}"


def missing_in(book: Book, table: Table, columns: Sequence[str], policies: Sequence[str]) -> list[str]:
    """Columns and rows that a table cannot give."""
    rows = useful(table, columns)
    scored = book.scored(table)
    without = [name for name in policies if not any(is_called(row, name) for row in rows)]
    return [*(name for name in columns if name not in scored), *without]


def fits(book: Book, table: Table, columns: Sequence[str], policies: Sequence[str]) -> bool:
    """Whether a table can give all columns and all rows that are asked for."""
    return bool(useful(table, columns)) and not missing_in(book, table, columns, policies)


def useful(table: Table, columns: Sequence[str]) -> list[Row]:
    """Rows that vtr can be, with a number in one of the columns."""
    return [row for row in table.runnable() if not columns or set(columns) & set(row.numbers)]


def is_called(row: Row, name: str) -> bool:
    """Whether a row is meant: "VisionZip", "visionzip 64", or its spec."""
    return name.lower() in (row.name.lower(), row.label.lower()) or name == row.policy


def columns_of(book: Book, table: Table, columns: Sequence[str], left_out: dict[str, str]) -> tuple[str, ...]:
    for name in columns:
        if name not in table.columns:
            raise ValueError(
                f"--table {name}{similar(name, table.columns)}: {table.name} has {', '.join(table.columns)}"
            )
        one = book.benchmark(table, name)
        if one.task is None:
            raise ValueError(f"--table {name}: {one.title}: {one.why}; leave it out")
    if columns:
        return tuple(dict.fromkeys(columns))
    left_out |= {name: book.benchmark(table, name).why for name in table.columns if name not in book.scored(table)}
    return tuple(book.scored(table))


def rows_of(table: Table, columns: Sequence[str], policies: Sequence[str], left_out: dict[str, str]) -> tuple[Row, ...]:
    for name in policies:
        found = [row for row in table.rows if is_called(row, name)]
        if not found:
            labels = [row.label for row in table.rows]
            near = similar(name, [*labels, *(row.name for row in table.rows)])
            raise ValueError(f"--policies {name}{near}: {table.name} has {', '.join(labels)}")
        if not any(row in useful(table, columns) for row in found):
            why = found[0].why or "of these columns the table has no number of it"
            raise ValueError(f"--policies {name}: {found[0].label} cannot be compared: {why}")
    for row in () if policies else table.rows:
        if row not in useful(table, columns):
            left_out[row.label] = row.why or "the table's average alone is known, or no number in these columns"
    rows = useful(table, columns)
    return tuple(row for row in rows if not policies or any(is_called(row, name) for name in policies))


def tasks_of(book: Book, chosen: Chosen) -> dict[str, Benchmark]:
    """lmms-eval's tasks of the chosen columns, each once."""
    found: dict[str, Benchmark] = {}
    for column in chosen.columns:
        one = book.benchmark(chosen.table, column)
        assert one.task is not None
        found.setdefault(one.task, one)
    return found
