"""The tables of README and docs are made from result files, and a drift is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from vtr.eval.report import readme

from tests import result_files
from vtr.cli import app

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
    assert all(len(row.split("`")[1]) <= 34 for row in rows)
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
