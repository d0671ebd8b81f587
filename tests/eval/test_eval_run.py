"""The evaluation on the pocket model: rows, resuming, bad samples, the table and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from vtr.eval.accuracy import contenders, processes, run, summary
from vtr.eval.accuracy.answers import question_of
from vtr.eval.accuracy.contenders import Contender
from vtr.eval.accuracy.data import Sample
from vtr.eval.accuracy.metrics import METRICS
from vtr.eval.accuracy.run import Settings, evaluate

import vtr
from vtr.cli import app

TIMES = ("selector_ms", "prefill_ms")
SPECS = ("fastv:keep=0.1;random:keep=0.25;downsample:scale=0.5",)
COUNT = 16


# -- runs on the pocket model ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Runs in this process take one thread, as everything here does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of pocket questions with their pictures."""
    return pocket_folder(tmp_path_factory.mktemp("data"), COUNT)


def pocket_folder(where: Path, count: int) -> Path:
    """Corners of the pictures: fewer tokens are quicker, and some questions cannot be answered from them."""
    where.mkdir(exist_ok=True)
    names: dict[int, str] = {}
    with (where / "questions.jsonl").open("w") as file:
        for i, made in enumerate(list(vtr.pocket.samples(count, seed=5, per_scene=4))):
            name = names.setdefault(id(made["image"]), f"{len(names)}.png")
            made["image"].crop((0, 0, 96, 96)).save(where / name)
            record = {"id": f"q{i}", "image": name, "question": made["question"], "answer": made["answer"]}
            file.write(json.dumps({**record, "kind": made["type"]}) + "\n")
    return where


@pytest.fixture(scope="module")
def settings(folder: Path) -> Settings:
    return Settings(policies=SPECS, data=str(folder), batch_size=4, max_new_tokens=2)


