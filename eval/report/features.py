"""The table of features in docs/compare.md, made of docs/compare.json: ``python -m vtr.eval.report.features``.

A cell of the data has a ``value``, and the files it was read from (``sources``: path, or path#Lline, in the project's
repository at its commit; of vtr itself: path in this repository); where something was not found, where was ``looked``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.files import read_json
from vtr.groups import OTHERS, TOGETHER, grouped

DATA, PAGE = Path("docs/compare.json"), Path("docs/compare.md")
NOT_FOUND = "not found"
COMMIT = re.compile(r"[0-9a-f]{40}")
SOURCE = re.compile(r"[\w./-]+(#[\w-]+)?")


def load(path: Path = DATA) -> dict[str, Any]:
    """The data, checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a project without repository and commit, a cell that is missing or says neither where it was read
            nor where was looked.
    """
    data = read_json(path, "the data of the table of features")
    keys = [one["key"] for one in data["features"]]
    for project in data["projects"]:
        name, cells = project["name"], project["cells"]
        if "repository" in project and not COMMIT.fullmatch(project.get("commit", "")):
            raise ValueError(f"{path}: {name} has no commit of 40 hexadecimal digits")
        if list(cells) != keys:
            raise ValueError(f"{path}: the cells of {name} are {', '.join(cells)}; the features are {', '.join(keys)}")
        for key, cell in cells.items():
            _check(f"{path}: {name}, {key}", cell, dated=key == "date")
    return data


def _check(where: str, cell: dict[str, Any], dated: bool) -> None:
    sources = cell.get("sources", [])
    if unknown := set(cell) - {"value", "note", "sources", "looked"}:
        raise ValueError(f"{where}: a cell has no {', '.join(sorted(unknown))}")
    if not cell.get("value"):
        raise ValueError(f"{where}: no value")
    if cell["value"] == NOT_FOUND and not cell.get("looked"):
        raise ValueError(f"{where}: not found, and it does not say where was looked")
    if not sources and not cell.get("looked") and not dated:
        raise ValueError(f"{where}: no source")
    if strange := [source for source in sources if not SOURCE.fullmatch(source)]:
        raise ValueError(f"{where}: {strange[0]!r} is no path of a file, with #L and a line where useful")


def link(project: dict[str, Any], source: str) -> str:
    """Where a source can be read: at the commit, or in this repository."""
    if "repository" in project:
        return f"https://github.com/{project['repository']}/blob/{project['commit']}/{source}"
    return source.removeprefix("docs/") if source.startswith("docs/") else f"../{source}"


def value(project: dict[str, Any], cell: dict[str, Any]) -> str:
    """A cell's value; of ours with what the code says."""
    if "repository" in project:
        return cell["value"]
    return cell["value"].replace("{policies}", str(policies()))


def policies() -> int:
    """How many policies vtr itself has; those made of others are not counted."""
    return sum(len(names) for title, names in grouped().items() if title not in (OTHERS, TOGETHER))


def short(project: dict[str, Any], key: str) -> str:
    """A cell of the table: the value, a link to its first source."""
    cell = project["cells"][key]
    said, sources = value(project, cell), cell.get("sources", [])
    if key == "date" and "repository" in project:
        return f"[{said}](https://github.com/{project['repository']}/commit/{project['commit']})"
    return f"[{said}]({link(project, sources[0])})" if sources and said != NOT_FOUND else said


def long(project: dict[str, Any], feature: dict[str, str]) -> str:
    """A line of the list below the table: value, where was looked, note, every source."""
    cell = project["cells"][feature["key"]]
    parts = [f"* {feature['title']}: {value(project, cell)}."]
    if looked := cell.get("looked"):
        parts.append(f"Looked in {looked}.")
    if note := cell.get("note"):
        parts.append(note)
    links = [f"[{source}]({link(project, source)})" for source in cell.get("sources", [])]
    return " ".join(parts + ([f"({', '.join(links)})"] if links else []))


def page(data: dict[str, Any]) -> str:
    """The whole page."""
    features, projects = data["features"], data["projects"]
    lines = [
        "# Beside other packages",
        "",
        "<!-- made of compare.json by: python -m vtr.eval.report.features -->",
        "",
        "What packages that drop vision tokens, or shorten the cache, have: read off their code. Every value leads to",
        "the file it was read from, at the commit named below. Of what was not found, it says below where was looked.",
        "How some of them do beside vtr on one machine: [other packages](kits.md), [what came out](results.md).",
        "",
        "| | " + " | ".join(feature["title"] for feature in features) + " |",
        "|---|" + "---|" * len(features),
    ]
    for project in projects:
        cells = [short(project, feature["key"]) for feature in features]
        lines.append(f"| **{project['name']}** | " + " | ".join(cells) + " |")
    lines += ["", "What a column means:", ""]
    lines += [f"* {feature['title']}: {feature['meaning']}" for feature in features]
    for project in projects:
        lines += ["", f"## {project['name']}", ""]
        if "repository" in project:
            repository, commit = project["repository"], project["commit"]
            lines += [f"[{repository}](https://github.com/{repository}) at [`{commit[:10]}`]"
                      f"(https://github.com/{repository}/tree/{commit}).", ""]  # fmt: skip
        lines += [long(project, feature) for feature in features]
    return "\n".join(lines) + "\n"


def main(
    check: Annotated[bool, typer.Option("--check", help="write nothing; exit with 1 where the page differs")] = False,
) -> None:
    """Write docs/compare.md from docs/compare.json."""
    try:
        fresh = page(load())
        if check and fresh != PAGE.read_text(encoding="utf-8"):
            raise ValueError(f"{PAGE} is not what {DATA} makes: run python -m vtr.eval.report.features")
        if not check:
            PAGE.write_text(fresh, encoding="utf-8")
    except (ValueError, LookupError, OSError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    print(f"{PAGE}: {'is what its data make' if check else 'written'}")


if __name__ == "__main__":
    typer.run(main)
