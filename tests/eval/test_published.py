"""``vtr eval published`` from its options to its verdicts, over a stand-in for lmms-eval; intervals and words."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner
from vtr.eval.published import compare, intervals
from vtr.eval.published.intervals import Measured, half_digit, measured, share, verdict
from vtr.eval.report import results

from tests.eval import published_tables as made_up
from tests.eval.published_tables import FASTV, RANDOM
from vtr.cli import app
from vtr.commands import _console

STAND_IN = Path(__file__).with_name("stand_in")
NO_PLACE = "eval published --model pocket"


@dataclass
class World:
    """A folder with a made-up table, and lmms-eval as a stand-in says it."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def tell(self, right: dict[str, int], breaks: tuple[str, ...] = ()) -> None:
        (self.folder / "told.json").write_text(json.dumps({"right": right, "breaks": breaks}))

    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def run(self, *more: str, status: int = 0) -> Any:
        words = [*NO_PLACE.split(), "--tables", str(self.folder / "tables"), "--out", str(self.out), *more]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == status, done.output + repr(done.exception)
        return done

    def results(self) -> dict[str, Any]:
        return results.load(self.out / "results.json")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path)
    made_up.write(tmp_path / "tables")
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.setenv("STAND_IN", str(tmp_path / "told.json"))
    monkeypatch.setattr(_console, "console", Console(width=120))
    made.tell({"none": 90, FASTV: 80, RANDOM: 20})
    yield made


# -- from options to verdicts ------------------------------------------------------------------------------------------
def test_ours_stand_beside_the_papers(world: World) -> None:
    said = world.run().stdout
    body = world.results()
    rows = {row["label"]: row["columns"]["vqa"] for row in body["rows"]}
    assert list(rows) == ["unreduced", "FastV 30 %", "random 4"]
    assert [one["ours"] for one in rows.values()] == [90.0, 80.0, 20.0]
    assert [one["verdict"] for one in rows.values()] == ["agrees", "agrees", "below"]
    assert rows["random 4"]["difference"] == pytest.approx(-50.5)
    assert rows["FastV 30 %"]["share"]["ours"] == pytest.approx(800 / 9)
    assert rows["FastV 30 %"]["share"]["paper"] == pytest.approx(90.0)
    assert rows["FastV 30 %"]["share"]["verdict"] == "agrees" and rows["unreduced"]["share"] is None
    assert rows["random 4"]["share"]["verdict"] == "below"
    low, high = stats.binomtest(80, 100).proportion_ci(method="wilson")
    assert (rows["FastV 30 %"]["low"], rows["FastV 30 %"]["high"]) == pytest.approx((100 * low, 100 * high), abs=0.01)
    assert "| FastV 30 % | 80.0 |" in (world.out / "table.md").read_text()
    assert "levels: 2 agrees, 1 below" in said and "Left out: other: it needs weights" in said
    assert body["kind"] == "published" and body["table"] == "made-up" and body["source"] == "made up, Table 1"


def test_a_second_call_runs_nothing_again(world: World) -> None:
    world.run()
    assert [call["policy"] for call in world.calls()] == ["none", FASTV, RANDOM]
    first = world.results()["rows"]
    said = world.run("--markdown").stdout
    assert world.calls() == [] and world.results()["rows"] == first
    assert "| method | ours | 95 % | paper |" in said and "0 of 1" in said and "runs of lmms-eval" not in said
    world.run("-p", "FastV")
    assert world.calls() == [] and [row["label"] for row in world.results()["rows"]] == ["unreduced", "FastV 30 %"]


def test_what_broke_is_said_and_run_by_the_next_call(world: World) -> None:
    world.tell({"none": 90, FASTV: 80, RANDOM: 20}, breaks=(FASTV,))
    said = world.run(status=1).stdout
    assert f"failed: {FASTV}: lmms-eval gave no results (status 0): OSError: no such checkpoint" in said
    assert [row["columns"]["vqa"]["verdict"] for row in world.results()["rows"]] == ["agrees", "not run", "below"]
    assert "log.txt" in said and len(world.calls()) == 3
    world.tell({"none": 0, FASTV: 80, RANDOM: 0})
    world.run()
    assert [call["policy"] for call in world.calls()] == [FASTV]
    assert [row["columns"]["vqa"]["verdict"] for row in world.results()["rows"]] == ["agrees", "agrees", "below"]


def test_what_a_scheduler_has_run_is_read(world: World) -> None:
    """The lines of --commands, typed by somebody else; one of them with another limit, which is not taken."""
    lines = world.run("--commands").stdout.splitlines()
    for line in (lines[0], lines[2] + " --limit 10"):
        subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True, capture_output=True)
    assert len(world.calls()) == 2
    world.run()
    assert [call["policy"] for call in world.calls()] == [FASTV, RANDOM]
    assert [row["columns"]["vqa"]["ours"] for row in world.results()["rows"]] == [90.0, 80.0, 20.0]


