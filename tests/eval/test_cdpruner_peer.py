"""OpenVINO GenAI's CDPruner beside ours: the driver, with workers that are fake; no network, no OpenVINO."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner
from vtr.eval.peers import __main__ as command
from vtr.eval.peers import cdpruner
from vtr.eval.peers.channel import PeerError
from vtr.eval.report import results

import vtr

FAKE = Path(__file__).parent / "fake_cdpruner.py"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The result of the command with fakes on both sides."""
    monkeypatch.setattr(cdpruner, "OPENVINO", replace(cdpruner.OPENVINO, worker=FAKE))
    monkeypatch.setattr(cdpruner, "OURS", FAKE)
    monkeypatch.setattr(cdpruner.venvs, "python_of", lambda peer, folder: Path(sys.executable))
    return run(tmp_path)


def run(tmp_path: Path) -> dict[str, Any]:
    asked = ["--only", "openvino", "--limit", "3", "--timed", "3", "--rounds", "1", "--steps", "4", "--out"]
    result = CliRunner().invoke(command.app, [*asked, str(tmp_path)])
    assert result.exit_code == 0, result.output
    return {"said": result.output, **results.load(tmp_path / "cdpruner.json")}


def test_rows_say_tokens_answers_and_cpu_time(ran: dict[str, Any]) -> None:
    rows = {row["pruned"]: row for row in ran["rows"]}
    assert list(rows) == ["none", "50", "75", "90"] and ran["kind"] == "cdpruner"
    half = rows["50"]
    assert half["ours"] == 'cdpruner:keep=72,relevance="embeddings"'
    assert half["tokens"] == half["ours_tokens"] == 33 + 72
    assert rows["none"]["same_answers"] == 1.0 and half["same_answers"] == pytest.approx(2 / 3)
    assert half["same_kernel_same_answers"] == 1.0  # ours ranked by their kernel
    assert half["prefill_ms"] == {"median": 105.0, "low": 105.0, "high": 105.0}
    assert half["decode_ms"] == half["ours_decode_ms"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert half["prefill_ratio"] == half["decode_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ran["versions_there"] == {"fake": "1.0"} and half["error"] is None


def test_what_fails_is_shown_with_its_error(ran: dict[str, Any]) -> None:
    row = ran["rows"][-1]
    assert row["error"] == "RuntimeError: not that many" and row["prefill_ms"] is None
    assert "90 pruned: RuntimeError: not that many" in ran["said"] and "fails" in ran["said"]


def test_an_environment_that_cannot_be_made_fails_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(peer: Any, folder: Path) -> Path:
        raise PeerError("pip install openvino-genai: no such version")

    monkeypatch.setattr(cdpruner.venvs, "python_of", refuse)
    assert {row["error"] for row in run(tmp_path)["rows"]} == {"pip install openvino-genai: no such version"}


def test_questions_have_pictures_that_no_side_resizes(tmp_path: Path) -> None:
    cdpruner.questions(tmp_path, 2, seed=0)
    entries = json.loads((tmp_path / "questions.json").read_text())
    assert len(entries) == 2 and all(entry["question"] for entry in entries)
    assert {Image.open(tmp_path / entry["picture"]).size for entry in entries} == {(336, 336)}
    assert cdpruner.SIDE % 28 == 0


@pytest.mark.parametrize(("pruned", "kept"), zip(cdpruner.PRUNED, (72, 36, 14), strict=True))
def test_ours_keeps_as_many_as_theirs_rounds_to(pruned: str, kept: int) -> None:
    policy = vtr.policy(cdpruner.ours_of(pruned))
    assert isinstance(policy, vtr.CDPruner) and policy.keep == kept
