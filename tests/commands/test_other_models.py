"""The commands, on a checkpoint of a family that no adapter was written for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import stranger
from vtr.accounting import Report, RowReport
from vtr.cli import app
from vtr.commands.run import same_budget


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stranger.write(tmp_path_factory.mktemp("aya"))


def run(*args: str) -> str:
    out = CliRunner().invoke(app, list(args))
    assert out.exit_code == 0, out.output
    return out.output


def test_run(folder: str) -> None:
    said = run(
        "run", "--sample", "0", "--model", folder, "--policy", "fastv:keep=0.25", "--compare", "--repeats", "1",
        "--max-new-tokens", "2",
    )  # fmt: skip
    assert "with fastv:keep=0.25: 80 80 20 20" in said


def test_list(folder: str) -> None:
    said = run("list", "--model", folder)
    assert "AyaVisionForConditionalGeneration (by structure)" in said
    assert "SiglipVisionModel, 2 layers, no CLS token" in said


def test_list_of_a_model_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    out = CliRunner().invoke(app, ["list", "--model", str(tmp_path)])
    assert out.exit_code != 0 and "cannot load" in out.output


def test_kits(folder: str) -> None:
    from vtr.integrations.chat import Chat

    chat = Chat(folder, "m3:tokens=4", "cpu")
    message = {"role": "user", "content": [{"type": "image", "image": picture()}, "what color is the star"]}
    (answer,) = chat.answers([chat.prompt([message])], {"max_new_tokens": 2, "do_sample": False})
    assert answer.mean_keep == pytest.approx(0.25)


def test_auto(folder: str) -> None:
    from transformers import AutoModelForImageTextToText

    import vtr.auto

    vtr.auto.enable("fastv:keep=0.25")
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert vtr.describe(model).off is not None
        assert vtr.auto.patched() == [model]
    finally:
        vtr.auto.disable()


def picture() -> object:
    from PIL import Image

    return Image.linear_gradient("L").convert("RGB").resize((40, 40))


def test_baselines_where_nothing_can_be_cut_in_the_decoder() -> None:
    row = RowReport(policy="pool:grid=2", vision_tokens=[4, 4, 4], total=16)
    told = {name: 0 for name in ("flops", "prefill_flops", "decode_flops", "selector_flops", "kv_bytes")}
    report = Report(rows=[row], kv_bytes_allocated=0, selector_ms=0.0, steps=1, path="padded", **told)
    assert same_budget(report) == ["random:keep=0.25,before_decoder=true", "uniform:keep=0.25,before_decoder=true"]
