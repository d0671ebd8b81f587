"""The evaluation in real processes: killed and resumed, two at once, started by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vtr.eval import processes
from vtr.eval.processes import Rank, spread
from vtr.eval.run import Settings, evaluate

from tests.test_eval_run import body, pocket_folder, rows

POLICY = "fastv:keep=0.1"


pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="keeps processes to cores as Linux can")


@pytest.fixture(scope="module", autouse=True)
def one_thread_each() -> Iterator[None]:
    """One thread in this process, and in each of two that share two cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "cores", lambda: 1)
        yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    data = pocket_folder(tmp_path_factory.mktemp("data"), 12)
    return Settings(policies=(POLICY,), data=str(data), batch_size=2, max_new_tokens=2)


@pytest.fixture(scope="module")
def done(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done")
    evaluate(settings, out, processes=1)
    return out


def arguments(settings: Settings, out: Path) -> list[str]:
    return [
        "eval", "-p", POLICY, "--data", settings.data, "--batch-size", "2", "--max-new-tokens", "2", "--out", str(out)
    ]  # fmt: skip


def on_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def test_killed_in_the_middle_and_resumed(settings: Settings, done: Path, tmp_path: Path) -> None:
    """kill -9 after the first batch; the table is that of an undisturbed run."""
    command = [sys.executable, "-m", "vtr.cli", *arguments(settings, tmp_path / "out"), "--processes", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=on_one_core)
    written = tmp_path / "out" / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not (written.exists() and written.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(rows_of(written)) < 12 and not (tmp_path / "out" / "results.json").exists()
    evaluate(settings, tmp_path / "out", resume=True, processes=1)
    assert rows(tmp_path / "out") == rows(done) and body(tmp_path / "out") == body(done)


def rows_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def test_two_processes_make_one_table(settings: Settings, done: Path, tmp_path: Path) -> None:
    """Each its share of the batches; they may also finish what one process began."""
    begun = tmp_path / "out"
    begun.mkdir()
    (begun / "settings.json").write_bytes((done / "settings.json").read_bytes())
    (begun / "samples.jsonl").write_bytes(b"".join((done / "samples.jsonl").read_bytes().splitlines(True)[:3]))
    evaluate(settings, begun, resume=True, processes=2)
    assert rows(begun) == rows(done)
    ours, theirs = body(begun), body(done)
    assert ours.pop("hardware") and theirs.pop("hardware")
    assert ours == theirs
    assert sorted(path.name for path in begun.iterdir()) == [
        "results.json", "samples.jsonl", "settings.json", "table.csv", "table.md"
    ]  # fmt: skip


@pytest.mark.slow
def test_started_by_torchrun(settings: Settings, done: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vtr.cli"]
    shown = subprocess.run(
        [*launch, *arguments(settings, tmp_path / "out")], capture_output=True, text=True, timeout=300
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("needs picture") == 1
    assert [row["policies"] for row in rows(tmp_path / "out")] == [row["policies"] for row in rows(done)]


def fail_in_the_second(rank: Rank, store: str | None) -> None:
    if rank.index == 1:
        raise ValueError("the second cannot")
    rank.join(store)
    time.sleep(600)


@pytest.mark.slow
def test_what_one_process_cannot_is_said_and_ends_all() -> None:
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^the second cannot$"):
        spread(fail_in_the_second, 2)
    assert time.monotonic() - begun < 120


def test_who_am_i(monkeypatch: pytest.MonkeyPatch, settings: Settings, tmp_path: Path) -> None:
    assert Rank.here() == Rank(0, 1, 0, 1)
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert Rank.here() == Rank(3, 4, 1, 2)
    with pytest.raises(ValueError, match="leave it out under torchrun"):
        evaluate(replace(settings, limit=2), tmp_path, processes=2)