def test_where_the_first_breaks_the_others_are_not_tried(world: World) -> None:
    world.tell({}, breaks=("none",))
    done = world.run(status=1)
    assert "RuntimeError: lmms-eval gave no results" in done.output and len(world.calls()) == 1
    assert not (world.out / "results.json").exists()


def test_a_folder_is_of_one_model_and_limit(world: World) -> None:
    world.run("--limit", "50", "-p", "random")
    assert [call["limit"] for call in world.calls()] == ["50", "50"]
    assert "a trial: 50 questions" in (world.out / "table.md").read_text()
    said = world.run(status=1).output
    assert "limit was 50 and is now None" in said and "Give another --out" in said
    assert world.calls() == []


def test_a_dry_run_writes_nothing_and_needs_no_kit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtr.eval.published import kit

    monkeypatch.setattr(kit.importlib.util, "find_spec", lambda name: None)
    said = world.run("--dry-run").stdout
    assert "3 runs of lmms-eval" in said and "GPU hours: under 0.1, at 94 TFLOP/s" in said and not world.out.exists()
    assert f"pretrained=pocket,policy=none,answers={world.out}" in said.replace("\n", "")
    lines = world.run("--commands").stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("python -m lmms_eval --model vtr") for line in lines)
    assert world.run(status=1).output.startswith("RuntimeError: lmms-eval is not installed: pip install")
    assert world.calls() == [] and not world.out.exists()


def test_other_ends_of_the_command(world: World) -> None:
    runner = CliRunner()
    assert "eadp-llava-1.5-7b" in runner.invoke(app, ["eval", "published", "--list"]).stdout
    said = runner.invoke(app, ["eval", "published"])
    assert said.exit_code == 1 and "--model names the checkpoint" in said.output
    said = runner.invoke(app, ["eval", "--limit", "3", "published", "--list"])
    assert said.exit_code == 1 and "--limit in front of published would be vtr eval's own" in said.output
    helped = runner.invoke(app, ["eval", "--help"]).stdout
    assert "--budget" in helped and "published" in helped
    assert "--dry-run" in runner.invoke(app, ["eval", "published", "--help"]).stdout
    assert "No such command" in runner.invoke(app, ["eval", "other"]).output
    world.out.mkdir()
    (world.out / "settings.json").write_text("{")
    assert "not JSON" in world.run(status=1).output


def test_the_tables_fit_eighty_columns(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_console, "console", Console(width=80))
    said = world.run().stdout
    table = said[said.index("method") :]
    assert "…" not in table and "random 4" in table and "95 %" not in table


def test_a_cell_that_somebody_changed_is_refused(world: World) -> None:
    world.run()
    (path,) = world.out.rglob("random*.json")
    path.write_text(json.dumps({"policy": "other", "results": {}}))
    assert "is not what was written there: delete it" in world.run(status=1).output


# -- intervals ---------------------------------------------------------------------------------------------------------
def accuracies(scores: list[float]) -> list[dict[str, Any]]:
    return [{"doc_id": i, "acc": score} for i, score in enumerate(scores)]


def test_graded_scores_are_drawn_and_right_and_wrong_are_wilsons() -> None:
    draw = np.random.default_rng(0)
    graded = [float(x) for x in draw.choice([0.0, 0.3, 0.6, 1.0], 400)]
    mean = sum(graded) / 400
    found = measured("mean", ["acc"], 100, {"acc": mean}, accuracies(graded))
    assert found.interval is not None
    half = 196 * np.std(graded) / 20
    assert found.interval == pytest.approx((100 * mean - half, 100 * mean + half), abs=0.4)
    whole = measured("mean", ["acc"], 100, {"acc": 1.0}, accuracies([1.0] * 12))
    low, high = stats.binomtest(12, 12).proportion_ci(method="wilson")
    assert whole.interval == pytest.approx((100 * low, 100 * high), abs=0.01)


def pope(said: str, truth: str, i: int) -> dict[str, Any]:
    return {"doc_id": i, "f1": {"prediction": said, "ground_truth": truth, "score": float(said == truth)}}


def test_f1_is_drawn_from_hits_and_misses() -> None:
    kinds = (
        [("yes", "yes")] * 60 + [("yes", "no")] * 20 + [("no", "yes")] * 10 + [("no", "no")] * 60 + [("?", "yes")] * 5
    )
    samples = [pope(said, truth, i) for i, (said, truth) in enumerate(kinds)]
    f1 = 2 * 60 / (2 * 60 + 20 + 10)
    found = measured("f1", ["f1"], 100, {"f1": f1}, samples)
    assert found.interval is not None and found.interval[0] < 100 * f1 < found.interval[1]
    assert 8 < found.interval[1] - found.interval[0] < 16