@pytest.fixture(scope="module")
def done(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished evaluation."""
    out = tmp_path_factory.mktemp("done")
    evaluate(settings, out, processes=1)
    return out


def body(out: Path) -> dict[str, Any]:
    """The results but for times and the command."""
    data = json.loads((out / "results.json").read_text())
    for row in data["policies"]:
        for key in TIMES:
            del row[key]
    del data["command"]
    return data


def rows(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for row in read:
        for cell in row.get("policies", {}).values():
            del cell["selector_ms"]
    return read


def test_rows_say_what_everybody_said(done: Path) -> None:
    found = rows(done)
    assert [row["index"] for row in found] == list(range(COUNT))
    for row in found:
        assert list(row["policies"]) == ["none", "fastv:keep=0.1", "random:keep=0.25", "downsample:scale=0.5"]
        for cell in [*row["policies"].values(), row["no_image"], row["gray"]]:
            assert cell["score"] == float(cell["said"] == row["answers"][0])
        assert "base_lm" not in row
        none, fastv = row["policies"]["none"], row["policies"]["fastv:keep=0.1"]
        assert none["tokens"] == [none["total"]] * 10
        assert fastv["tokens"] == [none["total"]] * 2 + [int(none["total"] * 0.1)] * 8


def test_the_table_follows_from_the_rows(done: Path) -> None:
    data, found = body(done), rows(done)
    none, fastv = data["policies"][:2]
    scores = [row["policies"]["fastv:keep=0.1"]["score"] for row in found]
    assert data["kind"] == "eval" and data["model"] == "pocket" and data["rows"] == "samples.jsonl"
    assert fastv["accuracy"] == pytest.approx(sum(scores) / COUNT)
    reference = data["reference"]
    assert none["accuracy"] == reference["none"] > reference["gray"] and reference["base_lm"] is None
    for name in ("no_image", "gray"):
        assert reference[name] == pytest.approx(sum(row[name]["score"] for row in found) / COUNT)
    needing = [row for row in found if row["no_image"]["score"] == row["gray"]["score"] == 0]
    assert data["data"]["indispensable"] == len(needing) and data["data"]["bad"] == 0
    assert fastv["indispensable"] == pytest.approx(
        sum(row["policies"]["fastv:keep=0.1"]["score"] for row in needing) / len(needing)
    )
    assert fastv["gain"] == pytest.approx(fastv["accuracy"] - reference["no_image"])
    assert fastv["gray_gain"] == pytest.approx(fastv["accuracy"] - reference["gray"])
    assert fastv["leakage"] is None and "multi-modal leakage –: it needs" in (done / "table.md").read_text()
    versus = fastv["versus_none"]
    assert 0 < fastv["accuracy"] < 1
    assert versus["difference"] == pytest.approx(fastv["accuracy"] - none["accuracy"])
    lost = [row["id"] for row in found if row["policies"]["fastv:keep=0.1"]["score"] < row["policies"]["none"]["score"]]
    assert versus["losses"] == len(lost) and versus["lost"] == lost[: summary.NAMED]
    assert len(versus["won"]) == min(versus["wins"], summary.NAMED)
    assert fastv["mean_keep"] == pytest.approx(0.28, abs=0.001) and none["mean_keep"] == 1.0
    assert fastv["low"] <= fastv["accuracy"] <= fastv["high"] and fastv["gflops"] < none["gflops"]
    assert "| fastv:keep=0.1 |" in (done / "table.md").read_text()
    header, first, *_ = (done / "table.csv").read_text().splitlines()
    assert header.startswith("policy,name,accuracy,low,high,indispensable") and first.startswith("none,none,")


def test_it_agrees_with_asking_one_by_one(done: Path, folder: Path) -> None:
    """No batches, no shared features; the reference without an image is the model with the question alone."""
    model, processor = vtr.pocket.load()
    vtr.patch(model)
    records = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for record, row in list(zip(records, rows(done), strict=True))[:: COUNT // 4]:
        inputs = vtr.chat.encode(processor, [record["question"]], [Image.open(folder / record["image"]).convert("RGB")])
        for spec in ("none", "fastv:keep=0.1"):
            policy = None if spec == "none" else spec
            out = model.generate(**inputs, policy=policy, max_new_tokens=2, do_sample=False)
            said = vtr.chat.decode(processor, out, inputs["input_ids"].shape[1])
            assert said == [row["policies"][spec]["said"]]
        inputs = vtr.chat.encode(processor, [record["question"]], None)
        assert "pixel_values" not in inputs
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert vtr.chat.decode(processor, out, inputs["input_ids"].shape[1]) == [row["no_image"]["said"]]


def test_two_runs_are_equal_and_a_torn_one_goes_on(done: Path, settings: Settings, tmp_path: Path) -> None:
    whole = (done / "samples.jsonl").read_text().splitlines(keepends=True)
    torn = tmp_path / "torn"
    torn.mkdir()
    shutil.copy(done / "settings.json", torn)
    # two batches and half of the third; the line being written when it died is torn
    (torn / "samples.jsonl").write_text("".join(whole[:10]) + whole[10][: len(whole[10]) // 2])
    evaluate(settings, torn, resume=True, processes=1)
    assert rows(torn) == rows(done) and body(torn) == body(done)
    before = (torn / "samples.jsonl").read_bytes()
    evaluate(settings, torn, resume=True, processes=1)  # nothing left to do
    assert (torn / "samples.jsonl").read_bytes() == before


def test_a_larger_limit_goes_on_and_equals_a_run_of_its_own(done: Path, settings: Settings, tmp_path: Path) -> None:
    assert settings.limit is None or settings.limit > 6
    evaluate(replace(settings, limit=6), tmp_path, processes=1)  # a batch and half of the next one
    evaluate(settings, tmp_path, resume=True, processes=1)
    assert rows(tmp_path) == rows(done) and body(tmp_path) == body(done)
    with pytest.raises(ValueError, match="and is now 4"):
        evaluate(replace(settings, limit=4), tmp_path, resume=True, processes=1)


def test_what_is_there_is_not_overwritten(done: Path, settings: Settings) -> None:
    with pytest.raises(FileExistsError, match="--resume goes on"):
        evaluate(settings, done, processes=1)
    with pytest.raises(ValueError, match="batch_size was 4 and is now 8"):
        evaluate(replace(settings, batch_size=8), done, resume=True, processes=1)
    with pytest.raises(ValueError, match="policies was"):
        evaluate(replace(settings, policies=("fastv:keep=0.2",)), done, resume=True, processes=1)


def test_other_data_is_noticed(done: Path, settings: Settings, folder: Path, tmp_path: Path) -> None:
    copy, data = tmp_path / "copy", folder / "questions.jsonl"
    shutil.copytree(done, copy)
    text = data.read_text()
    try:
        data.write_text(text.replace('"answer": "', '"answer": "not ', 1))
        with pytest.raises(ValueError, match="sample 0 is not what it was"):
            evaluate(settings, copy, resume=True, processes=1)
    finally:
        data.write_text(text)


def test_bad_samples_are_counted_and_the_rest_is_as_before(
    done: Path, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    lines = (data / "questions.jsonl").read_text().splitlines()
    for index, image in {5: "broken.png", 14: "missing.png"}.items():
        lines[index] = json.dumps({**json.loads(lines[index]), "image": image})
    lines[9] = lines[9][:-4]
    (data / "questions.jsonl").write_text("\n".join(lines) + "\n")
    whole = (data / "0.png").read_bytes()
    (data / "broken.png").write_bytes(whole[: len(whole) // 2])
    found = evaluate(replace(settings, data=str(data)), tmp_path / "out", processes=1)
    assert found is not None
    assert (found["data"]["samples"], found["data"]["bad"]) == (COUNT - 3, 3)
    reasons = {bad["id"]: bad["reason"] for bad in found["data"]["bad_examples"]}
    assert list(reasons) == ["q5", "9", "q14"]
    for (_, reason), said in zip(reasons.items(), ("truncated", "not JSON", "No such file"), strict=True):
        assert said in reason
    now, before = rows(tmp_path / "out"), rows(done)
    assert [row["index"] for row in now] == list(range(COUNT))
    for new, old in zip(now, before, strict=True):
        if "bad" not in new:
            assert {s: c["said"] for s, c in new["policies"].items()} == {
                s: c["said"] for s, c in old["policies"].items()
            }
            assert new["no_image"] == old["no_image"] and new["gray"] == old["gray"]


def test_only_what_needs_the_picture(done: Path, settings: Settings, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    found = evaluate(settings, copy, resume=True, indispensable=True, processes=1)
    assert found is not None and found["data"]["shown"] == found["data"]["indispensable"] < COUNT
    before = body(done)
    for new, old in zip(found["policies"], before["policies"], strict=True):
        assert new["accuracy"] == old["indispensable"]
        assert all(new[figure] == old[figure] for figure in ("gain", "gray_gain", "leakage"))
    assert found["reference"] == before["reference"]
    dispensable = [{**row, "gray": {"said": "", "score": 1.0}} for row in rows(done)]
    with pytest.raises(ValueError, match="none of 16 samples needs its picture"):
        summary.summarize(dispensable, [Contender("none", "none")], METRICS["exact"], indispensable=True)


def test_policies_that_cannot_work_are_left_out_of_all_but_not_refused_silently(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtr.policies.blind.random_keep import Random

    def broken(self: Any, tokens: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Random, "score", broken)
    monkeypatch.setattr(contenders, "FIRST", ("none", "uniform"))
    monkeypatch.setattr(vtr, "list_policies", lambda: ["random", "uniform"])
    found = evaluate(replace(settings, policies=("all",), limit=4), tmp_path / "all", processes=1)
    assert found is not None
    assert found["left_out"] == {"random": "RuntimeError: no such luck"}
    assert [row["name"] for row in found["policies"]] == ["none", "uniform"]
    with pytest.raises(RuntimeError, match="no such luck"):
        evaluate(replace(settings, policies=("random",), limit=4), tmp_path / "one", processes=1)


@pytest.mark.slow
def test_latency_is_measured_in_turns(settings: Settings, tmp_path: Path) -> None:
    found = evaluate(replace(settings, limit=4), tmp_path, processes=1, latency=1)
    assert found is not None
    ms = {row["name"]: row["prefill_ms"] for row in found["policies"]}
    assert all(0 < t["low"] <= t["median"] <= t["high"] for t in ms.values())
    assert ms["fastv"]["low"] < ms["none"]["median"]
    assert "prefill ms" in (tmp_path / "table.md").read_text()


def test_a_base_language_model_is_asked_beside_the_model_without_an_image(
    done: Path, settings: Settings, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    model, processor = vtr.pocket.load()
    torch.manual_seed(0)
    LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "lm")
    processor.tokenizer.save_pretrained(tmp_path / "lm")
    found = evaluate(replace(settings, limit=4, base_lm=str(tmp_path / "lm")), tmp_path / "out", processes=1)
    assert found is not None and found["base_lm"] == str(tmp_path / "lm")
    told = rows(tmp_path / "out")
    assert any(row["base_lm"]["said"] for row in told)
    for new, old in zip(told, rows(done), strict=False):
        assert new["no_image"] == old["no_image"] and new["gray"] == old["gray"]
    leaked = max(0.0, found["reference"]["no_image"] - found["reference"]["base_lm"])
    assert [row["leakage"] for row in found["policies"]] == [leaked] * 4
    assert f"multi-modal leakage {100 * leaked:.1f} (" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(ValueError, match="cannot load language model"):
        evaluate(replace(settings, base_lm=str(tmp_path / "nothing")), tmp_path / "x", processes=1)


def test_questions_with_choices_are_put_with_letters() -> None:
    made = Sample(0, "0", "what?", ("red",), ("red", "blue"), "all", "g", lambda: Image.new("RGB", (4, 4)))
    assert question_of(made, "Look: {question}") == (
        "Look: what?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    )
    assert question_of(replace(made, choices=None)) == "what?"
    with pytest.raises(ValueError, match=r"where the \{question\} goes"):
        Settings(instruction="what is this?")


def test_the_most_frequent_answer_of_a_kind() -> None:
    def row(kind: str, answer: str, choices: list[str] | None = None) -> dict[str, Any]:
        return {"kind": kind, "answers": [answer], **({"choices": choices} if choices else {})}

    given = [row("a", "red"), row("a", "blue"), row("a", "red"), row("b", "one")]
    assert summary.majority(given, METRICS["exact"]) == 0.75
    lettered = [
        row("a", "red", ["red", "blue"]),
        row("a", "blue", ["red", "blue"]),
        row("a", "green", ["green", "red"]),
    ]
    assert summary.majority(lettered, METRICS["choice"]) == pytest.approx(2 / 3)


def test_a_metric_that_needs_more_than_a_sample_has(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 4 samples can be used; the first: VQA accuracy needs"):
        evaluate(replace(settings, metric="vqa", limit=4), tmp_path, processes=1)


# -- the command -------------------------------------------------------------------------------------------------------
def command(*args: str) -> Any:
    return CliRunner().invoke(app, ["eval", *args], env={"COLUMNS": "140"})


def test_the_command_prints_and_writes(folder: Path, tmp_path: Path) -> None:
    where = ["--data", str(folder), "--out", str(tmp_path / "out")]
    shown = command("-p", "fastv:keep=0.1", "--limit", "8", "--processes", "1", *where)
    assert shown.exit_code == 0, shown.output
    for word in ("fastv", "accuracy", "picture", "GFLOPs", "8 samples, 0 bad", "Multi-modal gain without"):
        assert word in shown.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["data"]["samples"] == 8


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    for args, said in (
        (["-p", "fastvv"], "unknown policy"),
        (["--data", "nowhere.jsonl"], "no data at nowhere.jsonl"),
        (["--metric", "bleu"], "unknown metric"),
        (["--model", str(tmp_path)], "cannot load"),
        (["--dtype", "float8"], "choose one of float32"),
        (["--columns", "question"], "write key=value"),
        (["--budget", "1.5"], "between 0 and 1"),
        (
            ["--data", str(folder), "--columns", "question=nothing"],
            "questions.jsonl has no column 'nothing'; it has: id, image, question, answer, kind",
        ),
    ):
        shown = command(*args, "--processes", "1", "--limit", "4")
        assert shown.exit_code == 1 and "Traceback" not in shown.output
        assert said in " ".join(shown.output.split()), shown.output


def test_help_teaches() -> None:
    shown = command("--help")
    assert shown.exit_code == 0
    for word in ("--indispensable", "--base-lm", "torchrun", "vtr eval --policies all --limit 2000", "McNemar"):
        assert word in shown.output


def test_how_many_processes_are_sensible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "cores", lambda: 2)
    assert run._sensible_processes(Settings(device="cpu", limit=2000)) == 2
    assert run._sensible_processes(Settings(device="cpu", limit=64)) == 1
    assert run._sensible_processes(Settings(device="cpu", model="big")) == 1
    monkeypatch.setattr(run, "cores", lambda: 64)
    assert run._sensible_processes(Settings(device="cpu", limit=2000)) == 8
