"""Stage `tower`: the vision tower learns to say, patch by patch, what the patch belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import scenes as S
from .model import DenseHead, pixels_of, see, summary, tower_of
from .optim import Muon, descend, ramp, set_lr

CLASSES = [1 + len(words) for words in S.CHANNEL_WORDS] + [2, 2]  # ... + center, + "is this tile a thumbnail"
PRESENT = len(S.SHAPES) * len(S.COLOR_NAMES) + len(S.DIGITS) + len(S.LETTERS) + len(S.WORDS)
WEIGHTS = [1, 1, 1, 1.3, 1.3, 1.3, 1, 0.5, 0.25]


def tile_batch(stream: Any, scenes_wanted: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thumbnails and three crops each: pixels (T, 3, 96, 96), labels (T, 9, 144), contents (T, PRESENT)."""
    tiles, labels, contents = [], [], []
    for _ in range(scenes_wanted):
        scene, rng = next(stream)
        pictures = S.tiles_of(scene.image)
        coarse, fine = S.dense_labels(scene, False), S.dense_labels(scene, True)
        rows, cols = fine.shape[1] // S.GRID, fine.shape[2] // S.GRID
        picks = rng.sample(range(rows * cols), min(3, rows * cols))
        tiles.append(pictures[[0] + [1 + i for i in picks]])
        for pick in [-1, *picks]:
            y, x = divmod(pick, cols)
            part = coarse if pick < 0 else fine[:, y * S.GRID : (y + 1) * S.GRID, x * S.GRID : (x + 1) * S.GRID]
            flag = np.full((1, S.GRID, S.GRID), int(pick < 0), np.int64)
            labels.append(np.concatenate([part, flag]).reshape(len(CLASSES), -1))
            contents.append(_contents(part))
    return (
        pixels_of(torch.from_numpy(np.concatenate(tiles))),
        torch.from_numpy(np.stack(labels)),
        torch.from_numpy(np.stack(contents)),
    )


def _contents(labels: np.ndarray) -> np.ndarray:
    """Which shape-colour pairs, digits, letters and words a tile shows."""
    out = np.zeros(PRESENT, np.float32)
    shape, color = labels[S.SHAPE], labels[S.COLOR]
    hit = (shape > 0) & (color > 0)
    out[(shape[hit] - 1) * len(S.COLOR_NAMES) + color[hit] - 1] = 1
    start = len(S.SHAPES) * len(S.COLOR_NAMES)
    for channel in (S.DIGIT, S.LETTER, S.WORD):
        values = labels[channel]
        out[start + values[values > 0] - 1] = 1
        start += len(S.CHANNEL_WORDS[channel])
    return out


def tower_losses(model: Any, head: DenseHead, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and the accuracy of every channel on the patches that have a label of it."""
    pixels, labels, contents = batch
    hidden = see(model, pixels)
    logits, tile = head(hidden, summary(model, hidden))
    total, seen = hidden.new_zeros(()), {}
    for i, z in enumerate(logits):
        y = labels[:, i]
        each = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none", ignore_index=-1).view_as(y)
        have, none = y > 0, y == 0
        parts = [each[m].mean() for m in (have, none) if m.any()]
        total = total + WEIGHTS[i] * torch.stack(parts).mean()
        if i < len(S.CHANNEL_NAMES) and have.any():
            seen[S.CHANNEL_NAMES[i]] = (z.argmax(-1) == y)[have].float().mean().item()
    tile_loss = F.binary_cross_entropy_with_logits(tile, contents, pos_weight=torch.tensor(5.0))
    return total + 3 * tile_loss, seen


def tower_params(model: Any, lr: float) -> tuple[list[Any], list[torch.optim.Optimizer]]:
    """Muon for the matrices of the tower's layers, AdamW for everything else of it."""
    named = list(tower_of(model).named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and ".layers." in f".{n}"]
    rest = [p for n, p in named if not (p.ndim == 2 and ".layers." in f".{n}")]
    return matrices + rest, [Muon(matrices, lr, 0.05), torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0.02)]


def train_tower(model: Any, ctx: Any, steps: int, lr: float = 4e-3, scenes_per_step: int = 4) -> None:
    """Runs the stage; `ctx` (see train.py) gives rank, logging and resumable checkpoints."""
    torch.manual_seed(ctx.seed)
    head = DenseHead(CLASSES, PRESENT)
    params, optimizers = tower_params(model, lr)
    optimizers.append(torch.optim.AdamW(head.parameters(), lr, (0.9, 0.98), weight_decay=0.02))
    params += list(head.parameters())
    first = ctx.resume("tower", model, optimizers, head)
    stream = S.scene_stream("train", ctx.stream_seed("tower", first))
    for step in ctx.steps("tower", first, steps):
        set_lr(optimizers, ramp(step, steps, 60, "cosine"))
        loss, seen = tower_losses(model, head, tile_batch(stream, scenes_per_step))
        descend(loss, params, optimizers)
        ctx.track(step, loss.item(), seen)
        if step % 500 == 0 or step == steps:
            ctx.save("tower", step, model, optimizers, head)
            _check(model, head, ctx)


@torch.no_grad()
def _check(model: Any, head: DenseHead, ctx: Any) -> None:
    """Per-patch accuracy on validation scenes (validation digits)."""
    if ctx.rank:
        return
    stream = S.scene_stream("val", 1)
    rows = [tower_losses(model, head, tile_batch(stream, 8))[1] for _ in range(4)]
    ctx.say("val " + " ".join(f"{k}:{np.mean([r[k] for r in rows]):.3f}" for k in rows[0]))
