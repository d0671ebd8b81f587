"""Makes the pocket InternVL out of the shipped pocket LLaVA-NeXT: `python -m vtr.pocket.internvl --out DIR`.

Stages (see STAGES for the schedule of the shipped weights): `copy` (tower and projector learn to give the tokens that
LLaVA-NeXT's give, 2 x 2 of them averaged), `nest` (everything, all of M3's scales of every picture, and randomly pruned
ones). Every stage writes DIR/<stage>.pt; an interrupted run continues where the last checkpoint left off. At the end
DIR/weights holds what the package ships. One process of one thread.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from vtr.policies.blind.matryoshka import pool

from .. import load
from .. import scenes as S
from ..model import see, up_to_features
from ..nest import train_nest
from ..optim import Muon, descend, ramp, set_lr
from ..release import export
from ..train import Context, command, run_stages
from .model import SHOWING, SHUFFLE, build, features, make_processor, pixels_of_scenes, tokens_of

STAGES: dict[str, dict[str, Any]] = {
    "copy": {"steps": 400, "lr": 1e-3, "scenes": 4},
    "nest": {"steps": 600, "lr": 8e-4, "pictures": 4, "tower": 0.1},
}


def off(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean squared difference, relative to how much ``theirs`` vary."""
    return (ours - theirs).square().mean() / theirs.var()


def train_copy(model: Any, ctx: Context, steps: int, lr: float, scenes: int, teacher: Any) -> None:
    """Stage `copy`: tower features and tokens like the teacher's; needs no labels."""
    modules = [*up_to_features(model), model.model.multi_modal_projector]
    params = [p for module in modules for p in module.parameters()]
    matrices = [p for p in params if p.ndim == 2]
    rest = [p for p in params if p.ndim != 2]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr, 0.02),
        torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0.0),
    ]
    first = ctx.resume("copy", model, optimizers)
    stream = S.scene_stream("train", ctx.stream_seed("copy", first))
    for step in ctx.steps("copy", first, steps):
        set_lr(optimizers, ramp(step, steps, 20, "cosine"))
        pixels = pixels_of_scenes(stream, scenes)
        with torch.no_grad():
            wanted = see(teacher, pixels)
            projected = teacher.model.multi_modal_projector(wanted[:, 1:])
            wanted_tokens = pool(projected, (S.GRID, S.GRID), SHUFFLE)
        hidden = features(model, pixels)
        in_features, in_tokens = off(hidden, wanted), off(tokens_of(model, hidden), wanted_tokens)
        descend(in_features + in_tokens, params, optimizers)
        figures = {"features": in_features.item(), "tokens": in_tokens.item()}
        ctx.track(step, sum(figures.values()), figures, every=25)
        if step % 100 == 0 or step == steps:
            ctx.save("copy", step, model, optimizers)


def work(out: Path, seed: int = 0, stages: dict[str, dict[str, Any]] = STAGES) -> None:
    """All stages that are not finished, then the export."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    teacher = load()[0]
    model, ctx = build(teacher, seed), Context(out, 0, 1, seed)
    functions = {
        "copy": functools.partial(train_copy, teacher=teacher),
        "nest": functools.partial(train_nest, showing=SHOWING),
    }
    run_stages(model, ctx, stages, functions)
    export(model, out / "weights", make_processor(), longest=4)


if __name__ == "__main__":
    command(__doc__, work)
