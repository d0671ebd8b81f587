"""Stage `nest`: the M3 objective, so that one set of weights is right at every nested scale and under pruning."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vtr.image import scales
from vtr.policies.blind.matryoshka import pool as pool
from vtr.training.m3 import backward_nested

from . import scenes as S
from .language import Batch, answer_loss, choose_view, embed_pictures, make_batch, project, shorten, students, validate
from .model import pack
from .optim import ramp
from .stage import Figures, run_stage

SCALES = scales((S.GRID, S.GRID))  # tokens per tile → side of a pooled cell
NESTED = 0.6  # part of the steps with all scales; the others drop tokens at random, as in stage `mix`


def at_scale(model: Any, tiles: torch.Tensor, batch: Batch, tokens: int) -> torch.Tensor:
    """The pictures as Matryoshka(tokens) gives them to the language model: (pictures, tokens and newlines, width)."""
    small = pool(tiles.flatten(0, 1), (S.GRID, S.GRID), SCALES[tokens])
    return pack(model, small.unflatten(0, tiles.shape[:2]), batch.rows, batch.cols)


def pruned(
    model: Any, batch: Batch, train_tower: bool, view: tuple[str, float, float], rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The pictures with random tokens dropped, as :func:`vtr.pocket.language.shorten` gives them."""
    return shorten(embed_pictures(model, batch, train_tower), batch, view, rng)


@dataclass(frozen=True)
class Showing:
    """How a family's pictures reach its language model; the loops are the same for all families.

    Attributes:
        scales: tokens per tile → side of a pooled cell. project, at_scale, pruned: as those of LLaVA-NeXT above.
    """

    scales: Mapping[int, int]
    project: Callable[[Any, torch.Tensor], torch.Tensor]
    at_scale: Callable[[Any, torch.Tensor, Batch, int], torch.Tensor]
    pruned: Callable[..., tuple[torch.Tensor, torch.Tensor, int]]

    def whole(self, model: Any, batch: Batch) -> torch.Tensor:
        """All vision tokens of a batch."""
        return self.at_scale(model, self.project(model, batch.pixels), batch, max(self.scales))


LLAVA_NEXT = Showing(SCALES, project, at_scale, pruned)


def scale_loss(
    model: Any, tiles: torch.Tensor, batch: Batch, tokens: int, showing: Showing = LLAVA_NEXT
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The answers' cross-entropy at one scale, which answers were right, and their types."""
    vision = showing.at_scale(model, tiles, batch, tokens)
    where = torch.arange(1, vision.shape[1] + 1).expand(len(vision), -1)
    return answer_loss(model, vision, where, vision.shape[1] + 1, batch)


def train_nest(
    model: Any, ctx: Any, steps: int, lr: float, pictures: int, tower: float, showing: Showing = LLAVA_NEXT
) -> None:
    """Runs the stage. lr: of language model and projector; tower: the vision tower's, relative to it."""

    def gradients(step: int, rng: random.Random) -> Figures:
        shared = random.Random(f"nest-{ctx.seed}-{step}")  # the same for all workers
        batch = make_batch(rng, "train", pictures)
        if shared.random() < NESTED:
            return _nested_step(model, batch, showing)
        tokens, where, start = showing.pruned(model, batch, tower > 0, choose_view("prune", shared), rng)
        loss, right, _ = answer_loss(model, tokens, where, start, batch)
        loss.backward()
        return {"loss": loss.item(), "pruned": right.float().mean().item()}

    def tell() -> None:
        known = validate(model, 16, showing.whole)
        ctx.say("val " + " ".join(f"{k}:{v:.2f}" for k, v in known.items()))
        known = validate_scales(model, 16, showing)
        ctx.say("val by scale " + " ".join(f"{k}:{v:.3f}" for k, v in known.items()))

    run_stage(
        "nest", ctx, model, steps, students(model, lr, tower), gradients,
        rate=lambda step: ramp(step, steps, 30, "linear"), save_every=100, tell=tell,
    )  # fmt: skip


def _nested_step(model: Any, batch: Batch, showing: Showing) -> Figures:
    """Gradients of the mean of the scales' cross-entropies; tower and projector run once."""
    figures: Figures = {}

    def loss_at(tiles: torch.Tensor, tokens: int) -> torch.Tensor:
        loss, right, _ = scale_loss(model, tiles, batch, tokens, showing)
        figures[f"at{tokens}"] = right.float().mean().item()
        return loss

    losses = backward_nested(showing.project(model, batch.pixels), list(showing.scales), loss_at)
    return figures | {"loss": sum(losses.values()) / len(losses)}


@torch.no_grad()
def validate_scales(model: Any, pictures: int, showing: Showing = LLAVA_NEXT) -> dict[str, float]:
    """Accuracy at every scale on validation scenes."""
    rng, hits = random.Random("val-scales"), {tokens: 0.0 for tokens in showing.scales}
    rounds = pictures // 4
    for _ in range(rounds):
        batch = make_batch(rng, "val", 4)
        tiles = showing.project(model, batch.pixels)
        for tokens in showing.scales:
            right = scale_loss(model, tiles, batch, tokens, showing)[1]
            hits[tokens] += right.float().mean().item() / rounds
    return {str(tokens): value for tokens, value in hits.items()}
