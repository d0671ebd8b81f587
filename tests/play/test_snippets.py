"""What is copied runs: the script asks the same, the request is what the shell sends, and says what a server needs."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from vtr.play.snippets import curl, python

SPECS = {
    "none": "none", "m3:tokens=36": "m3:tokens=36", "fastv:keep=0.1": "fastv:keep=0.1",
    "fewer_crops+m3:36": "m3:tokens=36", "downsample:0.5": "none", "autoscale": "m3:tokens=",
}  # fmt: skip
"""What is copied, and what the report calls the policy in the model."""
QUESTION = """it's "this", $HOME `id` \\n — 100 %?\nJSON\n"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    vtr.pocket.sample(0)[0].save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spec", SPECS)
def test_the_script_asks_the_same(spec: str, folder: Path) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), torch.inference_mode(torch.is_inference_mode_enabled()):
        exec(compile(python("pocket", spec, "what color is the star", 4), "copied", "exec"), {})
    answer, _, row, *_ = said.getvalue().splitlines()
    assert answer == "orange"
    assert row.split()[1].startswith(SPECS[spec])


def test_the_script_about_a_video_runs(folder: Path) -> None:
    film = next(iter(vtr.pocket.films(1)))
    first, *rest = film["frames"]
    first.save("film.gif", save_all=True, append_images=rest, duration=400)
    script = python("pocket-video", "evs:keep=0.5", film["question"], 4, video=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(script.replace("film.mp4", "film.gif"), "copied", "exec"), {})
    assert "evs:keep=0.5" in said.getvalue()


def test_a_script_of_a_checkpoint_names_it() -> None:
    script = python("owner/name", "none", QUESTION, 4)
    compile(script, "copied", "exec")
    assert 'AutoProcessor.from_pretrained("owner/name")' in script and "policy=None" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    "spec", ["m3:tokens=36", 'by_image:default="m3:tokens=9",last="m3:tokens=36"', "fastv:keep=0.1"]
)
def test_the_request_is_what_the_shell_sends(spec: str, folder: Path) -> None:
    """A curl that gives back its body."""
    tool = folder / "bin" / "curl"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexec cat\n")
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    script = curl("owner/name", spec, QUESTION, 7, 10)
    done = subprocess.run(["bash", "-c", script], capture_output=True, env=environment, check=True, text=True)
    body: dict[str, Any] = json.loads(done.stdout)
    assert (body["model"], body["max_tokens"], body["vtr"]) == ("owner/name", 7, spec)
    image, text = body["messages"][0]["content"]
    assert text["text"] == QUESTION
    sent = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert sent == (folder / "picture.png").read_bytes()


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        ("m3:tokens=36", "# vtr serve pocket"),
        ("none", "# vtr serve pocket"),
        ("fastv:keep=0.1", "# vtr serve pocket --decoder-policies"),
        ("pmod:weights=pocket", "# vtr serve pocket --decoder-policies --weights pocket=FOLDER"),
        ("autoscale", "# vtr serve does not take autoscale:"),
        ("msac", "# vtr serve does not take msac:"),
    ],
)
def test_a_request_says_what_a_server_needs(spec: str, first: str) -> None:
    lines = curl("pocket", spec, "what", 4, 10).splitlines()
    assert lines[0] == first
    assert all(line.startswith("#") for line in lines) is ("does not" in first)


def test_a_model_that_no_server_takes() -> None:
    for model in ("pocket-internvl", "pocket-video", "pocket-pretrained"):
        lines = curl(model, "none", "what", 4, 10).splitlines()
        assert lines[0] == f"# vtr serve does not take {model}:"
        assert lines[1].startswith("# vLLM asks InternVL") and len(lines) == 2
