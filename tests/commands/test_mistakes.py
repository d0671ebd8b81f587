"""What people get wrong on the command line: each mistake is refused at once, in one line that names the way out."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import GenerationMixin
from typer.testing import CliRunner

import vtr
from vtr.cli import app
from vtr.models import check_name, find_device

MISTAKES = {
    # devices
    "run --sample 0 --device cuda": "no such device on this machine; choose cpu",
    "run --sample 0 --device cuda:7": "no such device on this machine; choose cpu",
    "run --sample 0 --device mps": "no such device on this machine; choose cpu",
    "run --sample 0 --device gpu": "'gpu' is no device: choose cpu",
    "eval --device cuda": "choose cpu",
    "search gsearch --device cuda": "choose cpu",
    "encode cat.png --out new --device cuda": "choose cpu",
    "bench policies --small --device cuda": "use --device cpu",
    "bench scale --small --device gpu": "choose cpu or cuda",
    # samples, pictures, questions
    "run --sample 7": "choose one of 0 (what color is the star?), 1 (which word is purple?), 2 (how many",
    "run --sample -1": "choose one of 0 (what",
    "run": "or --sample 0",
    "run nothing.png 'what is it'": "nothing.png: there is no such file",
    "run '[/x].png' 'what is it'": "[/x].png: there is no such file",
    "run . 'what is it'": "is a folder, no regular file",
    "run odd.jsonl 'what is it'": "is not a picture Pillow can read",
    "run cat.png": "ask something",
    "run --sample 0 --max-new-tokens 0": "greater than or equal to 1",
    # policies
    "run --sample 0 --policy fastvv": "did you mean fastv?",
    "run --sample 0 --policy FastV:keep=0.5": "did you mean fastv?",
    "run --sample 0 --policy 'fastv keep=0.25'": "write fastv:keep=0.25",
    "run --sample 0 --policy 'fastv(keep=0.25)'": "write fastv:keep=0.25",
    "run --sample 0 --policy 'fastv;keep=0.25'": "write fastv:keep=0.25",
    "run --sample 0 --policy fastv=0.25": "write fastv:0.25",
    "run --sample 0 --policy m3,fastv": "write m3+fastv",
    "run --sample 0 --policy fastv:kep=0.25": "did you mean keep?",
    "run --sample 0 --policy fastv:layer=0": "at least 1",
    "run --sample 0 --policy pmod:weights=nothing": "shipped are pocket, pocket-joint",
    "encode cat.png --out new --policy m33": "did you mean m3?",
    "list fastvv": "did you mean fastv?",
    # models
    "run --sample 0 --model poket": "did you mean pocket?",
    "eval --model pocket-joit": "did you mean pocket-joint?",
    "search gsearch --model poket": "did you mean pocket?",
    "train pmod good.jsonl new --model poket": "did you mean pocket?",
    "encode cat.png --out new --model poket": "did you mean pocket?",
    "serve poket": "did you mean pocket?",
    "run --sample 0 --model somemodel": "there are pocket, pocket-joint, pocket-internvl",
    "run --sample 0 --model ./nothing": "there is no such folder",
    "run --sample 0 --model empty": "holds no config.json",
    "run --sample 0 --model file.txt": "name the folder",
    "run --sample 0 --model some/model": "cannot be reached (ConnectionError); without a download there are pocket",
    "eval --base-lm some/model": "cannot load language model some/model",
    # budgets
    "run --sample 0 --budget 192": "--policy fastv",
    "run --sample 0 --policy fastv --budget 25%": "a share (0.25)",
    "run --sample 0 --policy fastv --budget 0": "at least 1",
    "run --sample 0 --policy fastv --budget 1.5": "at most 1.0",
    # what is to be written
    "run --sample 0 --show kept.xyz": ".png",
    "run --sample 0 --show kept": ".png",
    "run --sample 0 --show nowhere/kept.png": "no folder nowhere",
    "run --sample 0 --show nowhere/kept.gif": "no folder nowhere",
    "run --sample 0 --show empty": "is a folder",
    "eval --out file.txt": "file.txt: this is a file",
    "eval --resume": "--out FOLDER",
    "search gsearch --out file.txt": "file.txt: this is a file",
    "train pmod good.jsonl file.txt": "file.txt: this is a file",
    "convert pmod empty file.txt/x": "file.txt is a file",
    "encode cat.png --out file.txt": "this is a file",
    "page good.jsonl --out file.txt": "this is a file",
    "bench engine --small --json empty": "is a folder",
    "bench policies --small --out file.txt": "this is a file",
    "bench scale --small --json result.txt": "ends in .json",
    # data
    "eval --data pokcet": "did you mean pocket?",
    "eval --data god.jsonl": "did you mean good.jsonl?",
    "eval --data odd.jsonl --columns question=fragee": "did you mean frage?); it has: pic, frage, antwort",
    "search gsearch --data odd.jsonl --columns image=bild": "no column 'bild'; it has: pic, frage, antwort",
    "train pmod odd.jsonl new --columns image=bild": "no column 'bild'; it has: pic, frage, antwort",
    "eval --data odd.jsonl --columns questoin=frage": "did you mean question?",
    "eval --data odd.jsonl --columns frage": "write key=value",
    "eval --columns question=frage": "leave out images and columns",
    "eval --data good.jsonl --images nowhere": "no such folder",
    "eval --data file.txt": "write one JSON object a line",
    "eval --data pocket:split=tset": "split=train, val or test",
    "eval --limit 0": "greater than or equal to 1",
    "eval --metric exakt": "did you mean exact?",
    "eval --instruction hello": "{question}",
    "eval -p fastvv": "did you mean fastv?",
    "eval -p fastv,random": "joined by a semicolon",
    "eval -p al": "did you mean all?",
    "eval -p ''": "give all",
    "eval -p downsampel:scale=0.5": "did you mean downsample?",
    "eval --dtype float61": "float32, bfloat16, float16",
    # searches, training, conversion, pages, servers
    "search gsearch --objective klx": "'kl'",
    "search psigmoid --curve nothing": "presets",
    "train fastv good.jsonl new": "choose pmod or dynamic-llava",
    "train pmod good.jsonl new --lr -1": "0 or more",
    "train pmod good.jsonl new --lr nan": "0 or more",
    "train pmod good.jsonl new --mixed-precision fp32": "no, bf16, fp16",
    "train pmod nothing.jsonl new": "no data at nothing.jsonl",
    "convert pmodd empty new": "pmod",
    "convert pmod nowhere new": "nowhere",
    "convert pmod empty new": "config.json",
    "page nothing.json": "nothing.json",
    "page file.txt": "file.txt",
    "page good.jsonl --readme nothing.md": "nothing.md: there is no such file",
    "bench policies --small --policy fastvv": "did you mean fastv?",
    "bench policies --small --shapes llava": "choose one of llava-next-mid",
    "bench serve --url localhost:8000": "http://127.0.0.1:8000",
    "serve pocket --upstream localhost:8000": "http://127.0.0.1:8000",
    "serve pocket --policy m33": "did you mean m3?",
    "serve pocket --port 99999": "less than or equal to 65535",
    "serve pocket --port PORT": "choose another port",
    "serve pocket --host nowhere.invalid": "no address of this machine",
    "runn --sample 0": "Did you mean 'run'?",
    "run --sampel 0": "--sample",
}
LATER = {
    "run --sample 0 --policy fastv:layer=40": "choose 1…9",
    "run --sample 0 --policy random:layer=40": "choose 0…9",
    "run --sample 0 --policy pool:grid=4+fastv:layer=10": "choose 1…9",
    "run --sample 0 --policy fastv --budget 99999": "this prompt has 744 vision tokens",
    "eval --processes 1 -p fastv:layer=40": "choose 1…9",
    "eval --processes 1 --budget 0": "between 0 and 1",
    "eval --processes 1 --budget 99999": "a tile has 144 tokens",
    "search gsearch --start 40 --calibration 4 --evaluation 0": "one of 1…9",
    "search gsearch --queries txt --calibration 4 --evaluation 0": "'text-max'",
}
"""Refused as soon as the model is there, since it depends on the model."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files to get wrong, on a machine without network or GPU; nothing may be answered here."""

    def unreachable(*args: Any, **kwargs: Any) -> bool:
        raise ConnectionError("no network")

    def nothing_runs(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr(huggingface_hub, "file_exists", unreachable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(GenerationMixin, "generate", nothing_runs)
    monkeypatch.chdir(tmp_path)
    vtr.pocket.sample(0)[0].save("cat.png")
    Path("good.jsonl").write_text('{"image": "cat.png", "question": "what?", "answer": "a cat"}\n')
    Path("odd.jsonl").write_text('{"pic": "cat.png", "frage": "was?", "antwort": "Katze"}\n')
    Path("file.txt").write_text("nothing\n")
    Path("empty").mkdir()
    return tmp_path


def refused(line: str, here: Path) -> str:
    """What the command says, which has failed in a line and has left everything as it was."""
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, shlex.split(line), env={"COLUMNS": "200"})
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), (result.exception, result.output)
    assert "Traceback" not in result.output and "Errno" not in result.output
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
    assert [path.name for path in here.iterdir() if path.is_dir()] == ["empty"]
    if result.exit_code == 1:  # others are said by the parser, in a box
        assert len(result.output.strip().splitlines()) == 1, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize(("line", "way_out"), MISTAKES.items())
