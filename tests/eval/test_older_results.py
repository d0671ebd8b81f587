"""Evaluations from before gain and leakage were MMStar's are read, shown and written as they would be now."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from vtr.eval.report import older, page, results
from vtr.eval.report.page import words
from vtr.eval.report.page.data import read

ROOT = Path(__file__).parents[2]
KEPT = [*ROOT.glob("eval/results/*.json"), *ROOT.glob("docs/results/*.json")]
EVALUATIONS = sorted(path for path in KEPT if '"kind": "eval"' in path.read_text()[:100])


def old(base_lm: str | None = None, shown: int = 4) -> dict[str, Any]:
    """4 questions: 0.75 with the picture, 0.25 with a gray one, 0.5 from text alone."""
    row = {
        "policy": "none", "name": "none", "accuracy": 0.75 if shown == 4 else 1.0, "low": 0.5, "high": 1.0,
        "indispensable": 1.0, "by_kind": {"a": 0.75}, "gain": 0.5, "leakage": 0.0, "vision_tokens": [9.0, 9.0],
        "mean_keep": 1.0, "gflops": 1.0, "kv_mib": 1.0, "prefill_ms": None, "selector_ms": 0.0,
        "versus_none": None,
    }  # fmt: skip
    data = {"name": "d", "samples": 4, "bad": 0, "kinds": ["a"], "shown": shown, "only_indispensable": shown < 4}
    reference = {"none": 0.75, "blind": 0.25, "text_only": 0.5, "majority": 0.25}
    return {"model": "m", "data": data, "reference": reference, "policies": [row], "base_lm": base_lm}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    results.save(tmp_path / "old.json", "eval", old(), seed=0)
    return tmp_path / "old.json"


@pytest.mark.parametrize("shown", [4, 2])
def test_the_text_only_run_of_the_model_is_the_one_without_an_image(shown: int) -> None:
    new = older.renewed({"kind": "eval", **old(shown=shown)})
    assert new["reference"] == {"none": 0.75, "no_image": 0.5, "gray": 0.25, "base_lm": None, "majority": 0.25}
    row = new["policies"][0]
    assert (row["gain"], row["gray_gain"], row["leakage"]) == (0.25, 0.5, None)
    assert {**row, "gain": 0.5, "leakage": 0.0} == {**old(shown=shown)["policies"][0], "gray_gain": 0.5}


def test_of_a_base_language_model_it_is_not(tmp_path: Path) -> None:
    results.save(tmp_path / "a.json", "eval", old("lm"), seed=0)
    new = results.load(tmp_path / "a.json")
    assert new["reference"] == {"none": 0.75, "no_image": None, "gray": 0.25, "base_lm": 0.5, "majority": 0.25}
    assert (new["policies"][0]["gain"], new["policies"][0]["leakage"]) == (None, None)
    assert "multi-modal gain" not in " ".join(text for _, text in words.facts(read(tmp_path / "a.json")))


def test_the_page_shows_both_and_says_why_leakage_is_missing(path: Path, tmp_path: Path) -> None:
    facts = words.facts(read(path))
    assert ("50.0%", "right without an image (MMStar’s S_wv)") in facts
    assert ("25.0%", "right with a gray picture") in facts
    assert ("+25.0", "points of multi-modal gain without reduction (S_v − S_wv)") in facts
    assert ("–", "multi-modal leakage (S_wv − S_t): needs --base-lm") in facts
    page.write([path], tmp_path / "site", csv=True)
    with (tmp_path / "site" / "table.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["gain"], row["gray_gain"], row["leakage"]) == ("0.25", "0.5", "")


def test_files_are_written_anew_once(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.save(tmp_path / "engine.json", "engine", {"reference": 1}, seed=0)
    before = (tmp_path / "engine.json").read_bytes()
    older.main([str(path), str(tmp_path / "engine.json")])
    assert "S_wv 25.0 → 50.0, gain without reduction 50.0 → 25.0, leakage 0.0 → –" in capsys.readouterr().out
    assert json.loads(path.read_text()) == results.load(path) and (tmp_path / "engine.json").read_bytes() == before
    older.main([str(path)])
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        older.main([str(tmp_path / "nowhere.json")])
    assert "nowhere.json" in capsys.readouterr().err


def test_one_that_lacks_something_is_named(path: Path) -> None:
    broken = json.loads(path.read_text())
    del broken["policies"][0]["accuracy"]
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"old\.json is an older result of vtr eval, but lacks 'accuracy'"):
        results.load(path)


@pytest.mark.parametrize("file", EVALUATIONS, ids=lambda path: path.stem)
def test_kept_results_have_the_figures_as_published(file: Path) -> None:
    data = json.loads(file.read_text())
    reference = data["reference"]
    for row in data["policies"]:
        assert row["gain"] == pytest.approx(row["accuracy"] - reference["no_image"])
        assert row["gray_gain"] == pytest.approx(row["accuracy"] - reference["gray"])
        assert row["leakage"] is None and data["base_lm"] is None
