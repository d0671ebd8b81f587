"""The run on a GPU, dry: from a clone that is not installed, all parts end; what fails or does not hold is said."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vtr.eval.cost import midsize, shapes
from vtr.eval.cost.contenders import shipped
from vtr.eval.gpu import __main__ as run
from vtr.eval.gpu import kernels, machine, oracles, table
from vtr.eval.gpu.models import CELLS, SHAPES
from vtr.eval.gpu.policies import tiny_policies
from vtr.eval.gpu.record import Record, Setup, finite
from vtr.eval.gpu.waits import watched

import vtr
from tests import tiny

ROOT = Path(__file__).parents[2]
SMALL = Setup(torch.device("cpu"), small=True)
TIMED = [f"{kind} {shape} {cell}" for shape in SHAPES for kind in ("prefill", "decode", "launches") for cell in CELLS]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The command as a user types it in a clone, with nothing but torch, transformers and numpy."""
    folder = tmp_path_factory.mktemp("gpu")
    told = [sys.executable, str(ROOT / "tests" / "eval" / "bare.py"), "vtr.eval.gpu", "--small", "--device", "cpu"]
    done = subprocess.run(
        [*told, "--seconds", "580", "--out", str(folder / "gpu.json")], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}, timeout=590,
    )  # fmt: skip
    return done, folder / "gpu.json"


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


