"""Tables of README and docs, made of result files: ``python -m vtr.eval.report.readme`` (``--check`` only compares).

Between ``<!-- vtr:table NAME -->`` and ``<!-- /vtr:table -->`` stands the main table of NAME.json, or with NAME:TABLE
another of its tables (``pocket:kinds``, ``best:short``); with A+B+C what policies lose over several evaluations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from vtr.eval.report import lost
from vtr.eval.report.page import markdown, tables
from vtr.eval.report.page.data import Result, files, per_file, read

OPEN, CLOSE = re.compile(r"<!-- vtr:table (\S+) -->\n"), "<!-- /vtr:table -->"
LIST = re.compile(r" -p '[^']{100,}'")
RESULTS = Path("eval/results")
"""Where result files are kept, beside the README."""
MARKED = (Path("README.md"), Path("docs/results.md"), Path("docs/gpu.md"))
"""The files that have marked tables."""


def render(text: str, results: dict[str, Path]) -> str:
    """``text`` with every marked table made anew from ``results`` (by name, without ``.json``).

    Raises:
        ValueError: a marker without its end, or one that names no result or no table.
    """
    out, at = [], 0
    while start := OPEN.search(text, at):
        end, following = text.find(CLOSE, start.end()), OPEN.search(text, start.end())
        if end < 0 or (following and following.start() < end):
            raise ValueError(f"the marker of table {start[1]} has no end: put {CLOSE} behind the table")
        out += [text[at : start.end()], table(start[1], results)]
        at = end
    return "".join(out) + text[at:]


def table(name: str, results: dict[str, Path]) -> str:
    """The Markdown of table NAME, NAME:TABLE or NAME+NAME+….

    Raises:
        ValueError: no such result, or it has no such table.
    """
    stem, _, part = name.partition(":")
    stems = stem.split("+")
    if missing := next((one for one in stems if one not in results), None):
        raise ValueError(
            f"table {name} needs {missing}.json, and there is only {', '.join(results) or 'no result file'}"
        )
    if len(stems) > 1:
        several = [read(results[one]) for one in stems]
        commands = "\n".join(f"* {measured(one)}" for one in several)
        return f"\n{markdown.table(lost.table(several))}\n{commands}\n\n"
    result = read(results[stem])
    made = {one.name: one for one in per_file(tables.all_of, [result])[0]}
    if part and part not in made:
        raise ValueError(f"{results[stem]} has no table {part!r}: choose one of {', '.join(made)}")
    shown = made[part] if part else next(iter(made.values()))
    return f"\n{markdown.table(shown)}\n{measured(result)}\n\n"


def measured(result: Result) -> str:
    """By which command; one with a long list of policies is cut, the file has all of it."""
    command = result.data["command"]
    brief = LIST.sub(" -p …", command)
    return f"Measured by `{brief}`" + (f" (all of it: `{RESULTS / result.path.name}`)." if brief != command else ".")


def update(readme: Path, paths: Sequence[Path] = (), check: bool = False) -> str:
    """Write a file's tables, or with ``check`` only compare them; says what was done.

    Args:
        readme: the file with markers. paths: result files or folders; by default ``eval/results`` beside the file, or
            beside the folder that it lies in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a table has drifted from its results (``check``), two results of one name, or a bad marker.
    """
    text = readme.read_text(encoding="utf-8")
    marked = len(OPEN.findall(text))
    near = readme.resolve().parent
    beside = near if (near / RESULTS).is_dir() else near.parent
    found = files(paths or [beside / RESULTS]) if marked else []
    results = {path.stem: path for path in found}
    if len(results) < len(found):
        raise ValueError("two result files have the same name: a marker could mean either")
    fresh = render(text, results)
    if check and fresh != text:
        raise ValueError(
            f"tables of {readme} are not those of its results: run python -m vtr.eval.report.readme {readme}"
        )
    if fresh != text:
        readme.write_text(fresh, encoding="utf-8")
    return f"{readme}: {marked} tables " + ("are those of the results" if fresh == text else "written")


def main(
    readme: Annotated[
        Path | None, typer.Argument(help="the file with markers; default: README.md, docs/results.md, docs/gpu.md")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Argument(help="result files or folders; default: eval/results", show_default=False)
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="write nothing; exit with 1 where a table differs")] = False,
) -> None:
    """Write the tables of README and docs from result files.

    Between <!-- vtr:table NAME --> and <!-- /vtr:table --> comes the table of eval/results/NAME.json, or with
    NAME:TABLE another of its tables, e.g. pocket:kinds.
    """
    try:
        for path in [readme] if readme else MARKED:
            print(update(path, results or [], check))
    except (ValueError, OSError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
