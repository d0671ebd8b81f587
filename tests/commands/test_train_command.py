"""``vtr train`` on the pocket model: data, command, what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vtr
from vtr.cli import app
from vtr.training.data import Collate, read_samples

TINY = "dynamic-llava:keep=0.2,width=8,heads=2,inner=8,blocks=1"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the shipped samples as JSON lines."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for i in range(2):
        picture, question, answer = vtr.pocket.sample(i)
        picture.save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": question, "answer": answer}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder / "data.jsonl"


def test_answers_are_what_is_learnt(data: Path) -> None:
    _, processor = vtr.pocket.load()
    samples = read_samples(data)
    batch = Collate(processor)(samples)
    assert batch["input_ids"].shape == batch["labels"].shape
    for row, sample in zip(batch["labels"], samples, strict=True):
        assert processor.tokenizer.decode(row[row != -100]) == f"{sample['answer']} {processor.tokenizer.eos_token}"


@pytest.mark.parametrize(
    ("line", "error", "text"),
    [
        ("{", ValueError, "1 of 1 records cannot be used:\n.*line 1 is not JSON"),
        ('{"image": "a.png"}', ValueError, "line 1: no answer"),
        ('{"image": "a.png", "question": "?", "answer": "b"}', ValueError, "line 1: picture: FileNotFoundError"),
        ("", ValueError, "holds no samples"),
    ],
)
def test_bad_data_is_named(line: str, error: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(line)
    with pytest.raises(error, match=text):
        read_samples(tmp_path / "data.jsonl")


def test_the_command(data: Path, tmp_path: Path) -> None:
    """Dynamic-LLaVA for two steps, the model fixed; then the policy acts on the pocket model, in the command too."""
    args = ["train", TINY, str(data), str(tmp_path / "out"), "--steps", "2", "--batch", "1", "--lr", "0"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2] and all(0 <= line["image_kept"] <= 1 for line in log)
    spec = f"dynamic-llava:weights={tmp_path / 'out' / 'policy'}"
    shown = CliRunner().invoke(app, ["run", "--sample", "0", "--policy", spec, "--repeats", "1"])
    assert shown.exit_code == 0, shown.output
    written = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    again = CliRunner().invoke(app, args)
    assert again.exit_code == 0 and (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == written
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    others = ["--policy-lr", "0.5"], ["--seed", "9"], ["--batch", "2"], ["--min-answer", "3"]
    for other, name in zip(others, ("policy_lr", "seed", "batch", "min_answer"), strict=True):
        refused = CliRunner().invoke(app, [*args, *other])
        assert refused.exit_code == 1 and f"{name} " in refused.output, refused.output
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text(
        data.read_text().replace('"image": "', f'"image": "{data.parent}/').replace('"answer": "', '"answer": "a ')
    )
    refused = CliRunner().invoke(app, [*args[:2], str(fewer), *args[3:]])
    assert refused.exit_code == 1 and "data differs" in refused.output
    refused = CliRunner().invoke(app, [*args, "--model", "pocket-joint"])
    assert refused.exit_code == 1 and "model differs" in refused.output
    again = CliRunner().invoke(app, [*args[:1], "fastv", *args[2:]])
    assert again.exit_code == 1 and "has no weights to train" in again.output
