"""``vtr eval --shots`` on the pocket model: what is asked, what does not fit, the table, going on, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from vtr.eval.accuracy import processes
from vtr.eval.accuracy.processes import Rank
from vtr.eval.shots import summary
from vtr.eval.shots.contenders import FEWER, by_default, contenders, fewer
from vtr.eval.shots.run import Bench, Settings, evaluate, shots_of

import vtr
from vtr.cli import app
from vtr.pocket.shots.prompts import prompts

FEW = 'by_image:default="m3:tokens=9",last="none"'
SETTINGS = Settings(shots=(1,), policies=(f"{FEW};fewer",), model="pocket", limit=3, batch_size=2)


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("shots")
    return out, evaluate(SETTINGS, out, processes=1)


def test_every_query_is_put_to_everyone(done: tuple[Path, dict[str, Any]]) -> None:
    out, body = done
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2] and body["queries"] == 3
    for row, prompt in zip(rows, prompts(3, 1, seed=0), strict=True):
        assert row["answer"] == prompt.query.answer and row["seen"] == prompt.query.seen
        assert set(row["shots"]) == {"0", "1"}  # no demonstrations are always among them
        assert set(row["shots"]["0"]) == {"none", FEW} and set(row["shots"]["1"]) == {"none", FEW, FEWER}
        for cell in row["shots"]["1"].values():
            assert cell["score"] == float(cell["said"] == row["answer"])
    for name in ("table.md", "table.csv", "shots.png", "results.json"):
        assert (out / name).stat().st_size > 100


def test_what_it_costs(done: tuple[Path, dict[str, Any]]) -> None:
    found = {(row["policy"], row["shots"]): row for row in done[1]["policies"]}
    whole, coarse = found["none", 1], found[FEW, 1]
    assert coarse["tokens_each"] < 60 < 200 < whole["tokens_each"]
    assert found[FEW, 0]["vision_tokens"] == found["none", 0]["vision_tokens"]
    assert coarse["of_none"] == pytest.approx(coarse["gflops"] / whole["gflops"]) and coarse["of_none"] < 0.6
    assert found[FEWER, 1]["demonstrations"] == 0 and found[FEWER, 1]["gflops"] < coarse["gflops"]
    assert found[FEWER, 1]["accuracy"] == found["none", 0]["accuracy"]
    assert whole["versus_none"] is None and coarse["versus_none"]["difference"] == pytest.approx(
        coarse["accuracy"] - whole["accuracy"]
    )


def test_it_goes_on_and_only_with_the_same_settings(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, body = done
    with pytest.raises(FileExistsError, match="--resume"):
        evaluate(SETTINGS, out, processes=1)
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        evaluate(replace(SETTINGS, seed=1), out, resume=True, processes=1)
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    (tmp_path / "settings.json").write_text((out / "settings.json").read_text())
    again = evaluate(SETTINGS, tmp_path, resume=True, processes=1)
    assert [{**row, "selector_ms": 0} for row in again["policies"]] == [
        {**r, "selector_ms": 0} for r in body["policies"]
    ]


def test_what_does_not_fit_is_refused_in_words() -> None:
    bench = Bench.from_settings(Settings(shots=(8,), policies=("none",), model="pocket", limit=1), Rank())
    by_spec = {one.spec: one for one in contenders([FEW], bench.room.layout, 10)}
    none, few = by_spec["none"], by_spec[FEW]
    longest = bench.room.longest(None)
    assert longest == 4 and bench.refusal(none, 4) is None
    assert "the model has 4,096: at most 4 fit" in str(bench.refusal(none, 5))
    assert bench.refusal(few, 16) is None and (most := bench.room.longest(few.policy)) is not None
    assert bench.refusal(few, most) is None and bench.refusal(few, most + 1) is not None
    assert bench.room.longest(vtr.FastV(0.1)) == longest  # cut in the decoder: all positions are needed
    line = {"policy": "none", "shots": 8, "refused": bench.refusal(none, 8), "longest": longest}
    rows = [{"kind": "color", "shots": {"0": {}, "8": {}}}]
    body = {"model": "pocket", "queries": 1, "positions": 4096, "policies": summary.summarize(rows, [line])}
    assert "does not fit" in summary.markdown(body) and "at most 4 fit" in summary.caption(body)
    assert summary.table_csv(body).startswith("policy,shots,refused,longest")


def test_who_is_compared() -> None:
    bench = Bench.from_settings(Settings(shots=(0,), policies=("none",), model="pocket", limit=1), Rank())
    assert by_default(bench.room.layout) == ["none", "m3:tokens=9", FEW, FEWER]
    prompt = next(prompts(1, 4))
    assert fewer(prompt, 0).demonstrations == () and fewer(prompt, 2).demonstrations == prompt.demonstrations[2:]
    with pytest.raises(ValueError, match="is there twice"):
        contenders(["m3:9;m3:tokens=9"], bench.room.layout, 10)
    with pytest.raises(ValueError, match="not made smaller"):
        contenders(["downsample:scale=0.5"], bench.room.layout, 10)


def test_the_command(tmp_path: Path) -> None:
    run = ["eval", "--shots", "0", "--limit", "1", "-p", "none", "--model", "pocket", "--processes", "1"]
    ran = CliRunner().invoke(app, [*run, "--out", str(tmp_path)], env={"COLUMNS": "80"})
    assert ran.exit_code == 0, ran.output
    assert "12.5%" in " ".join(ran.output.split()) and "written to" in ran.output
    for wrong, why in {
        "--shots 0,x": "joined by commas", "--shots 900": "from 0 to 256", "--shots 0 --data x.jsonl": "--data",
        "--shots 0 --metric anls": "--metric", "--shots 0 --resume": "--out FOLDER",
    }.items():  # fmt: skip
        ran = CliRunner().invoke(app, ["eval", *wrong.split()], env={"COLUMNS": "200"})
        assert ran.exit_code == 1 and why in ran.output, ran.output
    with pytest.raises(ValueError, match="numbers of demonstrations"):
        shots_of("")
