"""What policies lose over several evaluations: table, picture, and the marks in Markdown files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from vtr.eval.report import lost, readme, results
from vtr.eval.report.page.data import read

LOST = {
    "none": [0.0, 0.0],
    "uniform": [-0.01, -0.10],
    "fastv": [-0.02, -0.05],
    "pyramid": [-0.30, None],
    "zipvl": [0.0, 0.01],
}
"""Name → what two evaluations lost under it; None: left out."""


def saved(folder: Path, name: str, column: int, **told: Any) -> Path:
    """A result of vtr eval: ``LOST[…][column]``."""
    rows = []
    for policy, both in LOST.items():
        if (difference := both[column]) is None:
            continue
        versus = {"difference": difference, "low": difference - 0.01, "high": difference + 0.01}
        keep = 1.0 if policy == "zipvl" else 0.25
        rows.append({
            "policy": policy, "name": policy, "mean_keep": keep, "accuracy": 0.9 + difference,
            "versus_none": None if policy == "none" else versus,
        })  # fmt: skip
    reference = {"none": 0.9, "no_image": 0.2, "gray": 0.2, "base_lm": None, "majority": 0.2}
    body = {
        "model": "pocket", "data": {"name": "pocket", "samples": 40, "shown": 40, "only_indispensable": False},
        "reference": reference, "policies": rows, "settings": {"budget": 0.25}, **told,
    }  # fmt: skip
    results.save(folder / f"{name}.json", "eval", body, seed=0)
    return folder / f"{name}.json"


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [saved(tmp_path, "a", 0), saved(tmp_path, "b", 1, settings={"budget": 0.2})]


def test_those_that_lose_least_come_first_then_what_keeps_more_and_those_left_out(two: list[Path]) -> None:
    made = lost.table([read(path) for path in two])
    assert [column.label for column in made.columns] == ["policy", "group", "25 %", "20 %"]
    assert [row.name for row in made.rows] == ["fastv", "uniform", "zipvl", "pyramid"]
    fastv, pyramid = made.rows[0].cells, made.rows[3].cells
    assert (fastv[1].text, fastv[2].text, fastv[2].detail) == ("act in the decoder", "−2.0", "[−3.0, −1.0]")
    assert (pyramid[2].text, pyramid[3].text) == ("−30.0", "–")
    assert "25 %: 40 questions, 90.0% without reduction; 20 %: 40 questions" in made.caption


def test_what_keeps_more_than_twice_the_budget_is_marked(two: list[Path]) -> None:
    marked = {row.name: [cell.detail[-1:] for cell in row.cells[2:]] for row in lost.table(list(map(read, two))).rows}
    assert marked == {"zipvl": ["†", "†"], "fastv": ["]", "]"], "uniform": ["]", "]"], "pyramid": ["]", ""]}


@pytest.mark.parametrize(
    ("told", "columns"),
    [
        ({"model": "other"}, ["pocket", "other"]),
        ({"model": "other", "settings": {"budget": 0.5}}, ["pocket, 25 %", "other, 50 %"]),
        ({"settings": {"budget": 64.0}}, ["25 %", "64 tokens"]),
    ],
)
def test_columns_are_called_by_what_differs(told: dict[str, Any], columns: list[str], tmp_path: Path) -> None:
    found = [read(saved(tmp_path, "a", 0)), read(saved(tmp_path, "b", 1, **told))]
    assert lost.labels(found) == columns


def test_of_several_settings_of_a_policy_the_first_counts(tmp_path: Path) -> None:
    path = saved(tmp_path, "a", 0)
    data = json.loads(path.read_text())
    again = {**data["policies"][1], "policy": "uniform:keep=0.1", "versus_none": {"difference": -0.5}}
    path.write_text(json.dumps({**data, "policies": [*data["policies"], again]}))
    assert lost.rows_of(read(path))["uniform"]["policy"] == "uniform"


def test_the_picture_has_every_number_under_its_group(two: list[Path]) -> None:
    (axis, _) = lost.plot([read(path) for path in two]).axes
    said = {text.get_text() for text in axis.texts}
    assert {"−2.0", "−30.0", "+0.0†", "act in the decoder", "look at nothing"} <= said
    lines = [label.get_text() for label in axis.get_yticklabels()]
    assert lines == ["", "uniform", "", "fastv", "zipvl", "pyramid"]


def test_the_command_prints_the_table_and_writes_the_picture(two: list[Path], tmp_path: Path) -> None:
    import typer

    app, run = typer.Typer(), CliRunner()
    app.command()(lost.main)
    out = run.invoke(app, [*map(str, two), "--out", str(tmp_path / "new" / "lost.png")])
    assert out.exit_code == 0 and "| `fastv` | act in the decoder | −2.0 [−3.0, −1.0] |" in out.output
    assert (tmp_path / "new" / "lost.png").stat().st_size > 5000
    results.save(tmp_path / "engine.json", "engine", {"model": {}}, seed=0)
    refused = run.invoke(app, [str(tmp_path / "engine.json")])
    assert refused.exit_code == 1 and "is no result of vtr eval, but of kind 'engine'" in refused.output


def test_markdown_files_have_it_between_marks(two: list[Path]) -> None:
    known = {path.stem: path for path in two}
    made = readme.table("a+b", known)
    assert "| `pyramid` | act in the decoder | −30.0 [−31.0, −29.0] | – |" in made
    assert made.count("\n* Measured by `") == 2
    with pytest.raises(ValueError, match=r"needs c\.json, and there is only a, b"):
        readme.table("a+c", known)


# -- how result files are written --------------------------------------------------------------------------------------
def test_a_row_is_a_line_and_numbers_have_eight_digits(tmp_path: Path) -> None:
    body = {"x": [1, 2.5, None], "names": ["a[\n]", "b"], "rows": [{"y": 1 / 3, "z": ()}, {"y": 2}], "no": []}
    told = results.save(tmp_path / "a.json", "engine", body, seed=0)
    text = (tmp_path / "a.json").read_text()
    assert ' "x": [1, 2.5, null],\n' in text and '\n  {"y": 0.33333333, "z": []},\n  {"y": 2}\n ],\n' in text
    assert json.loads(text) == told and told["names"] == body["names"] and told["no"] == []