@pytest.mark.slow
def test_all_parts_are_done_in_a_bare_clone(ran: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, file = ran
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    data = table.load(file)
    assert list(data["parts"]) == ["machine", "kernels", "oracles", *TIMED]
    assert {name: part["state"] for name, part in data["parts"].items()} == dict.fromkeys(data["parts"], "done")
    assert data["faults"] == [] and all(map(math.isfinite, numbers(data)))
    assert data["command"].startswith("python -m vtr.eval.gpu --small")
    cases = data["parts"]["oracles"]["found"]["llava"]
    assert len(cases) > 12 and all(case["faults"] == [] for case in cases.values())
    assert all(case["kept as on the CPU"] and case["says the same without a cache"] for case in cases.values())


@pytest.mark.slow
def test_times_are_beside_unpatched_and_the_bound(ran: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    data = table.load(ran[1])
    for name in TIMED:
        rows = data["parts"][name]["found"]["rows"]
        assert "unpatched" in rows and ("a mix" if name.endswith("mixed") else "fastv 33 %") in rows
        for row in rows.values():
            if name.startswith("launches"):
                assert row["prefill"]["operators"] > row["token"]["operators"] > 0
            else:
                assert row["bound_ms"] > 0 and row["over_bound"] > 0 and row["over_unpatched"]["value"] > 0
    tokens = data["parts"]["prefill llava-1.5-7b mixed"]["found"]["tokens"]
    assert len(set(tokens)) == len(tokens)


@pytest.mark.slow
def test_a_file_is_shown_again(ran: tuple[subprocess.CompletedProcess[str], Path], capsys: Any) -> None:
    assert run.main(["--show", str(ran[1])]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() in ran[0].stdout
    for word in ("measured ceilings", "packed attention", "batches agree", "llava-next-7b, 8 equal rows", "0 faults"):
        assert word in shown


def test_some_parts_alone_are_shown(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "gpu.json"
    assert run.main(["--small", "--device", "cpu", "--out", str(out), "--parts", "kernels"]) == 0
    shown = capsys.readouterr().out
    assert run.main(["--show", str(out)]) == 0
    assert "packed attention" in shown and capsys.readouterr().out.strip() in shown


def test_another_file_is_not_shown(tmp_path: Path, capsys: Any) -> None:
    assert run.main(["--show", str(tmp_path / "none.json")]) == 2
    assert run.main(["--show", str(ROOT / "eval" / "results" / "engine.json")]) == 2
    assert "name a file that python -m vtr.eval.gpu has written" in capsys.readouterr().err


def test_a_part_that_fails_is_written_down_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def fails(setup: Setup, record: Record, found: dict[str, Any]) -> None:
        found["32/32 × 128"] = {"calls": 0, "error": 0.5}
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(kernels, "measure", fails)
    monkeypatch.setattr(oracles, "measure", lambda setup, record, found: found.update(ran={}))
    out = tmp_path / "gpu.json"
    assert run.main(["--small", "--device", "cpu", "--out", str(out), "--parts", "kernels", "oracles"]) == 1
    parts = json.loads(out.read_text())["parts"]
    assert parts["kernels"]["state"] == "failed" and parts["kernels"]["found"] == {
        "32/32 × 128": {"calls": 0, "error": 0.5}
    }
    assert parts["kernels"]["error"] == "RuntimeError: no kernel image" and "in fails" in parts["kernels"]["where"][-1]
    assert parts["oracles"]["state"] == "done"
    assert "kernels: failed: RuntimeError: no kernel image" in capsys.readouterr().out


def test_what_is_too_late_is_left_out(capsys: Any) -> None:
    assert run.main(["--small", "--device", "cpu", "--seconds", "0.001"]) == 2
    assert "1 of 21 parts done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (["--device", "cpu"], "take --small"),
        (["--small", "--device", "tpu"], "choose cuda"),
        (["--small", "--device", "cuda:77"], "CUDA GPUs"),
        (["--small", "--device", "cpu", "--seconds", "0"], "above 0"),
        (["--small", "--device", "cpu", "--out", "."], "is a folder"),
        (["--small", "--device", "cpu", "--parts", "kernel"], "invalid choice"),
    ],
)
def test_bad_arguments(told: list[str], says: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(told)
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_every_policy_is_put_to_the_oracles() -> None:
    assert {policy.name for policy in tiny_policies(64).values()} >= set(shipped())


def test_what_does_not_hold_is_found() -> None:
    models = oracles.Models.of("llava", torch.device("cpu"))
    models.device.get_decoder().layers[1].mlp.down_proj.weight.data *= 3
    with torch.no_grad():
        faults = models.compare([vtr.FastV(0.5, layer=2), None, None, None])["faults"]
    assert any(fault.startswith("logits off by") for fault in faults)


def test_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    record, right = Record(SMALL), kernels.by_rows
    monkeypatch.setattr(kernels, "by_rows", lambda *given: 1.1 * right(*given))
    kernels.measure(SMALL, record, {})
    assert record.faults and record.status() == 1


def test_waits_are_listed_with_their_lines() -> None:
    model = vtr.patch(tiny.llava())

    def waits(*_: Any) -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    model.get_decoder().layers[2].register_forward_hook(waits)
    model.model.register_forward_pre_hook(waits)
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "what"]])
    with watched(model) as seen:
        tiny.generate(model, inputs, policy=vtr.FastV(0.5), max_new_tokens=3)
    assert seen.forwards == 3
    assert [sum(found.values()) for found in (seen.inside, seen.around, seen.decoding)] == [1, 1, 4]
    assert all(line.rpartition(":")[2].isdigit() for line in seen.inside)
    with warnings.catch_warnings(record=True) as later:
        warnings.simplefilter("always")
        tiny.generate(model, inputs, max_new_tokens=1)
    assert seen.forwards == 3 and len(later) >= 2  # nothing of it is left


def test_models_share_their_weights() -> None:
    shape = shapes.scaled_down(shapes.SHAPES["llava-1.5-7b"])
    other = shapes.scaled_down(shapes.SHAPES["llava-next-7b"])
    first = shapes.build(shape, "cpu", torch.float32)
    second = shapes.sharing(first, other)
    mine = {weight.data_ptr() for weight in first.parameters()}
    own = {name for name, weight in second.named_parameters() if weight.data_ptr() not in mine}
    assert own == {"model.image_newline"}
    model = vtr.patch(midsize.twin(second))
    model(**shapes.prompts(second, other, [(1, 5)]), policy=vtr.FastV(0.5, layer=2))
    assert vtr.report(model).rows[0].vision_tokens[0] == other.vision_tokens


def test_numbers_that_json_does_not_know_are_none() -> None:
    assert finite({"a": [1.0, math.inf, (math.nan, "x", True)]}) == {"a": [1.0, None, [None, "x", True]]}


def test_ceilings_are_measured() -> None:
    found: dict[str, Any] = {}
    machine.measure(SMALL, found)
    assert found["gemm_flops"] > 0 and found["bandwidth"] > 0 and len(found["products"]) == 3
