"""Trains the pocket InternVL on to the pocket video model: `python -m vtr.pocket.video --out DIR`.

Stages (see STAGES for the schedule of the shipped weights): `clips` of four frames, then `films` of eight. The language
model learns, with all tokens, tokens dropped at random, and every other frame left out. Every stage writes
DIR/<stage>.pt every hundred steps; an interrupted run continues there. At the end DIR/weights holds what the package
ships. One process of one thread.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from .. import MODELS, load
from ..release import export
from ..train import Context, command, run_stages
from .films import CLIP, FRAMES
from .model import build, make_processor
from .watch import train_watch

STAGES: dict[str, dict[str, Any]] = {
    "clips": {"steps": 1000, "lr": 2e-3, "frames": CLIP, "films": 6, "told": 0.5},
    "films": {"steps": 600, "lr": 1.5e-3, "frames": FRAMES, "films": 4, "told": 0.5},
}


def work(out: Path, seed: int = 0, stages: dict[str, dict[str, Any]] = STAGES) -> None:
    """All stages that are not finished, then the export."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    model, ctx = build(load("internvl")[0], seed), Context(out, 0, 1, seed)
    run_stages(model, ctx, stages, {stage: functools.partial(train_watch, stage=stage) for stage in stages})
    export(model, out / "weights", make_processor(), longest=4, base=MODELS["internvl"])


if __name__ == "__main__":
    command(__doc__, work)
