"""``vtr bench fork``: four ways to the same answers, and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from vtr.eval.cost import forks

from vtr.cli import app


def test_prompts_share_what_they_begin_with() -> None:
    rows = [torch.tensor(row) for row in ([1, 2, 3, 4], [1, 2, 4, 4, 5], [1, 2, 3])]
    assert forks.shared(rows) == 2


@pytest.mark.slow
def test_all_ways_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "fork.json"
    options = ["--questions", "3", "--policy", "none", "--policy", "m3:tokens=36", "--rounds", "1", "--tokens", "2"]
    done = CliRunner().invoke(app, ["bench", "fork", *options, "--json", str(file)])
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert result["kind"] == "fork" and result["shared"] > 700  # a picture of the pocket model has 744 tokens
    for row, spec in zip(result["rows"], ("none", "m3:tokens=36"), strict=True):
        assert row["policy"] == spec and set(row["ratios"]) == set(forks.WAYS)
        assert row["same"] == dict.fromkeys(forks.WAYS, 3)
        assert all(len(spent) == 1 and spent[0] > 0 for spent in row["seconds"].values())
        assert row["ratios"]["prefills"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--questions", "1"], "at least two questions"),
        (["--rounds", "0"], "at least one"),
        (["--policy", "fastw"], "fastw"),
    ],
)
def test_it_says_what_is_wrong(options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["bench", "fork", *options])
    assert done.exit_code != 0 and words in done.output
