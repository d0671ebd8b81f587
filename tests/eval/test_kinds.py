"""Accuracy by type of question, of committed results; and what fixed scales reach with as many tokens as a chooser."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner
from vtr.eval.accuracy import kinds
from vtr.eval.report import results
from vtr.eval.studies.autoscale import frontier

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_every_policy_has_a_line_and_every_type_a_column(tmp_path: Path) -> None:
    found = results.load(RESULTS / "globalcom2.json")
    rows = kinds.lines({"": found})
    assert [row["spec"] for row in rows] == [row["policy"] for row in found["policies"]]
    table = kinds.markdown(rows).splitlines()
    assert len(table) == len(rows) + 2 and all(line.count("|") == table[0].count("|") for line in table)
    panels = [panel.get_title() for panel in kinds.plot(rows).axes if panel.get_title()]
    assert panels == ["all", *found["data"]["kinds"]]
    assert kinds.label("globalcom2:retention=0.5,temperature=Infinity") == "globalcom2 temperature=Infinity"


def test_two_results_need_names_and_the_same_questions() -> None:
    two = {name: results.load(RESULTS / f"m3-{name}.json") for name in ("trained", "before")}
    specs = [row["spec"] for row in kinds.lines(two)]
    assert "none (trained)" in specs and "none (before)" in specs
    with pytest.raises(ValueError, match="the first on 480"):
        kinds.lines({**two, "other": results.load(RESULTS / "globalcom2.json")})
    with pytest.raises(ValueError, match="not of vtr eval"):
        kinds.lines({"": {"kind": "batch"}})
    import typer

    app = typer.Typer()
    app.command()(kinds.main)
    same = str(RESULTS / "globalcom2.json")
    assert CliRunner().invoke(app, [same, same]).exit_code == 1


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    assert (RESULTS / "globalcom2.md").read_text() == kinds.markdown(
        kinds.lines({"": results.load(RESULTS / "globalcom2.json")})
    )
    two = {name: results.load(RESULTS / f"m3-{name}.json") for name in ("trained", "before")}
    assert (RESULTS / "m3.md").read_text() == kinds.markdown(kinds.lines(two))


def test_what_fixed_scales_reach() -> None:
    fixed = [(10.0, 0.5), (100.0, 0.9), (1000.0, 0.8)]
    assert frontier(fixed, 10) == 0.5 and frontier(fixed, 1000) == 0.9  # a finer scale that is worse is not taken
    assert frontier(fixed, 10**1.5) == pytest.approx(0.7)
