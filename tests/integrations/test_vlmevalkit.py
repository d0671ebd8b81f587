"""The VLMEvalKit adapter: against the installed package where there is one, else against its documented interface."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vtr
from tests.integrations.lmms_task import direct_answers, questions

INSTALLED = importlib.util.find_spec("vlmeval") is not None
MODULE = "vtr.integrations.vlmevalkit"


class BaseModel:
    """What a model of VLMEvalKit inherits (vlmeval/vlm/base.py), as far as the adapter uses it."""

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]

    def chat(self, messages: list[dict[str, Any]], dataset: str | None = None) -> str:
        return self.chat_inner(messages, dataset=dataset)  # type: ignore[attr-defined]


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The adapter; without VLMEvalKit installed, over a stand-in for the two names that it imports."""
    if not INSTALLED:
        names = {"vlmeval": {}, "vlmeval.vlm": {}, "vlmeval.vlm.base": {"BaseModel": BaseModel}}
        for name, content in {**names, "vlmeval.config": {"supported_VLM": {"gpt": object()}}}.items():
            made = types.ModuleType(name)
            made.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, made)
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    if not INSTALLED:
        sys.modules.pop(MODULE, None)


def test_a_registered_model_answers_as_generate_does(kit: Any, tmp_path: Path) -> None:
    kit.register("pocket-fastv", "pocket", policy="fastv:keep=0.05,layer=2", device="cpu", max_new_tokens=4)
    model = kit.supported_VLM["pocket-fastv"]()
    rows = questions(4)
    said = []
    for i, row in enumerate(rows):
        row["image"].save(tmp_path / f"{i}.png")
        message = [{"type": "image", "value": str(tmp_path / f"{i}.png")}, {"type": "text", "value": row["question"]}]
        said.append(model.generate(message=message, dataset="any"))
        assert vtr.report(model.chat_model.model).rows[0].vision_tokens[2] == 37
    assert said == direct_answers(rows, "fastv:keep=0.05,layer=2")


def test_a_conversation_is_continued(kit: Any, tmp_path: Path) -> None:
    picture, question, answer = vtr.pocket.sample(0)
    picture.save(tmp_path / "0.png")
    model = kit.Vtr("pocket", device="cpu", max_new_tokens=4)
    first = {"role": "user", "content": [{"type": "image", "value": str(tmp_path / "0.png")}]}
    first["content"].append({"type": "text", "value": question})  # type: ignore[attr-defined]
    assert model.chat([first]) == answer
    turns = [first, {"role": "assistant", "content": [{"type": "text", "value": answer}]}]
    turns.append({"role": "user", "content": [{"type": "text", "value": question}]})
    assert isinstance(model.chat(turns), str)
    assert vtr.report(model.chat_model.model).rows[0].total == 744


def test_plain_text_is_content_too(kit: Any, tmp_path: Path) -> None:
    picture, question, answer = vtr.pocket.sample(0)
    picture.save(tmp_path / "0.png")
    model = kit.Vtr("pocket", device="cpu", max_new_tokens=4)
    shown = {"type": "image", "value": str(tmp_path / "0.png")}
    assert model.generate_inner([shown, question]) == answer
    listed = [{"role": "user", "content": [shown, {"type": "text", "value": question}]}]
    listed.append({"role": "assistant", "content": [{"type": "text", "value": answer}]})
    plain = [listed[0], {"role": "assistant", "content": answer}, {"role": "user", "content": "is it red"}]
    listed.append({"role": "user", "content": [{"type": "text", "value": "is it red"}]})
    assert model.chat(plain) == model.chat(listed)
    alone = model.generate_inner("what is red")
    assert alone == model.generate_inner([{"type": "text", "value": "what is red"}])


def test_what_cannot_be_is_said(kit: Any) -> None:
    own = next(iter(set(kit.supported_VLM) - {"mine"}))
    with pytest.raises(ValueError, match="already has a model"):
        kit.register(own, "pocket")
    kit.register("mine", "pocket")
    kit.register("mine", "pocket", policy="fastv")  # ours may be replaced
    with pytest.raises(ValueError, match="no generation setting is called temprature"):
        kit.Vtr("pocket", temprature=0.1)
    with pytest.raises(ValueError, match="unknown policy"):
        kit.Vtr("pocket", policy="fastvv")
    with pytest.raises(vtr.UnsupportedError, match="audio"):
        kit.Vtr("pocket", device="cpu").generate_inner([{"type": "audio", "value": "a.wav"}])


def test_videos(kit: Any, tmp_path: Path) -> None:
    """Frames are put as pictures behind their numbers, as many as asked for; a temporal policy thins them together."""
    frames = [Image.new("RGB", (96, 96), (40 * i, 90, 120)) for i in range(5)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    model = kit.Vtr("pocket-internvl", policy="evs:0.5", device="cpu", nframe=4, max_new_tokens=3)
    for value in (str(tmp_path / "film.gif"), str(tmp_path), frames):
        said = model.generate_inner([{"type": "video", "value": value}, {"type": "text", "value": "what color is it"}])
        (row,) = vtr.report(model.chat_model.model).rows
        assert isinstance(said, str) and row.total == 4 * 36 and row.vision_tokens == [72] * 10
    pair = [{"type": "image", "value": frames[0]}, {"type": "video", "value": frames}]
    with pytest.raises(vtr.UnsupportedError, match="two prompts"):
        model.generate_inner(pair)
    with pytest.raises(ValueError, match="at least one"):
        kit.Vtr("pocket", nframe=0)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="VLMEvalKit is not installed (pip install ms-vlmeval)")
def test_the_kits_own_runner(tmp_path: Path) -> None:
    """``run.py`` on a local table of questions: the predictions it writes are what generate answers."""
    import base64
    import csv
    import io

    rows = questions(8, seed=1)
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "Pocket.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "answer"])
        for i, row in enumerate(rows):
            row["image"].save(png := io.BytesIO(), "PNG")
            table.writerow([i, base64.b64encode(png.getvalue()).decode(), row["question"], row["answer"]])
    script = tmp_path / "run_vtr.py"
    script.write_text(
        f"from {MODULE} import register\nfrom vlmeval.run import main\n"
        "register('pocket-fastv', 'pocket', policy='fastv:keep=0.02,layer=2', device='cpu', max_new_tokens=4)\nmain()\n"
    )
    command = [sys.executable, str(script), "--data", "Pocket", "--model", "pocket-fastv", "--mode", "infer"]
    environment = {**os.environ, "LMUData": str(tmp_path / "data"), "OMP_NUM_THREADS": "1", "PRED_FORMAT": "tsv"}
    done = subprocess.run(
        [*command, "--work-dir", str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = next(path for path in (tmp_path / "out").rglob("pocket-fastv_Pocket.tsv"))
    with written.open(newline="") as file:
        predicted = [line["prediction"] for line in csv.DictReader(file, delimiter="\t")]
    assert predicted == direct_answers(rows, "fastv:keep=0.02,layer=2")
