"""The loop that the stages from `read` on share: learning rates, seeds, gradients, log and checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .optim import apply_gradients, set_lr

Figures = dict[str, float]
"""What a step came to, by name; "loss" among them."""


def run_stage(
    stage: str,
    ctx: Any,
    model: Any,
    steps: int,
    students: tuple[list[Any], list[torch.optim.Optimizer]],
    gradients: Callable[[int, random.Random], Figures],
    *,
    rate: Callable[[int], float],
    save_every: int,
    every: int = 25,
    extra: nn.Module | None = None,
    tell: Callable[[], None] | None = None,
) -> None:
    """Train to the end of a stage, from its last checkpoint if there is one.

    Args:
        ctx: a :class:`vtr.pocket.train.Context`. students: the parameters that learn, and their optimizers.
        gradients: leaves a step's gradients. It gets the step's number (from 1) and this worker's stream of scenes.
        rate: factor of the learning rates at a step. every: steps between lines of the log.
        extra: what is in the checkpoint beside the model. tell: is called after each checkpoint, on the first worker.
    """
    params, optimizers = students
    first = ctx.resume(stage, model, optimizers, extra)
    rng = random.Random("train-" + ctx.stream_seed(stage, first))
    for step in ctx.steps(stage, first, steps):
        set_lr(optimizers, rate(step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        figures = gradients(step, rng)
        apply_gradients(params, optimizers)
        ctx.track(step, figures.pop("loss"), figures, every=every)
        if step % save_every == 0 or step == steps:
            ctx.save(stage, step, model, optimizers, extra)
            if tell is not None and ctx.rank == 0:
                tell()


def of_view(view: str, figures: Figures) -> Figures:
    """The figures of a step under their view's name, the loss under its own."""
    return {name if name == "loss" else f"{view}-{name}": value for name, value in figures.items()}
