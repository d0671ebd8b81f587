"""``vtr encode``: embeddings are what enters the decoder."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import vtr
from vtr.cli import app
from vtr.encode import as_part, encode, messages

PICTURE, QUESTION, _ = vtr.pocket.sample(0)


@pytest.fixture(scope="module")
def pocket() -> tuple:
    model, processor = vtr.pocket.load()
    return vtr.patch(model), processor


@pytest.mark.parametrize("spec", ["m3:tokens=36", "globalcom2:retention=0.3", "cls:keep=5", "pool:grid=4", "none"])
def test_embeddings_are_what_enters_the_decoder(pocket: tuple, spec: str) -> None:
    model, processor = pocket
    found = encode(model, processor, PICTURE, spec)
    inputs = processor(text=f"<image>{QUESTION}", images=[PICTURE], return_tensors="pt")
    seen = []
    layer = model.model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(lambda m, args, kw: seen.append(args[0] if args else kw["hidden_states"]), with_kwargs=True)  # fmt: skip  # noqa: E501
    with torch.no_grad():
        model(**inputs, policy=None if spec == "none" else spec)
    handle.remove()
    assert torch.equal(found, seen[0][0, 1 : 1 + len(found)])  # behind the BOS token
    assert len(found) == vtr.report(model).rows[0].vision_tokens[0]


@pytest.mark.parametrize(
    "spec",
    ["fastv:keep=0.5", "m3:tokens=36+fastv:keep=0.5", "uniform:keep=0.5", "autoscale", 'auto:choices=["m3:9","none"]'],
)
def test_what_acts_in_the_decoder_is_refused(pocket: tuple, spec: str) -> None:
    with pytest.raises(vtr.UnsupportedError, match="acts in the decoder"):
        encode(*pocket, PICTURE, spec)


def test_what_is_sent_is_the_tensor() -> None:
    embeds = torch.randn(5, 8)[:, ::2]
    (turn,) = messages([embeds], "what?")
    assert turn["content"][0] == as_part(embeds) and turn["content"][1]["text"] == "what?"
    raw = base64.b64decode(turn["content"][0]["image_embeds"])
    assert torch.equal(torch.load(io.BytesIO(raw), weights_only=True), embeds)


def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        vtr.pocket.sample(i)[0].save(folder / f"p{i}.png")
    (folder / "notes.txt").write_text("no picture")
    run = CliRunner().invoke(app, ["encode", str(folder), "--policy", "m3:tokens=9", "--out", str(tmp_path / "e")])
    assert run.exit_code == 0, run.output
    assert "2 pictures" in run.output
    with safe_open(tmp_path / "e" / "p1.safetensors", "pt") as file:
        assert file.metadata()["policy"] == "m3:tokens=9" and file.get_tensor("image_embeds").shape[1] == 160


@pytest.mark.parametrize(
    ("given", "message"),
    [(["nowhere.png"], "is not there"), (["."], "no pictures in"), (["p.png", "p.png"], "two pictures are called p")],
)
def test_pictures_that_cannot_be_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], message: str) -> None:  # fmt: skip  # noqa: E501
    monkeypatch.chdir(tmp_path)
    if "p.png" in given:
        PICTURE.save("p.png")
    run = CliRunner().invoke(app, ["encode", *given, "--out", "e"])
    assert run.exit_code == 1 and message in " ".join(run.output.split())
