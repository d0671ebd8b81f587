"""The programs in examples/, as their first lines say to run them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

import vtr.pocket
from tests.serving import engine as settings
from tests.serving.server import Server, serving

EXAMPLES = Path(__file__).parents[2] / "examples"
POLICY = "m3:tokens=36"
QUESTION = vtr.pocket.sample(1)[1]


def run(*command: Any) -> str:
    """What a program prints. The environment is :mod:`tests.serving.engine`'s: small, quiet, no hub."""
    assert settings.os
    made = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-3000:]
    return made.stdout


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        vtr.pocket.sample(i)[0].save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), engine=["--enable-mm-embeds"]) as made:
        yield made


def test_pictures_under_a_policy_and_embeddings_made_elsewhere(server: Server, pictures: Path, tmp_path: Path) -> None:
    there = ["--model", "pocket", "--url", server.url + "/v1", "--max-tokens", 8]
    said = {
        spec: run(EXAMPLES / "openai_client.py", pictures / "1.png", QUESTION, "--policy", spec, *there).splitlines()
        for spec in (POLICY, "none")
    }
    lengths = {spec: int(lines[-1].split()[-2]) for spec, lines in said.items()}
    assert lengths[POLICY] < lengths["none"] / 2
    run("-m", "vtr.cli", "encode", pictures, "--policy", POLICY, "--out", tmp_path)
    (answer,) = run(EXAMPLES / "embeds_client.py", tmp_path / "1.safetensors", QUESTION, *there).splitlines()
    assert answer and answer == said[POLICY][0]
    run("-m", "vtr.cli", "encode", pictures, "--policy", "globalcom2:retention=0.25", "--out", tmp_path)  # depends
    assert run(EXAMPLES / "embeds_client.py", tmp_path / "1.safetensors", QUESTION, *there).strip()


def test_a_folder_of_pictures(pictures: Path, tmp_path: Path) -> None:
    lengths = []
    for spec in (POLICY, "none"):
        out = tmp_path / f"{len(lengths)}.jsonl"
        options = ["--model", vtr.pocket.WEIGHTS, "--out", out, "--policy", spec, "--max-tokens", 8]
        run(EXAMPLES / "offline_folder.py", pictures, QUESTION, *options, "--max-model-len", 2048)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["picture"] for row in rows] == ["0.png", "1.png"] and all(row["answer"] for row in rows)
        lengths.append([row["prompt_tokens"] for row in rows])
    assert all(reduced < whole / 2 for reduced, whole in zip(*lengths, strict=True))
