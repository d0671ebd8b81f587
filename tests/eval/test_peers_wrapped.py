"""Whole models of other packages beside a dense, masked run: with made-up peers in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner
from vtr.eval.peers import __main__ as command
from vtr.eval.peers import random_models, wrapped
from vtr.eval.peers.cases import CASES, Case
from vtr.eval.peers.catalogue import HERE, Peer
from vtr.eval.peers.channel import PeerError
from vtr.eval.peers.forced import found, kept
from vtr.eval.peers.random_models import DEPTH, LLAVA, QWEN
from vtr.eval.report import results

import vtr

WORDS, SEED = 3, 0
QUARTER = 16
PEER = Peer("made up", HERE / "angelslim_worker.py", ())
CUT = Case(LLAVA, "cut", "fastv:keep=0.25,layer=1")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wrapped.Ours]:
    folder = tmp_path_factory.mktemp("weights")
    random_models.save(folder, random_models.SMALL)
    yield wrapped.Ours(folder, WORDS)


class MadeUp:
    """Keeps what fastv does, and decodes ``early`` positions too far in front."""

    def __init__(
        self, ours: wrapped.Ours, early: int = 0, doubled: int = 0, fault: str = "", weights: float = 1.0
    ) -> None:
        self.ours, self.early, self.doubled, self.fault, self.weights = ours, early, doubled, fault, weights

    def ask(self, do: str, timeout: float, kind: str, method: str, seed: int, words: list[int]) -> dict[str, Any]:
        reference = self.ours.reference(kind, seed)
        length, positions = len(reference.row.embeds), reference.positions()
        if method == wrapped.NONE:
            slots = [reference.row.slots] * DEPTH
        elif self.fault:
            raise PeerError(self.fault)
        else:
            slots = self.ours.run(kind, CUT.ours, seed)[1]
            positions[..., length:] -= self.early
        said = reference.logits(slots, positions) * self.weights
        text = [slot for slot in range(length) if slot not in reference.row.slots]
        return {
            "logits": said.tolist(), "made": None, "kept": [sorted([*layer, *text]) for layer in slots],
            "entered": [len(layer) + len(text) for layer in slots],
            "cached": [len(layer) + len(text) + WORDS + self.doubled * length for layer in slots],
            "positions": [positions[..., :length].tolist(), *([int(p)] for p in positions[..., length:])],
        }  # fmt: skip


def row_of(theirs: MadeUp, ours: wrapped.Ours, case: Case = CUT) -> wrapped.Row:
    return wrapped.compare(PEER, case, theirs, ours, [SEED])  # type: ignore[arg-type]


def test_a_right_reduction_agrees_with_the_dense_run(ours: wrapped.Ours) -> None:
    row = row_of(MadeUp(ours), ours)
    assert (row.error, row.ours_error) == (None, None)
    assert (row.kept, row.ours_kept, row.same, row.early) == (QUARTER, QUARTER, 1.0, 0)
    assert row.first == row.decoded == row.decoded_there == 0.0 and row.agree == 1.0
    assert row.ours_first is not None and row.ours_first < 1e-4
    assert row.ours_decoded is not None and row.ours_decoded < 1e-4


def test_decoding_at_wrong_positions_is_seen_and_named(ours: wrapped.Ours) -> None:
    row = row_of(MadeUp(ours, early=48), ours)
    assert row.first == 0.0 and row.early == 48
    assert row.decoded is not None and row.decoded > 0.1
    assert row.decoded_there == 0.0  # nothing else is wrong


def test_a_cache_that_holds_more_than_entered_is_named(ours: wrapped.Ours) -> None:
    row = row_of(MadeUp(ours, doubled=1), ours)
    assert "layer 0 caches 241 keys, 122 tokens entered it" in row.note
    assert row_of(MadeUp(ours), ours).note == ""


def test_other_weights_are_no_comparison(ours: wrapped.Ours) -> None:
    row = row_of(MadeUp(ours, weights=1.01), ours)
    assert row.error is not None and "not the same weights" in row.error
    assert row.kept is None and row.ours_kept == QUARTER


def test_either_side_may_fail(ours: wrapped.Ours) -> None:
    row = row_of(MadeUp(ours, fault="KeyError: 'no'"), ours, Case(LLAVA, "cut", "hiprune:0.25,object_layer=99"))
    assert row.error == "KeyError: 'no'" and row.ours_error is not None and row.first is None
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(wrapped.table([row]))
    assert "fails" in console.export_text()


@pytest.mark.parametrize("kind", [LLAVA, QWEN])
@pytest.mark.parametrize("policy", ["none", "divprune:0.25", "fastv:keep=0.25,layer=2"])
def test_ours_says_what_the_dense_run_says(ours: wrapped.Ours, kind: str, policy: str) -> None:
    logits, slots, at = ours.run(kind, policy, SEED)
    assert len(slots[-1]) == (64 if policy == "none" else QUARTER)
    reference = ours.reference(kind, SEED)
    positions = reference.positions(entered := reference.entered(slots[0]), at)
    assert reference.closed_up(entered, positions) == (kind == LLAVA and policy.startswith("divprune"))
    torch.testing.assert_close(logits, reference.logits(slots, positions), atol=1e-4, rtol=0)
    assert float(logits.std()) > 0.5  # differences mean something


def test_weights_are_found_under_the_names_of_any_version() -> None:
    assert random_models.bare("vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias") == random_models.bare(
        "model.vision_tower.encoder.layers.0.mlp.fc1.bias"
    )
    assert random_models.bare("language_model.model.norm.weight") == random_models.bare(
        "model.language_model.norm.weight"
    )
    weights = random_models.build(LLAVA).state_dict()
    weights.popitem()
    with pytest.raises(KeyError):
        random_models.build(LLAVA, weights)


def test_what_was_kept_is_seen_by_the_rows() -> None:
    rows = torch.randn(6, 4)
    assert found(rows[[1, 2, 5]] + 1e-6, rows) == [1, 2, 5]
    assert found(rows[[2, 1]], rows) is None and found(rows.mean(0)[None], rows) is None
    left = torch.randn(4, 4)
    done = {"entered": {0: rows[[0, 2, 3, 5]], 1: left[[1, 3]]}, "left": {0: left, 1: left[[1, 3]]}}
    assert kept(done, rows) == ([[0, 2, 3, 5], [2, 5]], None)
    done["entered"][1] = left[:2] + left[2:]
    assert kept(done, rows) == ([[0, 2, 3, 5]], 1)


def test_every_case_names_a_policy_and_a_worker() -> None:
    for name, runs in CASES.items():
        for peer, cases in runs:
            assert peer.worker.is_file() and cases, name
            for case in cases:
                assert case.ours == wrapped.NONE or vtr.policy(case.ours).check(DEPTH) is None


def test_a_run_measures_costs_of_what_runs_and_writes_it(
    ours: wrapped.Ours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process(MadeUp):
        alive, process = True, None

        def ask(self, do: str, timeout: float, **request: Any) -> Any:
            if do == "run" and request["method"] == "fails":
                raise PeerError("KeyError: 'no' (/somewhere/else.py)")
            return {"made up": "1.0"} if do == "start" else super().ask(do, timeout, **request)

        def close(self) -> None:
            self.alive = False

    ratio = {"median": 0.5, "low": 0.4, "high": 0.6}
    span = {"theirs": 2.0, "ours": 1.0, "ratio": ratio}
    found = {"prefill": None, "first": span, "decode": span, "peak": None, "together": "one at a time",
             "ours_together": 1.0, "batch": dict.fromkeys(("first", "decode", "all"), ratio)}  # fmt: skip
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(wrapped, "Worker", lambda python, script, log: Process(ours))
    monkeypatch.setattr(wrapped, "Ours", lambda folder, words: ours)
    monkeypatch.setattr(wrapped, "CASES", {"angelslim": ((PEER, (CUT, replace(CUT, method="fails"))),)})
    monkeypatch.setattr(wrapped.venvs, "python_of", lambda peer, folder: Path(sys.executable))
    monkeypatch.setattr(random_models, "save", lambda folder, *sizes: None)
    monkeypatch.setattr(
        wrapped.costs, "measure", lambda case, theirs, mine, rounds: asked.append((case.method, rounds)) or found
    )
    (tmp_path / command.CHECKOUTS["angelslim"][1]).mkdir(parents=True)
    said = CliRunner().invoke(
        command.app, ["--only", "models", "--angelslim", str(tmp_path), "--rounds", "2", "--out", str(tmp_path)]
    )
    assert said.exit_code == 0, said.output
    assert "left out: models of lightcompress: give --lightcompress" in " ".join(said.output.split())
    assert "fails: KeyError" not in said.output and "fails, made up: KeyError: 'no'" in said.output
    written = results.load(tmp_path / "wrapped.json")
    assert asked == [("cut", 2)] and written["versions_there"] == {"made up": {"made up": "1.0"}}
    good, bad = written["rows"]
    assert good["costs"] == found and good["same"] == 1.0 and "error" not in good
    assert bad["error"] == "KeyError: 'no'" and "costs" not in bad
