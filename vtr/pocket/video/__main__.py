"""Trains the pocket InternVL on to the pocket video model: `python -m vtr.pocket.video --out DIR`.

One stage, `watch` (see STAGES for the schedule of the shipped weights): the language model learns on films, with all
tokens, tokens dropped at random, and fewer frames. DIR/watch.pt is written every hundred steps; an interrupted run
continues there. At the end DIR/weights holds what the package ships. One process of one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .. import load
from ..release import export
from ..train import Context, run_stages
from .model import build, make_processor
from .watch import train_watch

STAGES: dict[str, dict[str, Any]] = {"watch": {"steps": 3000, "lr": 2e-3, "films": 4, "told": 0.5}}


def work(out: Path, seed: int = 0, stages: dict[str, dict[str, Any]] = STAGES) -> None:
    """All stages that are not finished, then the export."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    model, ctx = build(load("internvl")[0], seed), Context(out, 0, 1, seed)
    run_stages(model, ctx, stages, {"watch": train_watch})
    export(model, out / "weights", make_processor(), longest=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STAGES["watch"]["steps"], help="of stage watch")
    args = parser.parse_args()
    work(args.out.resolve(), args.seed, {"watch": STAGES["watch"] | {"steps": args.steps}})


if __name__ == "__main__":
    main()
