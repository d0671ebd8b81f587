"""The study of attention, rankings and norms: the same as the search measures, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner
from vtr.eval.studies import statistics
from vtr.eval.studies.statistics_seen import look

import vtr
from vtr.chat import encode
from vtr.search.ranking import rank_agreement


@torch.inference_mode()
def test_it_sees_what_the_search_sees() -> None:
    model, processor = vtr.pocket.load("internvl")
    (sample,) = vtr.pocket.samples(1)
    asked = (sample["image"], sample["question"], sample["answer"])
    theirs = rank_agreement(vtr.patch(model), processor, [asked])
    vtr.unpatch(model)
    model.set_attn_implementation("eager")
    seen = look(model, encode(processor, [sample["question"]], [sample["image"]]), "text")
    np.testing.assert_allclose(statistics.taus(seen.picture)[:-1, :-1], theirs.tau, atol=0.01)
    layers = len(model.get_decoder().layers)
    assert seen.first.shape == (layers,) and seen.norms.shape == (3, layers) and (seen.picture.sum(1) < 1).all()
    assert seen.tower is not None and len(seen.tower["itself"]) == model.config.vision_config.num_hidden_layers


def test_shares_of_attention() -> None:
    weights = np.array([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    np.testing.assert_allclose(statistics.held(weights, weights, 0.5), [0.7, 0.7])
    np.testing.assert_allclose(statistics.held(weights, weights[[0]], 0.5), [0.7, 0.3])
    tau = np.array([[1, 0.1, 0.3], [0.1, 1, 0.6], [0.3, 0.6, 1]])
    found = statistics.agreement(tau)
    assert found["tau_first"] == 0.2 and found["tau_but_first"] == 0.6 and found["alike_but_first"] == 1.0


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(statistics.main)
    said = CliRunner().invoke(app, ["pocket-internvl", "--limit", "1", "--queries", "last", "--out", str(tmp_path)])
    assert said.exit_code == 0, said.output
    body = json.loads((tmp_path / "statistics.json").read_text())
    assert body["kind"] == "statistics" and body["models"][0]["model"] == "pocket-internvl"
    assert (tmp_path / "statistics.png").stat().st_size > 10_000


@pytest.mark.parametrize(("args", "told"), [(["pockt"], "did you mean"), (["--queries", "all"], "choose text")])
def test_what_cannot_be(args: list[str], told: str, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(statistics.main)
    said = CliRunner().invoke(app, [*args, "--out", str(tmp_path)])
    assert said.exit_code == 1 and told in said.output and not list(tmp_path.iterdir())