def test_a_mistake_is_refused_before_a_model_is_loaded(
    line: str, way_out: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_loads(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(vtr.pocket, "load", nothing_loads)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert way_out in refused(line.replace("PORT", str(taken.getsockname()[1])), here)


@pytest.mark.parametrize(("line", "way_out"), LATER.items())
def test_a_mistake_is_refused_before_anything_runs(line: str, way_out: str, here: Path) -> None:
    said = CliRunner().invoke(app, shlex.split(line), env={"COLUMNS": "200"})
    assert said.exit_code == 1 and isinstance(said.exception, SystemExit), (said.exception, said.output)
    assert way_out in said.output and sorted(path.name for path in here.iterdir() if path.is_dir()) == ["empty"]


def test_a_folder_that_may_not_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)  # a test may run as root, who may write everywhere
    for line in ("run --sample 0 --show kept.png", "eval --out new", "bench batch --small --json new.json"):
        assert "cannot write to" in refused(line, here)


def test_a_column_that_later_records_alone_have_is_no_mistake(here: Path) -> None:
    from vtr.data.sources import open_data

    lines = ['{"image": "cat.png", "question": "a?", "answer": "b"}'] * 3
    lines.append('{"image": "cat.png", "question": "a?", "answer": "b", "picks": ["b", "c"]}')
    Path("late.jsonl").write_text("\n".join(lines))
    assert len(list(open_data("late.jsonl", columns={"choices": "picks"}))) == 4


def test_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [find_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match="choose one of cpu, cuda:0, cuda:1"):
        find_device("cuda:2")


def test_names_of_the_hub_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda name, file: asked.append(name) or name != "some/typo")
    check_name("some/model")
    with pytest.raises(ValueError, match=r"cannot load model some/typo: .* the Hugging Face hub has none"):
        check_name("some/typo")
    with pytest.raises(ValueError, match="OWNER/NAME"):
        check_name("model")
    check_name("gpt2", "language model", owner=False)  # old language models have no owner
    assert asked == ["some/model", "some/typo", "gpt2"]
