"""kill -9 at random moments: `vtr eval`, `vtr search` and `vtr train` go on and end as if nothing had happened.

Ten moments each, every other one once files are there. The seed of the moments is printed; `VTR_KILL_SEED=…` draws the
same again, `VTR_KILLS=…` more or fewer.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vtr
from tests.commands.test_search_cli import small_data
from tests.eval.test_eval_run import body, pocket_folder, rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "forkserver" not in multiprocessing.get_all_start_methods(), reason="processes are forked off one that is ready"
    ),
]
KILLS = int(os.environ.get("VTR_KILLS", "10"))
SEED = int(os.environ.get("VTR_KILL_SEED") or random.SystemRandom().randrange(10**6))


def _command(words: list[str], said: str) -> None:
    """`vtr` with these words, in a process of its own; what it prints goes to the file ``said``."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    from vtr.cli import app

    torch.set_num_threads(1)
    sys.argv = ["vtr", *words]
    app(words)


class Commands:
    """Runs `vtr` in processes that need not import anything first, since a random moment would be one of importing."""

    def __init__(self, folder: Path) -> None:
        self.said = folder / "said.txt"
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(["torch", "transformers", "vtr.cli", "vtr.pocket", "tests.test_kills"])

    def start(self, words: list[str]) -> Any:
        process = self.server.Process(target=_command, args=(words, str(self.said)))
        process.start()
        return process

    def run(self, words: list[str], out: Path | None = None) -> tuple[float, float]:
        """Seconds until files were in ``out``, and until the end of the command, which must be a good one."""
        begun = first = time.monotonic()
        process = self.start(words)
        while process.is_alive() and out is not None and not any(out.glob("*")):
            process.join(0.01)
            first = time.monotonic()
        process.join(300)
        assert process.exitcode == 0, self.said.read_text()[-3000:]
        return first - begun, time.monotonic() - begun

    def killed(self, words: list[str], seconds: float) -> bool:
        """Start the command and kill it so much later. False: it was over before."""
        process = self.start(words)
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), self.said.read_text()[-3000:]
        return bool(process.exitcode)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    made = Commands(tmp_path_factory.mktemp("said"))
    made.run(["list"])  # the first waits until all is imported
    return made


def check(
    commands: Commands, folder: Path, words: Callable[[Path, bool], list[str]], result: Callable[[Path], Any]
) -> None:
    """Compare ``result`` of a run that was left alone with those of runs that were killed at a random moment each.

    words: the command for a folder; with True, for one in which a run was killed.
    """
    draw = random.Random(SEED)
    whole = folder / "whole"
    first, took = commands.run(words(whole, False), whole)
    expected = result(whole)
    print(f"seed {SEED} (VTR_KILL_SEED); files after {first:.1f} s, all done after {took:.1f}; killed after", end="")
    for kill in range(KILLS):
        out = folder / f"killed-{kill}"
        after = draw.uniform(first if kill % 2 else 0.0, took)
        while not commands.killed(words(out, False), after):  # quicker than the whole run
            shutil.rmtree(out)
            after /= 2
        left = sorted(path.name for path in out.iterdir()) if out.exists() else []
        print(f" {after:.2f} {left};", end="", flush=True)
        commands.run(words(out, True))
        assert result(out) == expected, f"killed after {after} s with {left}; VTR_KILL_SEED={SEED}"
        assert not list(out.rglob("*.part*")), "something half-written is left"
        shutil.rmtree(out)
    print()


def test_eval(commands: Commands, tmp_path: Path) -> None:
    data = str(pocket_folder(tmp_path / "data", 8))

    def words(out: Path, again: bool) -> list[str]:
        more = ["--resume"] if again else []
        return [
            "eval", "-p", "fastv:keep=0.1", "--data", data, "--batch-size", "2", "--max-new-tokens", "2",
            "--processes", "1", "--out", str(out), *more,
        ]  # fmt: skip

    check(commands, tmp_path, words, lambda out: (rows(out), body(out)))


@pytest.mark.parametrize("kind", ["gsearch", "psigmoid"])
def test_search(kind: str, commands: Commands, tmp_path: Path) -> None:
    data = str(small_data(tmp_path, 8))

    def words(out: Path, again: bool) -> list[str]:
        how = ["--start", "4", "--tolerance", "0.02"] if kind == "gsearch" else ["--budget", "0.7", "--trials", "6"]
        return [
            "search", kind, "--out", str(out), "--data", data, "--calibration", "2", "--evaluation", "0",
            "--latency", "0", *how,
        ]  # fmt: skip

    def result(out: Path) -> Any:
        record = json.loads((out / "search.json").read_text())
        names = ("score", "trials", "ratios")
        return (
            (out / "schedule.json").read_bytes(), (out / "vtr_policy.json").read_bytes(),
            json.dumps({name: record.get(name) for name in names}),
        )  # fmt: skip

    check(commands, tmp_path, words, result)


def test_train(commands: Commands, tmp_path: Path) -> None:
    """The same bytes of weights and log."""
    lines = []
    for i, made in enumerate(vtr.pocket.samples(8)):
        made["image"].crop((0, 0, 96, 96)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": made["question"], "answer": made["answer"]}))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))

    def words(out: Path, again: bool) -> list[str]:
        return ["train", "pmod", str(data), str(out), "--steps", "6", "--batch", "2", "--save-every", "2"]

    def result(out: Path) -> Any:
        weights = [path for path in sorted(out.rglob("*.safetensors")) if path.parent.name in ("model", "policy")]
        assert len(weights) == 2
        return [path.read_bytes() for path in weights], (out / "log.jsonl").read_bytes()

    check(commands, tmp_path, words, result)
