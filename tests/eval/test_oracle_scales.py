"""The oracle over scales: the smallest that has a sample's best score."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vtr.eval.studies import oracle

TOKENS = {"m3:tokens=1": 7, "none": 744, "m3:tokens=9": 51}


def row(index: int, *scores: float) -> dict[str, Any]:
    """Scores at 7, 51 and 744 tokens."""
    by_tokens = dict(zip((7, 51, 744), scores, strict=True))
    return {
        "index": index,
        "policies": {spec: {"tokens": [n, n], "score": by_tokens[n]} for spec, n in TOKENS.items()},
    }


ROWS = [row(0, 1, 1, 1), row(1, 0, 1, 0), row(2, 0, 0, 1), row(3, 0, 0, 0), row(4, 0.3, 0.6, 0.6)]


def test_by_hand() -> None:
    found = oracle.oracle([*ROWS, {"index": 5, "bad": "broken"}], list(TOKENS))
    assert list(found.scales) == ["m3:tokens=1", "m3:tokens=9", "none"]  # the coarsest first
    assert found.scales["m3:tokens=9"] == (51, pytest.approx(2.6 / 5))
    assert found.smallest == {"m3:tokens=1": 1, "m3:tokens=9": 2, "none": 1}
    assert (found.samples, found.unanswerable) == (5, 1)
    assert found.accuracy == pytest.approx(3.6 / 5)
    assert found.tokens == pytest.approx((7 + 51 + 744 + 7 + 51) / 5)
    assert found.tokens_charged == pytest.approx((7 + 51 + 744 + 744 + 51) / 5)
    assert found.accuracy >= max(accuracy for _, accuracy in found.scales.values())


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="between scales"):
        oracle.oracle(ROWS, ["none"])
    with pytest.raises(ValueError, match="was not run"):
        oracle.oracle(ROWS, ["none", "m3:tokens=36"])


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    command = [sys.executable, "-m", "vtr.eval.studies.oracle", str(run)]
    empty = subprocess.run(command, capture_output=True, text=True)
    assert empty.returncode == 1 and "holds no rows" in empty.stderr
    (run / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=True)
    assert "| oracle | 172 (319) | 72.0% | none suffices: 20.0% |" in done.stdout
    assert json.loads((out / "oracle.json").read_text())["unanswerable"] == 1
    assert (out / "oracle.png").stat().st_size > 5000
