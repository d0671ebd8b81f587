"""The evaluation in real processes: killed and resumed, two at once, started by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vtr.eval.accuracy import processes
from vtr.eval.accuracy.processes import Rank, spread
from vtr.eval.accuracy.run import Settings, evaluate

from tests.eval.test_eval_run import body, pocket_folder, rows

POLICY, COUNT = "fastv:keep=0.1", 16


pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="keeps processes to cores as Linux can")


@pytest.fixture(scope="module", autouse=True)
def one_thread_each() -> Iterator[None]:
    """One thread in this process, and in each of two that share two cores."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(before)[:2])
    torch.set_num_threads(1)  # whatever the tests before have left
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "cores", lambda: 1)
        yield
    os.sched_setaffinity(0, before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    data = pocket_folder(tmp_path_factory.mktemp("data"), COUNT)
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


def killed(settings: Settings, out: Path, processes: int) -> list[str]:
    """Start the command, kill -9 it once rows are there; returns the ids of its processes."""
    command = [sys.executable, "-m", "vtr.cli", *arguments(settings, out), "--processes", str(processes)]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=on_cores(processes)
    )
    deadline = time.monotonic() + 120
    while not lines(out):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return children


def on_cores(count: int) -> Callable[[], None]:
    return lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_by_two_processes(settings: Settings, done: Path, tmp_path: Path) -> None:
    """kill -9 after the first batch; two processes share the rest; the table is that of an undisturbed run of one."""
    out = tmp_path / "out"
    killed(settings, out, processes=1)
    assert 0 < len(lines(out)) < COUNT and not (out / "results.json").exists()
    evaluate(settings, out, resume=True, processes=2)
    assert rows(out) == rows(done)
    ours, theirs = body(out), body(done)
    assert (ours.pop("processes"), theirs.pop("processes")) == (2, 1)
    assert ours == theirs
    assert sorted(path.name for path in out.iterdir()) == [
        "results.json", "samples.jsonl", "settings.json", "table.csv", "table.md"
    ]  # fmt: skip


@pytest.mark.slow
def test_processes_end_with_the_command_that_started_them(settings: Settings, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    children, deadline = killed(settings, out, processes=2), time.monotonic() + 60
    assert len(children) >= 2
    while any(running(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 0 < len(lines(out)) < COUNT and not (out / "results.json").exists()
    evaluate(settings, out, resume=True, processes=1)
    assert rows(out) == rows(done) and body(out) == body(done)


def lines(out: Path) -> list[bytes]:
    return [line for path in out.glob("samples*.jsonl") for line in path.read_bytes().splitlines()]


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_started_by_torchrun(settings: Settings, done: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vtr.cli"]
    shown = subprocess.run(
        [*launch, *arguments(settings, tmp_path / "out")], capture_output=True, text=True, timeout=300
    )
    assert shown.returncode == 0, shown.stderr
    assert " ".join(shown.stdout.split()).count("need the picture") == 1
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


def test_threads_are_this_process_s_part_or_what_the_environment_says(monkeypatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 6)
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with processes.shared_cores(Rank(0, 2, 0, 2)):
        assert torch.get_num_threads() == 3
    with processes.shared_cores(Rank()):
        assert torch.get_num_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    with processes.shared_cores(Rank()):
        assert torch.get_num_threads() == 6
    assert torch.get_num_threads() == before