def mme(category: str, question: str, score: float, metric: str = "p") -> dict[str, Any]:
    return {"doc_id": 0, metric: {"category": category, "question_id": question, "score": score}}


def test_mme_adds_up_kinds_of_pairs() -> None:
    samples = [mme("count", "a", 1.0), mme("count", "a", 1.0), mme("count", "b", 1.0), mme("count", "b", 0.0)]
    samples += [mme("color", str(i // 2), float(i % 2)) for i in range(8)]
    samples += [mme("code", "x", 1.0, "c"), mme("code", "x", 1.0, "c")]
    perception = (200 + 50) / 2 + 50
    found = measured("pairs", ["p"], 1, {"p": perception}, samples)
    assert found.value == perception and found.interval == (100.0, 250.0)  # of two pairs of one kind, each or both
    total = measured("pairs", ["p", "c"], 1, {"p": perception, "c": 200.0}, samples)
    assert total.value == perception + 200 and total.interval == (300.0, 450.0)


def test_mmbench_counts_questions_not_orders_of_choices() -> None:
    samples = [{"doc_id": i, "m": {"index": 10**6 * (i % 4) + i // 4}} for i in range(400)]
    found = measured("circular", ["m"], 1, {"m": 64.0}, samples)
    low, high = stats.binomtest(64, 100).proportion_ci(method="wilson")
    assert found.interval == pytest.approx((100 * low, 100 * high), abs=0.01)


def test_without_what_it_takes_there_is_no_interval() -> None:
    good = accuracies([1.0, 0.0, 1.0])
    assert "the logged samples give 66.6667, not 50" in measured("mean", ["acc"], 100, {"acc": 0.5}, good).why
    assert "do not hold what this score" in measured("pairs", ["acc"], 1, {"acc": 0.5}, good).why
    assert measured("f1", ["acc"], 100, {"acc": 0.5}, good).interval is None
    assert measured("circular", ["acc"], 1, {"acc": 50.0}, good).interval is None
    assert measured("none", ["acc"], 100, {"acc": 0.5}, good).why == "no interval is defined for this score"
    assert measured("stderr", ["acc"], 100, {"acc": 0.5, "acc_stderr": 0.01}, []).interval == pytest.approx(
        (48.04, 51.96)
    )
    assert measured("stderr", ["acc"], 100, {"acc": 0.5}, []).interval is None
    with pytest.raises(ValueError, match="lmms-eval gives no acc: there is f1"):
        measured("mean", ["acc"], 100, {"f1": 0.5}, good)


def test_a_share_is_drawn_from_the_same_questions() -> None:
    """Policies that fail on the same questions differ by less than two samples of their own would."""
    whole = [float(i % 10 != 0) for i in range(500)]
    less = [score if i % 17 else 0.0 for i, score in enumerate(whole)]
    results_of = [sum(scores) / 500 for scores in (less, whole)]
    ours, full = (
        measured("mean", ["acc"], 100, {"acc": value}, accuracies(scores))
        for value, scores in zip(results_of, (less, whole), strict=True)
    )
    found = share(ours, full)
    assert found.value == pytest.approx(100 * results_of[0] / results_of[1])
    assert found.interval is not None and ours.interval is not None
    assert found.interval[0] < found.value < found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.9 * (ours.interval[1] - ours.interval[0])
    assert share(ours, Measured(50.0, None)).interval is None
    assert np.isnan(share(ours, Measured(0.0, None)).value)


def test_the_word_counts_the_papers_rounding() -> None:
    assert [half_digit(number) for number in (61.9, 60.07, 1783, 61.0)] == pytest.approx([0.05, 0.005, 0.5, 0.05])
    ours = Measured(60.0, (59.0, 61.0))
    assert [verdict(ours, paper, 0.05) for paper in (58.9, 58.95, 60.0, 61.05, 61.2)] == [
        "above", "agrees", "agrees", "agrees", "below",
    ]  # fmt: skip
    assert verdict(Measured(60.0, None), 60.0, 0.05) == "no interval"


def test_a_table_without_an_unreduced_row_has_no_shares_to_compare() -> None:
    one = Measured(60.0, (59.0, 61.0))
    found = compare.entry(one, Measured(80.0, (79.0, 81.0)), 60.5, None, False)
    assert found["verdict"] == "agrees" and found["share"]["ours"] == 75.0
    assert found["share"]["paper"] is None and found["share"]["verdict"] == "not in the table"
    assert compare.entry(None, None, 60.5, None, False) == {
        "ours": None, "paper": 60.5, "share": None, "verdict": "not run",
    }  # fmt: skip
    assert intervals.DRAWS % intervals.AT_ONCE == 0
