"""The table of features is what its data make, and its data say where each value was read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from vtr.eval.report import features

ROOT = Path(__file__).parents[2]
DATA = features.load(ROOT / features.DATA)
PRAISE = re.compile(
    r"\b(easy|easily|simple|simply|powerful|fast|faster|best|better|comprehensive|efficient|flexible|great|only|modern|poor|"
    r"limited|slow|outdated|rich|robust|mature|seamless\w*|state-of-the-art)\b",
    re.I,
)


def test_the_page_is_what_its_data_make() -> None:
    assert (ROOT / features.PAGE).read_text() == features.page(DATA), "python -m vtr.eval.report.features"


@pytest.mark.parametrize("project", DATA["projects"], ids=lambda project: project["name"])
def test_every_cell_is_on_the_page_with_its_sources(project: dict[str, Any]) -> None:
    """A value in the table; below it again, with a link to each file at the commit, or with where was looked."""
    text = (ROOT / features.PAGE).read_text()
    (row,) = (line for line in text.splitlines() if line.startswith(f"| **{project['name']}** |"))
    assert row.count(" | ") == len(DATA["features"])
    below = text.partition(f"\n## {project['name']}\n")[2].partition("\n## ")[0]
    for key, cell in project["cells"].items():
        title = next(one["title"] for one in DATA["features"] if one["key"] == key)
        (line,) = (line for line in below.splitlines() if line.startswith(f"* {title}: "))
        assert features.value(project, cell) in row and features.value(project, cell) in line
        assert cell.get("looked", "") in line and cell.get("note", "") in line
        for source in cell.get("sources", []):
            assert f"({features.link(project, source)})" in line
            if "repository" not in project:
                assert (ROOT / source.partition("#")[0]).exists(), source
    assert f"[{features.policies()} policies](policies.md)" in text


def test_no_word_judges() -> None:
    cells = [cell for project in DATA["projects"] for cell in project["cells"].values()]
    said = "\n".join(cell[key] for cell in cells for key in ("value", "note") if key in cell)
    assert PRAISE.findall(re.sub("“[^”]*”", "", said)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.pop("commit"), "AngelSlim has no commit of 40"),
        (lambda one: one["cells"].pop("batch"), "the cells of AngelSlim are methods, families, request"),
        (lambda one: one["cells"]["batch"].update(value=""), "AngelSlim, batch: no value"),
        (lambda one: one["cells"]["batch"].pop("sources"), "AngelSlim, batch: no source"),
        (lambda one: one["cells"]["serving"].pop("looked"), "AngelSlim, serving: not found, and it does not say where"),
        (lambda one: one["cells"]["batch"].update(source="x"), "AngelSlim, batch: a cell has no source"),
        (lambda one: one["cells"]["batch"].update(sources=["a b"]), "'a b' is no path of a file"),
    ],
)
def test_data_without_a_source_are_refused(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    data = json.loads((ROOT / features.DATA).read_text())
    change(data["projects"][1])
    (tmp_path / "compare.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(message)):
        features.load(tmp_path / "compare.json")


def test_the_command_writes_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    program = typer.Typer()
    program.command()(features.main)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "compare.json").write_text((ROOT / features.DATA).read_text())
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(program, []).exit_code == 0
    assert (tmp_path / features.PAGE).read_text() == (ROOT / features.PAGE).read_text()
    assert CliRunner().invoke(program, ["--check"]).exit_code == 0
    (tmp_path / features.PAGE).write_text("old")
    result = CliRunner().invoke(program, ["--check"])
    assert result.exit_code == 1 and "run python -m vtr.eval.report.features" in result.output
