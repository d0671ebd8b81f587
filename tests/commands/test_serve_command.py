"""``vtr serve``: what it starts, and what it says when it cannot."""

from __future__ import annotations

import importlib
import importlib.util
import json

import pytest
from typer.testing import CliRunner

from vtr.cli import app
from vtr.commands.serve import GATE, server_command


def said(*arguments: str) -> tuple[int, str]:
    run = CliRunner().invoke(app, ["serve", *arguments])
    return run.exit_code, " ".join(run.output.split())


def test_what_is_started() -> None:
    command = server_command("m", "127.0.0.1", 8000, "m3:tokens=36", ["--max-num-seqs", "8"])
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and command[-2:] == ["--max-num-seqs", "8"]
    assert command[command.index("--middleware") + 1] == GATE  # never --trust-request-mm-kwargs without the gate
    assert "--trust-request-mm-kwargs" in command
    assert json.loads(command[command.index("--hf-overrides") + 1]) == {"vtr_default": "m3:tokens=36"}
    assert "--hf-overrides" not in server_command("m", "127.0.0.1", 8000, None, [])
    pocket = server_command("pocket", "127.0.0.1", 8000, None, [])
    assert pocket[pocket.index("--served-model-name") + 1] == "pocket" and "--served-model-name" not in command
    module, _, name = GATE.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


def test_a_default_that_cannot_be_served_is_refused_before_anything_starts() -> None:
    code, output = said("pocket", "--policy", "fastv:keep=0.25,layer=2")
    assert code == 1 and "globalcom2:retention=0.4" in output


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm() -> None:
    code, output = said("pocket")
    assert code == 1 and "docs/serving.md" in output and "--upstream" in output


def test_a_model_that_is_not_there(tmp_path) -> None:  # type: ignore[no-untyped-def]
    code, output = said(str(tmp_path / "nowhere"), "--upstream", "http://127.0.0.1:9")
    assert code == 1 and "nowhere" in output
