"""The tables of README and docs are made from result files, and a drift is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from vtr.eval.report import readme
from vtr.eval.studies.best import best

from tests import result_files
from vtr.cli import app

ROOT = Path(__file__).parents[2]
END = "<!-- /vtr:table -->"


def command() -> typer.Typer:
    """``python -m vtr.eval.report.readme``."""
    program = typer.Typer()
    program.command()(readme.main)
    return program


@pytest.mark.parametrize("name", readme.MARKED, ids=str)
def test_the_tables_are_those_of_the_results(name: Path) -> None:
    file = Path(__file__).parents[2] / name
    assert readme.OPEN.search(file.read_text()), "a file without a table need not be named"
    readme.update(file, check=True)


def test_the_readmes_tables_are_written_and_drift_is_noticed(tmp_path: Path) -> None:
    result_files.write(tmp_path / "eval" / "results", "eval", "scale")
    text = f"a\n<!-- vtr:table eval -->\nold\n{END}\nb\n<!-- vtr:table eval:kinds -->\n{END}\nc\n"
    mine = tmp_path / "README.md"
    mine.write_text(text)
    runner = CliRunner()
    program = command()
    stale = runner.invoke(program, [str(mine), "--check"])
    assert stale.exit_code == 1 and "run python -m vtr.eval.report.readme" in stale.output and mine.read_text() == text
    assert runner.invoke(program, [str(mine)]).exit_code == 0
    fresh = mine.read_text()
    assert fresh.startswith("a\n<!-- vtr:table eval -->\n\n| policy | accuracy |") and fresh.endswith(
        "<!-- /vtr:table -->\nc\n"
    )
    assert "old" not in fresh and "\nb\n" in fresh and "| `fastv:keep=0.1,layer=2` |" in fresh
    assert "| policy | color | shape |" in fresh and f"Measured by `{result_files.COMMANDS['eval']}`." in fresh
    assert runner.invoke(program, [str(mine), "--check"]).exit_code == 0
    mine.write_text(fresh.replace("99.1%", "99.9%"))
    assert runner.invoke(program, [str(mine), "--check"]).exit_code == 1
    assert runner.invoke(app, ["page", str(tmp_path / "eval" / "results"), "--readme", str(mine)]).exit_code == 0
    assert mine.read_text() == fresh


def test_the_short_table_has_five_columns(tmp_path: Path) -> None:
    """Policy, accuracy, tokens, FLOPs, time: no reduction first, long specs cut."""
    paths = result_files.write(tmp_path, "eval")
    lines = readme.table("eval:short", {path.stem: path for path in paths}).splitlines()
    assert lines[1] == "| policy | accuracy | tokens | GFLOPs | prefill |"
    rows = [line for line in lines if line.startswith("| `")]
    assert rows[0].startswith("| `none` |") and all(row.count("|") == 6 for row in rows)
    assert all(len(row.split("`")[1]) <= 38 for row in rows)
    assert "(100%) |" in rows[0] and "×)" in rows[1] and "×)" not in rows[0]


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("<!-- vtr:table eval -->\n", "has no end"),
        ("<!-- vtr:table eval -->\n<!-- vtr:table eval -->\n<!-- /vtr:table -->", "has no end"),
        ("<!-- vtr:table nothing -->\n<!-- /vtr:table -->", "needs nothing.json, and there is only eval"),
        ("<!-- vtr:table eval:x -->\n<!-- /vtr:table -->", "no table 'x': choose one of leaderboard, kinds"),
    ],
)
def test_bad_markers(marker: str, message: str, tmp_path: Path) -> None:
    paths = result_files.write(tmp_path, "eval")
    (tmp_path / "README.md").write_text(marker)
    with pytest.raises(ValueError, match=message):
        readme.update(tmp_path / "README.md", paths)
    assert (tmp_path / "README.md").read_text() == marker


def test_the_best_setting_of_every_policy() -> None:
    rows = [
        {"policy": "none", "name": "none", "accuracy": 1.0, "mean_keep": 1.0, "gflops": 9.0},
        {"policy": "a:1", "name": "a", "accuracy": 0.90, "mean_keep": 0.25, "gflops": 2.0},
        {"policy": "a:2", "name": "a", "accuracy": 0.95, "mean_keep": 0.26, "gflops": 3.0},
        {"policy": "a:3", "name": "a", "accuracy": 0.99, "mean_keep": 0.50, "gflops": 4.0},
        {"policy": "b:1", "name": "b", "accuracy": 0.955, "mean_keep": 0.25, "gflops": 3.0},
        {"policy": "b:2", "name": "b", "accuracy": 0.95, "mean_keep": 0.25, "gflops": 2.0},
    ]
    assert best(rows, 0.265) == ["a:2", "b:2"], "within the budget; within a point the cheaper one"
    assert best(rows, 0.6, tie=0.0) == ["a:3", "b:1"]
    with pytest.raises(ValueError, match=r"no setting of a keeps at most 10\.0%: the least is 25\.0%"):
        best(rows, 0.1)


def test_the_table_of_best_settings_has_the_best_of_the_settings_compared_on_other_questions() -> None:
    settings, reported = (
        json.loads((ROOT / path).read_text()) for path in ("docs/results/settings.json", "eval/results/best.json")
    )
    assert settings["seed"] != reported["seed"]
    assert best(settings["policies"], 0.265) == [
        row["policy"] for row in reported["policies"] if row["policy"] != "none"
    ]
