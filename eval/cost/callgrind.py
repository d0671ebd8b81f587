"""Instructions of prefills, counted by valgrind where the machine does not: slow, and the same on a busy machine.

A child process runs under callgrind, which counts nothing until the child has warmed up and asks for it. The model is
narrow, for the sake of valgrind. What the engine itself executes weighs more there than in larger models: compare these
ratios with those of other commits.
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
from typing import Any

import torch
from vtr.eval.cost import work
from vtr.eval.cost.engine import facts
from vtr.eval.cost.midsize import Size

PLAIN = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
"""valgrind knows no wider vectors."""
NARROW = Size(8, 128, 352, 2, side=12, text_tokens=16)


def available() -> bool:
    """Whether valgrind and its control program are installed."""
    return shutil.which("valgrind") is not None and shutil.which("callgrind_control") is not None


def measure(size: Size, seed: int = 0) -> dict[str, Any]:
    """Like :func:`vtr.eval.cost.work.measure`, of one turn.

    Raises:
        RuntimeError: valgrind is not installed, or counting failed.
    """
    out = facts(size, "cpu", torch.float32, 1, seed) | {"counted": "instructions", "threads": 1}
    for name, (over, under) in instructions(size, seed).items():
        out |= work.flat(f"counted_{name}", work.summary([over], [under]))
    return out


def instructions(size: Size, seed: int) -> dict[str, tuple[int, int]]:
    """Of both sides of every comparison of :func:`vtr.eval.cost.work.sides`, by name.

    Raises:
        RuntimeError: valgrind is not installed, or counting failed.
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
        runs: list[tuple[str, int]] = json.loads(child.stdout.splitlines()[-1])
        counts = [counted(Path(folder) / f"out.{i + 1}") for i in range(len(runs))]
    switching = counts[0] / runs[0][1]
    own = [count - round(switching * times) for count, (_, times) in zip(counts, runs, strict=True)][1:]
    if min(own) <= 0:
        raise RuntimeError(f"valgrind counted {counts} instructions, the first of them for nothing at all")
    return {name: (own[i], own[i + 1]) for i, (name, _) in enumerate(runs[1:]) if i % 2 == 0}


def counted(dump: Path) -> int:
    """The instructions of one dump."""
    found = re.search(r"^totals: (\d+)", dump.read_text(errors="replace"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{dump.name} of callgrind has no totals")
    return int(found[1])


def control(*told: str) -> None:
    """Tell the callgrind that this process runs under."""
    subprocess.run(["callgrind_control", *told, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


class Switch:
    """Stands in for a counter: its first reading has valgrind count, the second one has it stop, and so on.

    Attributes:
        armed: False while warming up. times: how often it was switched on.
    """

    def __init__(self) -> None:
        self.armed, self.on, self.times = False, False, 0

    def read(self) -> float:
        if self.armed:
            self.on = not self.on
            self.times += self.on
            control("-i", "on" if self.on else "off")
        return 0.0

    def dump(self, run: Callable[[], object]) -> int:
        """Write the instructions of one ``run()`` to the next file. Returns how often it was switched on."""
        self.armed, self.times = True, 0
        run()
        self.armed = False
        control("--dump")
        return self.times


@torch.no_grad()
def child(told: str) -> None:
    """Under callgrind: count nothing, then both sides of every comparison, each after one that warms up."""
    given = json.loads(told)
    size = Size(**{**given["size"], "decode_tokens": tuple(given["size"]["decode_tokens"])})
    torch.set_num_threads(1)
    switch = Switch()
    sides = work.sides(work.Counter("instructions", switch.read), work.bench_of(size, 1, given["seed"]))
    runs = [("nothing", switch.dump(lambda: (switch.read(), switch.read())))]
    for name, pair in sides.items():
        for run in pair:
            run()
            runs.append((name, switch.dump(run)))
    print(json.dumps(runs))


if __name__ == "__main__":
    child(sys.argv[1])
