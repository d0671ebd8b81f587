"""``python -m vtr.eval.gpu``: run the parts in order of their worth, while there is time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vtr.eval.gpu import kernels, launches, machine, oracles, table, times
from vtr.eval.gpu.models import CELLS, SHAPES, Models
from vtr.eval.gpu.record import Record, Setup

PARTS = ("kernels", "oracles", "prefill", "decode", "launches")
NEEDS = {"kernels": 20, "oracles": 60, "llava-1.5-7b": 25, "llava-next-7b": 45}
"""Seconds that should be left for a part to start; the first of a shape also makes its model."""
FEWEST = 5.0
"""Seconds below which there is no point in starting."""

Job = Callable[[dict[str, Any]], None]
"""Fills what it is given with what it finds."""

DESCRIPTION = """Is the engine right on this GPU, and what does it cost there?

Runs from a clone that is not installed; needs torch, transformers and numpy. Parts, each only while there is time, the
file written after every one: machine (always: names, and the FLOP/s and bytes/s that it reaches), kernels (packed
attention at several head layouts), oracles (tiny models under every policy: beside the CPU, rows alone, no cache; and
every line where the host waits for the device), and for LLaVA-1.5-7B and LLaVA-NeXT-7B with random weights, 1, 8 and 8
mixed rows: prefill, decode, launches.

Exit status: 0 all is done and agrees, 1 a part failed or something does not agree, 2 out of time or bad arguments."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vtr.eval.gpu", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=450.0, help="the run should end within these (450)")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a dry run, on a CPU too")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one, else (with --small) cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a file; nothing runs")
    told = parser.parse_args(argv)
    if told.show is None:
        told.device = device_of(parser, told)
        if not told.seconds > 0:
            parser.error(f"--seconds {told.seconds:g}: choose a number above 0")
        if told.out is not None and told.out.is_dir():
            parser.error(f"--out {told.out} is a folder: name a file")
    return told


def device_of(parser: argparse.ArgumentParser, told: argparse.Namespace) -> torch.device:
    """The device to run on; ends the program where it cannot."""
    try:
        device = torch.device(told.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        parser.error(f"--device {told.device}: choose cuda, cuda:1, … or cpu")
    if device.type not in ("cuda", "cpu"):
        parser.error(f"--device {told.device}: choose cuda, cuda:1, … or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {device}: this torch sees {torch.cuda.device_count()} CUDA GPUs")
    if device.type == "cpu" and not told.small:
        parser.error("the full sizes need a GPU, and this torch sees none: take --small for a dry run")
    return device


def jobs(
    setup: Setup, record: Record, parts: Sequence[str]
) -> dict[str, tuple[Callable[[dict[str, Any]], None], float]]:
    """Name → what to run and how many seconds it needs, in order of worth."""
    models = Models(setup)
    out: dict[str, tuple[Job, float]] = {}
    if "kernels" in parts:
        out["kernels"] = partial(kernels.measure, setup, record), NEEDS["kernels"]
    if "oracles" in parts:
        out["oracles"] = partial(oracles.measure, setup, record), NEEDS["oracles"]
    for shape in SHAPES:
        for kind in (kind for kind in PARTS[2:] if kind in parts):
            for cell in CELLS:
                out[f"{kind} {shape} {cell}"] = partial(timed, record, models, kind, shape, cell), NEEDS[shape]
    return out


def timed(record: Record, models: Models, kind: str, shape: str, cell: str, found: dict[str, Any]) -> None:
    """One part of the 7B shapes."""
    if kind == "launches":
        launches.measure(record.setup, models[shape], cell, found)
        return
    ceilings = record.parts["machine"]["found"]
    run = times.prefill if kind == "prefill" else times.decode
    run(record.setup, models[shape], cell, ceilings, found)


def main(argv: Sequence[str] | None = None) -> int:
    told = arguments(argv)
    if told.show is not None:
        try:
            print("\n".join(table.lines(table.load(told.show))))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    if told.device.type == "cuda":
        torch.cuda.set_device(told.device)
    setup = Setup(told.device, told.small, told.seconds, told.seed)
    record = Record(setup, told.out)
    record.run("machine", partial(machine.measure, setup))
    for name, (run, needs) in jobs(setup, record, told.parts).items():
        record.run(name, run, FEWEST if setup.small else needs)
    print("\n".join(table.lines(record.headed())))
    return record.status()


if __name__ == "__main__":
    raise SystemExit(main())
