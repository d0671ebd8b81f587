"""`vtr search`: files, report, refusals; other policies set to equal FLOPs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from vtr.eval.studies import equal_flops, schedule_report

import vtr
from tests.search.search_models import questions, short
from vtr.cli import app
from vtr.pocket.evaluate import answers
from vtr.search import Cost
from vtr.search.prefix import Scorer

ALL = {
    "curve.png", "ranks.png", "report.json", "report.md", "schedule.json", "search.json", "state.json",
    "vtr_policy.json",
}  # fmt: skip


def small_data(folder: Path, count: int = 8) -> Path:
    """A JSONL of small pictures, two questions each."""
    lines = []
    for i, one in enumerate(questions(count)):
        one.image.save(folder / f"{i // 2}.png")
        lines.append(json.dumps({"image": f"{i // 2}.png", "question": one.question, "answer": one.answer}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["gsearch", "psigmoid"])
def test_the_command_writes_a_schedule_with_a_report_and_goes_on_from_its_state(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "schedule"
    args = ["search", kind, "--out", str(out), "--data", str(small_data(tmp_path))]
    args += ["--calibration", "4", "--evaluation", "4", "--latency", "1", "--start", "6"]
    args += ["--tolerance", "0.05"] if kind == "gsearch" else ["--budget", "0.7", "--trials", "3"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == ALL
    policy = vtr.GSearch.from_pretrained(out)
    assert isinstance(policy, vtr.GSearch) and len(policy.schedule) == 10 and policy.schedule[5] == 1.0
    report = json.loads((out / "report.json").read_text())
    lines = {line["name"]: line for line in report["lines"]}
    mine = "gsearch-bisect" if kind == "gsearch" else "psigmoid"
    assert set(lines) == {"none", mine, "FastV", "Pyramid", "uniform"}
    assert lines["none"]["mean_keep"] == 1.0 and lines[mine]["prefill_ms"]["median"] > 0
    for name in ("FastV", "Pyramid", "uniform"):
        assert lines[name]["flops"] == pytest.approx(lines[mine]["flops"], rel=0.03)
    assert "layer-forwards" in result.output and "McNemar" in (out / "report.md").read_text()
    before = (out / "schedule.json").read_text()
    again = CliRunner().invoke(app, args)
    assert again.exit_code == 0 and (out / "schedule.json").read_text() == before
    assert json.loads((out / "search.json").read_text())["resumed"] > 0


@pytest.mark.parametrize(("kind", "more"), [("vtw", ["--threshold", "9"]), ("fitprune", ["--reduction", "0.3"])])
def test_the_other_searches_write_a_policy(kind: str, more: list[str], tmp_path: Path) -> None:
    out = tmp_path / "found"
    args = ["search", kind, "--out", str(out), "--data", str(small_data(tmp_path, 4)), "--calibration", "2"]
    result = CliRunner().invoke(app, [*args, *more])
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"search.json", "vtr_policy.json"}
    policy = vtr.Policy.from_pretrained(out)
    assert policy.name == kind and f"found: {policy.spec}" in result.output
    wrong = CliRunner().invoke(app, [*args, more[0], "-1"])
    assert wrong.exit_code == 1 and f"{more[0][2:]}=-1" in " ".join(wrong.output.split())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["gsearch", "--data", "nowhere.jsonl"], "no data at nowhere.jsonl"),
        (["gsearch", "--objective", "bleu"], "objective='bleu'"),
        (["gsearch", "--method", "grid"], "method='grid'"),
        (["gsearch", "--start", "10"], "start=10"),
        (["psigmoid", "--measure", "time"], "measure='time'"),
        (["psigmoid", "--budget", "0.1"], "schedules cost between"),
        (["psigmoid", "--curve", "nowhere"], "neither a file nor one of the presets"),
        (["gsearch", "--calibration", "64", "--evaluation", "8", "--data", "DATA"], "both sides"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(more: list[str], told: str, tmp_path: Path) -> None:
    data = str(small_data(tmp_path, 4))
    more = [data if word == "DATA" else word for word in more]
    args = ["search", *more, "--out", str(tmp_path / "out")]
    if "--data" not in more:
        args += ["--data", data, "--calibration", "2", "--evaluation", "2"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1
    assert told in " ".join(result.output.split())


def test_ctrl_c_keeps_what_was_scored_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    args = ["search", "gsearch", "--out", str(out), "--data", str(small_data(tmp_path, 4)), "--calibration", "2"]
    args += ["--evaluation", "0", "--start", "7", "--tolerance", "0.001"]
    rounds = Scorer.means
    with monkeypatch.context() as patched:

        def stop(self: Scorer, *given: Any) -> Any:
            if self.spent.candidates:
                raise KeyboardInterrupt
            return rounds(self, *given)

        patched.setattr(Scorer, "means", stop)
        result = CliRunner().invoke(app, args)
    assert result.exit_code == 130
    assert "the same call goes on" in result.output
    assert [path.name for path in out.iterdir()] == ["state.json"]
    assert CliRunner().invoke(app, args).exit_code == 0
    assert json.loads((out / "search.json").read_text())["resumed"] > 0


@pytest.mark.parametrize("ratio", [0.6, 0.45])
def test_baselines_cost_what_they_are_set_to(ratio: float) -> None:
    model, processor = short(10)
    one = questions(1)[0]
    inputs = vtr.chat.encode(processor, [one.question], [one.image])
    with torch.no_grad():
        model(**inputs, policy="uniform:keep=1.0,layer=1")
        full = vtr.report(model)
        vision = full.rows[0].total
        cost = Cost.from_model(model, [(vision, inputs["input_ids"].shape[1] - vision)])
        made = equal_flops.baselines(ratio, cost)
        assert set(made) == {"FastV", "Pyramid", "uniform"}
        for policy in made.values():
            model(**inputs, policy=policy)
            assert ratio - 0.02 < vtr.report(model).prefill_flops / full.prefill_flops <= ratio


def test_baselines_that_cannot_cost_so_little_are_left_out() -> None:
    cost = Cost.from_model(short(4)[0], [(300, 6)])
    assert equal_flops.baselines(0.05, cost) == {}
    with pytest.raises(ValueError, match="a cut in layer 1 of 4 costs more"):
        equal_flops.one_cut(0.05, cost)


def test_held_out_questions_are_answered_as_alone_and_compared_by_picture() -> None:
    model, processor = short(10)
    data = list(questions(6))
    lines = schedule_report.measure(model, processor, {"none": None, "few": vtr.Random(0.05)}, data, 0, 2)
    groups = schedule_report.groups_of(data)
    assert groups == [0, 0, 1, 1, 2, 2]
    assert [len(line.scores) for line in lines] == [6, 6]
    for one, right in zip(data, lines[0].scores, strict=True):
        said = answers(model, processor, [one.image], [one.question])[0]
        assert right == float(said == one.answer)
    found = schedule_report.compare(lines[1], lines[0], groups)
    assert found["difference"] == pytest.approx(lines[1].accuracy - lines[0].accuracy)
    assert "McNemar" in schedule_report.said(found)
    assert lines[1].mean_keep == pytest.approx(0.05, abs=0.01)
