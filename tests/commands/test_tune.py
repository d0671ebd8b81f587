"""``vtr tune auto``: what it refuses before a model is loaded, and what it says of a file of answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import vtr
from vtr.cli import app
from vtr.data.sources import open_data, usable
from vtr.training.asked import Asked


def run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["tune", "auto", *args])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--limit", "320"],
            "takes 349 pictures with questions (299 to test the promise, 50 to fit the estimate), and",
        ),
        (["--limit", "320"], "give 29 more"),
        (["--limit", "400", "--data", "pocket:split=val"], "give 299 more"),
        (["--loss", "0"], "both lie between 0 and 1"),
        (["--signal", "mood"], "choose auto, confidence, attention or probe"),
        (["--cost", "money"], "choose time or flops"),
        (["--data", "pocket:per_scene=9"], "1 to 8 to a picture"),
    ],
)
def test_refused_before_anything_is_loaded(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtr.models.load", lambda *a, **k: pytest.fail("a model was loaded"))
    code, told = run("--out", str(tmp_path / "auto"), *args)
    assert code == 1 and said in told
    assert not (tmp_path / "auto" / "vtr_policy.json").exists()


def test_tuned_on_answers_that_are_there(tmp_path: Path) -> None:
    samples = usable(open_data("pocket:split=val,per_scene=1", limit=360), "pocket")
    n, rng = len(samples), np.random.default_rng(0)
    sure = rng.uniform(0.6, 1.0, (n, 1, 1)).astype(np.float32)
    score = np.stack([sure[:, 0, 0] > 0.7, np.ones(n, bool)], 1).astype(float)
    Asked(
        ["m3:tokens=9", "none"], score, np.tile([45, 180], (n, 1)), np.zeros((n, 1, 1), np.int64), sure,
        np.ones((n, 1, 1), bool), np.zeros((n, 1, 160), np.float16), np.array([one.group for one in samples]),
        np.array([one.kind for one in samples]), np.array([["x", "x"]] * n),
    ).save(tmp_path / "answers.npz")  # fmt: skip
    given = ["--model", "pocket-internvl", "--limit", "360", "--choices", "m3:1;none", "--cost", "flops"]
    given += ["--max-new-tokens", "1", "--answers", str(tmp_path / "answers.npz"), "--out", str(tmp_path / "auto")]
    code, told = run(*given)
    assert code == 1 and "other choices" in told  # the file says m3:tokens=9
    given[given.index("m3:1;none")] = "m3:9;none"
    code, told = run(*given)
    assert code == 0, told
    assert "promised: on questions like these, accuracy falls by at most 1.00% against the last choice" in told
    made = vtr.policy(f"auto:weights={tmp_path / 'auto'}")
    assert isinstance(made, vtr.AutoPolicy) and made.promise is not None
    assert made.promise["metric"] == "auto" and made.promise["digest"].startswith("sha256:")
    assert made.promise["seen_loss"] == 0.0 and made.promise["cost"] < 1
    shutil.rmtree(tmp_path / "auto")
