"""Instructions of prefills, counted by valgrind where the machine does not: slow, and the same on a busy machine.

A child process runs under callgrind, which counts nothing until the child has warmed up and asks for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from vtr.eval.cost import work
from vtr.eval.cost.midsize import Size

PLAIN = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
"""valgrind knows no wider vectors."""


def available() -> bool:
    """Whether valgrind and its control program are installed."""
    return shutil.which("valgrind") is not None and shutil.which("callgrind_control") is not None


def measure(size: Size, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Instructions of both sides of every comparison of :func:`vtr.eval.cost.work.sides`, by name.

    Raises:
        RuntimeError: valgrind is not installed, or the child failed.
    """
    if not available():
        raise RuntimeError("valgrind is not installed here: take --count cpu")
    with tempfile.TemporaryDirectory() as folder:
        told = json.dumps({"size": asdict(size), "seed": seed})
        child = subprocess.run(
            [
                "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out",
                sys.executable, "-m", "vtr.eval.cost.callgrind", told,
            ],
            env={**os.environ, **PLAIN}, capture_output=True, text=True,
        )  # fmt: skip
        if child.returncode:
            raise RuntimeError(f"counting under valgrind failed: {child.stderr[-1500:]}")
        names: list[str] = json.loads(child.stdout.splitlines()[-1])
        counts = [counted(Path(folder) / f"out.{i + 1}") for i in range(2 * len(names) + 1)]
    nothing, own = counts[0], [n - counts[0] for n in counts[1:]]
    if not all(n > nothing for n in own):
        raise RuntimeError(f"valgrind counted {own} instructions, {nothing} for nothing at all")
    return {name: (own[2 * i], own[2 * i + 1]) for i, name in enumerate(names)}


def counted(dump: Path) -> int:
    """The instructions of one dump."""
    found = re.search(r"^(?:totals|summary): (\d+)", dump.read_text(errors="replace"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{dump.name} of callgrind has no totals")
    return int(found[1])


def control(*told: str) -> None:
    """Tell the callgrind that this process runs under."""
    subprocess.run(["callgrind_control", *told, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def count(run: Callable[[], object]) -> None:
    """Dump the instructions of one ``run()``."""
    control("-i", "on")
    run()
    control("-i", "off")
    control("--dump")


@torch.no_grad()
def child(told: str) -> None:
    """Under callgrind: count nothing, then both sides of every comparison, each after one that warms up."""
    given = json.loads(told)
    size = Size(**{**given["size"], "decode_tokens": tuple(given["size"]["decode_tokens"])})
    torch.set_num_threads(1)
    sides = work.sides(work.counter("cpu"), work.bench_of(size, 1, given["seed"]))
    count(lambda: None)
    for pair in sides.values():
        for run in pair:
            run()
            count(run)
    print(json.dumps(list(sides)))


if __name__ == "__main__":
    child(sys.argv[1])
