"""The driver that measures peers beside vtr: with a fake peer in a process of its own, without a network."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner
from vtr.eval.peers import __main__ as command
from vtr.eval.peers import venvs
from vtr.eval.peers.catalogue import ALL_PEERS, HERE, Method, Peer
from vtr.eval.peers.channel import PeerError, Worker
from vtr.eval.peers.data import export
from vtr.eval.peers.driver import Budget, Plan, Row, Side, budget_of, compare, failed
from vtr.eval.report import results

import vtr

FAKE = Path(__file__).parent / "fake_peer.py"
QUESTIONS = 6


def peer(*methods: str, batch: int = 1) -> Peer:
    return Peer("fake 1.0", FAKE, tuple(Method(name, "fast", "a note", batch) for name in methods))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    budget = Budget(vision_tokens=744, kept_tokens=208.0, context_share=0.28)
    return Plan(tmp_path, tmp_path, range(QUESTIONS), budget, 0.1, 2, timed=2, rounds=2, steps=3, timeout=20)


@pytest.fixture
def sides(plan: Plan) -> Iterator[tuple[Side, Side]]:
    made = Side(plan, Path(sys.executable), FAKE), Side(plan, Path(sys.executable), FAKE)
    yield made
    for side in made:
        side.close()


def row_of(method: str, sides: tuple[Side, Side], plan: Plan, batch: int = 1) -> Row:
    return compare(peer(method), Method(method, "fast", "a note", batch), *sides, plan)


def test_a_peer_that_works(sides: tuple[Side, Side], plan: Plan) -> None:
    row = row_of("slow", sides, plan)
    assert row.error is None and row.versions["fake"] == "1.0"
    assert (row.accuracy, row.ours_accuracy, row.none_accuracy) == (1.0, 1.0, 1.0)
    assert (row.kv_tokens, row.ours_kv_tokens) == (208.0, 208.0)
    assert row.prefill_ms == {"median": 40.0, "low": 40.0, "high": 40.0}
    assert row.ours_prefill_ms == {"median": 10.0, "low": 10.0, "high": 10.0}
    assert row.prefill_ratio == row.decode_ratio == {"median": 0.25, "low": 0.25, "high": 0.25}
    assert row.none_prefill_ms is not None and row.none_prefill_ms["median"] == 80.0


def test_accuracy_is_compared_question_by_question(sides: tuple[Side, Side], plan: Plan) -> None:
    row = row_of("half", sides, plan)
    assert (row.accuracy, row.ours_accuracy) == (0.5, 1.0)
    assert row.difference is not None
    assert row.difference["difference"] == 0.5 and (row.difference["wins"], row.difference["losses"]) == (3, 0)


def test_a_batch_is_compared_with_its_rows_alone(sides: tuple[Side, Side], plan: Plan) -> None:
    row = row_of("padded", sides, plan, batch=4)
    assert (row.same_as_alone, row.ours_same_as_alone) == (0.5, 1.0)
    assert row.accuracy == 1.0 and row.prefill_ms is None


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("raises", "AttributeError: 'LlavaNextModel' object has no attribute 'rope_deltas'"),
        ("dies", "the process ended with status 3: Fatal: out of luck"),
        ("untimed", "NotImplementedError: decoding"),
    ],
)
def test_a_peer_that_fails_says_why(method: str, error: str, sides: tuple[Side, Side], plan: Plan) -> None:
    row = row_of(method, sides, plan)
    assert row.error == error
    assert row.ours_accuracy == 1.0  # ours was measured all the same
    assert row.prefill_ms is None
    assert row.accuracy == (1.0 if method == "untimed" else None)
    assert row_of("slow", sides, plan).error is None  # and the next method runs, in a new process if need be


def test_a_peer_that_hangs_is_ended(sides: tuple[Side, Side], plan: Plan) -> None:
    started = time.monotonic()
    assert row_of("slow", sides, plan).error is None
    plan.timeout = 1.0
    row = row_of("hangs", sides, plan)
    assert row.error == "no answer to 'answer' within 1 s" and time.monotonic() - started < 30
    assert sides[0].worker is not None and not sides[0].worker.alive


def test_what_a_library_prints_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    worker = Worker(Path(sys.executable), FAKE, tmp_path / "log")
    try:
        reply = worker.ask("answer", 20, method="slow", indexes=[4], budget={"kept_tokens": 1.0})
        assert reply == {"ids": [[4]], "kv_tokens": 1.0}
        with pytest.raises(PeerError, match="KeyError: 'nonsense'"):
            worker.ask("nonsense", 20)
    finally:
        worker.close()
    assert "chatter" in (tmp_path / "log").read_text()
    with pytest.raises(PeerError, match="ended with status"):
        worker.ask("start", 20)


@pytest.mark.slow
def test_rows_of_all_peers_are_written_also_where_one_cannot_be_installed(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = Peer("gone 9", FAKE, (Method("slow", "fast", ""), Method("half", "fast", "")), ("gone==9",))

    def no_pip(python: Path, arguments: list[str], timeout: float) -> None:
        raise PeerError(f"pip install {' '.join(arguments)}: ERROR: No matching distribution found for gone==9")

    monkeypatch.setattr(venvs, "_pip", no_pip)
    ours = Side(plan, Path(sys.executable), FAKE)
    try:
        rows = command.run([gone, peer("slow", "raises")], plan, tmp_path / "environments", ours)
    finally:
        ours.close()
    assert [row.method for row in rows] == ["slow", "half", "slow", "raises"]
    assert all(row.error is not None and "No matching distribution" in row.error for row in rows[:2])
    assert rows[2].error is None and rows[3].error is not None
    saved = results.save(tmp_path / "peers.json", "peers", {"rows": [asdict(row) for row in rows]}, seed=0)
    for row in json.loads((tmp_path / "peers.json").read_text())["rows"]:
        for key in ("peer", "method", "ours", "accuracy", "ours_accuracy", "prefill_ms", "ours_prefill_ms", "error"):
            assert key in row
    assert saved["kind"] == "peers"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(command.table(rows))
    shown = console.export_text()
    assert shown.count("fails") == 3 and "decode" in shown.split() and "0.25" in shown


def test_the_command_is_written_as_one_types_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(HERE / "__main__.py"), "--limit", "3"])
    assert results.command() == "python -m vtr.eval.peers --limit 3"
    monkeypatch.setattr(sys, "argv", [str(HERE.parent / "studies" / "films.py"), "--rows", "runs"])
    assert results.command() == "python -m vtr.eval.studies.films --rows runs"


def asked(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(command.app, [*options], terminal_width=200)
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_without_checkouts_their_parts_are_told_as_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for part in ("packages", "models", "openvino", "selectors"):
        monkeypatch.setattr(command.Run, part, lambda self, *given, part=part: ran.append(part))
    code, said = asked()
    assert code == 0 and ran == ["packages", "openvino"]
    for what, name in (
        ("models of angelslim", "Tencent/AngelSlim"),
        ("models of lightcompress", "ModelTC/LightCompress"),
        ("selectors", "Tencent/AngelSlim"),
    ):
        assert f"left out: {what}: give --" in said and name in said
    code, said = asked("--only", "selectors")
    assert code == 2 and "--angelslim" in said and ran == ["packages", "openvino"]


def test_a_part_or_a_package_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(command.Run, "packages", lambda self, peers, *how: ran.append([one.name for one in peers]))
    monkeypatch.setattr(command.Run, "models", lambda self, given: ran.append(list(given)))
    monkeypatch.setattr(command.Run, "selectors", lambda self, checkout: ran.append(checkout))
    for _, shows in command.CHECKOUTS.values():
        (tmp_path / shows).mkdir(parents=True)
    both = ("--angelslim", str(tmp_path), "--lightcompress", str(tmp_path))
    for only in ("kvpress", "LightC", "models", "selectors"):
        assert asked("--only", only, *both)[0] == 0
    assert all(name.startswith("kvpress") for name in ran[0]) and len(ran[0]) == 2
    assert ran[1:] == [["lightcompress"], ["angelslim", "lightcompress"], tmp_path]


def test_what_is_not_there_is_said_before_anything_runs(tmp_path: Path) -> None:
    code, said = asked("--only", "nothing")
    assert code == 2 and "nothing begins with 'nothing'" in said and "openvino" in said and "kvpress" in said
    code, said = asked("--lightcompress", str(tmp_path))
    assert code == 2 and "is no checkout of ModelTC/LightCompress" in said


def test_failed_installs_make_a_row_a_method(plan: Plan) -> None:
    rows = failed(replace(peer("slow", "half"), name="x"), PeerError("pip: no"), plan)
    assert [(row.peer, row.method, row.error) for row in rows] == [("x", "slow", "pip: no"), ("x", "half", "pip: no")]


@pytest.mark.slow
def test_environments_borrow_torch_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(venvs, "_pip", lambda python, arguments, timeout: asked.append(arguments))
    wanted = Peer("a 1", FAKE, (), ("a==1",), ("b==2",))
    python = venvs.python_of(wanted, tmp_path)
    assert asked == [["a==1"], ["--no-deps", "b==2"]]
    assert venvs.python_of(wanted, tmp_path) == python and len(asked) == 2
    assert venvs.python_of(replace(wanted, requirements=("a==2",)), tmp_path) != python
    worker = tmp_path / "which.py"
    worker.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom channel import serve\nimport torch\n"
        "serve({'start': lambda: torch.__version__})\n"
    )
    started = Worker(python, worker, tmp_path / "log")
    try:
        assert started.ask("start", 60) == torch.__version__
    finally:
        started.close()


def test_the_budget_is_as_many_cached_tokens_as_a_single_cut_leaves() -> None:
    budget = budget_of(10, 744, 0.1, 2)
    assert budget.kept_tokens == (2 * 744 + 8 * 74) / 10 == 208.0
    assert int(745 * budget.context_share) == 209


def test_every_peer_has_a_worker_and_names_policies_there_are() -> None:
    from vtr.eval.accuracy import blind  # noqa: F401  (registers the question-blind selector)

    assert len({p.name for p in ALL_PEERS}) == len(ALL_PEERS)
    for p in ALL_PEERS:
        assert p.worker.is_file() and p.methods
        for method in p.methods:
            assert vtr.policy(method.ours.format(keep=0.1, layer=2)).check(10) is None and method.note


def test_exported_embeddings_are_what_enters_the_text_model(tmp_path: Path) -> None:
    """The language model alone, on exported embeddings, says what the whole model says."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    entries = export(tmp_path, 2, seed=3)
    assert len({entry["length"] for entry in entries[2:]}) >= 4  # the probes
    del entries[3:]
    assert json.loads((tmp_path / "questions.json").read_text())[:3] == entries
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "language_model", dtype=torch.float32)
    tensors: dict[str, Any] = load_file(tmp_path / "embeddings.safetensors")
    model, processor = vtr.pocket.load()
    for i, entry in enumerate(entries):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": entry["question"]}]}
        from PIL import Image

        inputs = processor(
            text=processor.apply_chat_template([turn], add_generation_prompt=True),
            images=Image.open(tmp_path / entry["picture"]),
            return_tensors="pt",
        )
        with torch.inference_mode():
            whole = model(**inputs, logits_to_keep=1).logits
            part = alone(inputs_embeds=tensors[str(i)][None], logits_to_keep=1).logits
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=0)
        assert entry["length"] == inputs["input_ids"].shape[1] == len(tensors[str(i)])
        assert entry["picture_ends"] == int((inputs["input_ids"] == model.config.image_token_id).sum()) + 1


def test_workers_find_the_standard_library() -> None:
    # a script's own folder comes first on its path, so a file there must not bear a standard module's name
    assert not {file.stem for file in (*HERE.glob("*.py"), *FAKE.parent.glob("*.py"))} & sys.stdlib_module_names
