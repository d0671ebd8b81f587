"""Training with M3's objective: the mean of the cross-entropies at all nested scales (arXiv 2405.17430).

:func:`train` is the recipe for any model vtr can patch; :func:`backward_batch` is its step, for loops of one's own;
:func:`backward_nested` is the objective alone, which the embedded model's training uses as well.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vtr.base import UnsupportedError
from vtr.engine.install import patch_of
from vtr.policies.blind.matryoshka import Matryoshka
from vtr.training.data import Collate, as_sample
from vtr.training.loop import warmed_cosine

STATE, CHECKPOINT = "training.pt", "checkpoint"


def backward_nested(
    features: torch.Tensor, scales: Sequence[int], loss_at: Callable[[torch.Tensor, int], torch.Tensor]
) -> dict[int, float]:
    """Gradients of the mean over ``scales`` of ``loss_at(features, scale)``; returns every scale's loss.

    Vision tower and projector run once for all scales, forward and backward: each scale's loss runs backward to
    ``features`` as soon as it is made (so that one scale's graph is held at a time), and what made the features runs
    backward once, with the sum. The official code runs them once per scale; the gradients are the same.

    Args:
        features: float [...], what all scales share, e.g. projected tiles; with a graph behind it if that is to learn.
        loss_at: the scalar loss of a batch whose pictures have so many tokens per tile.

    Raises:
        ValueError: no scale, or the same one twice.
    """
    if not scales or len(set(scales)) < len(scales):
        raise ValueError(f"scales={list(scales)}: name each scale once, and at least one")
    leaf = features.detach().requires_grad_(features.requires_grad)
    losses = {}
    for scale in scales:
        loss = loss_at(leaf, scale)
        (loss / len(scales)).backward()
        losses[scale] = loss.item()
    if features.requires_grad:
        features.backward(leaf.grad)
    return losses


@contextmanager
def _giving(module: Any, output: Any) -> Iterator[None]:
    """Within the block the module gives ``output``, whatever it is asked."""
    before = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _encoded(model: Any, inputs: Mapping[str, Any], learn: bool) -> tuple[Any, torch.Tensor]:
    """What the tower gave for a batch's images, and the projector: [tiles, patches, hidden_size], with its graph.

    Raises:
        UnsupportedError: the projector did not run exactly once.
    """
    vision = patch_of(model).vision
    towers: list[Any] = []
    projected: list[torch.Tensor] = []
    handles = [
        vision.tower.register_forward_hook(lambda module, args, out: towers.append(out)),
        vision.projector.register_forward_hook(lambda module, args, out: projected.append(out)),
    ]
    given = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    try:
        with torch.set_grad_enabled(learn):
            model.get_image_features(**given)
    finally:
        for handle in handles:
            handle.remove()
    if len(towers) != 1 or len(projected) != 1:
        raise UnsupportedError(
            f"the projector of {type(model).__name__} ran {len(projected)} times for one batch: train on images alone"
        )
    return towers[0], projected[0]


def backward_batch(
    model: Any, inputs: Mapping[str, Any], labels: torch.Tensor, scales: Sequence[int]
) -> dict[int, float]:
    """Gradients of M3's objective for a batch; returns every scale's cross-entropy.

    Args:
        model: patched. inputs: ``input_ids``, ``attention_mask``, ``pixel_values`` …, as the processor gives them.
        labels: int64 [rows, L], as transformers takes them (-100: not learned). scales: tokens per tile.

    Raises:
        ValueError: no pixel_values, no scale, one twice, or one the grid does not have.
    """
    if "pixel_values" not in inputs:
        raise ValueError("a batch without pictures has no scales: call model(**inputs, labels=labels) for it")
    vision = patch_of(model).vision
    learns = any(p.requires_grad for module in (vision.tower, vision.projector) for p in module.parameters())
    seen, features = _encoded(model, inputs, learns)

    def loss_at(tiles: torch.Tensor, scale: int) -> torch.Tensor:
        with _giving(vision.tower, seen), _giving(vision.projector, tiles):
            return model(**inputs, labels=labels, policy=Matryoshka(scale), use_cache=False).loss

    return backward_nested(features, scales, loss_at)


# -- the recipe --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    """What is trained, and how: the defaults are the paper's for LLaVA-1.5, but for the batch size (128 there).

    Attributes:
        scales: tokens per tile; all in every step.
        epochs: passes over the data. batch_size: samples a step. lr: peak, of language model and projector.
        tower_lr: peak, of the vision tower; None freezes it. (The paper trains it; the published code does not, since
            its tower runs without gradients.)
        warmup: share of the steps with a rising rate, cosine after it. weight_decay, max_norm: as in AdamW and
            clipping. seed: of the order of the data. save_every: steps between checkpoints.
    """

    scales: tuple[int, ...] = (1, 9, 36, 144, 576)
    epochs: int = 1
    batch_size: int = 8
    lr: float = 2e-5
    tower_lr: float | None = 2e-5
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_norm: float = 1.0
    seed: int = 0
    save_every: int = 200

    def rate(self, step: int, steps: int) -> float:
        """Factor of the peak rates at a step (from 0)."""
        return warmed_cosine(step, steps, max(round(self.warmup * steps), 1))


def optimizer_of(model: Any, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over language model and projector, and the vision tower at its own rate; a frozen tower is frozen here."""
    tower = patch_of(model).vision.tower
    own = {id(p) for p in tower.parameters()}
    tower.requires_grad_(recipe.tower_lr is not None)
    groups = [{"params": [p for p in model.parameters() if id(p) not in own], "peak": recipe.lr}]
    if recipe.tower_lr is not None:
        groups.append({"params": list(tower.parameters()), "peak": recipe.tower_lr})
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


def train(
    model: Any, processor: Any, data: Sequence[tuple[Any, str, str]], out: Path, recipe: Recipe | None = None,
    *, resume: bool = False,
) -> list[dict[int, float]]:  # fmt: skip
    """Train a patched model on (picture, question, answer) samples; writes model and processor to ``out``.

    A checkpoint is written every ``save_every`` steps (the old one stays until the new one is whole); ``resume=True``
    goes on with it and gives the same weights as a run that was not interrupted. One process, the model's device.

    Returns:
        The cross-entropy of every scale, of every step of this run.

    Raises:
        ValueError: no data, a checkpoint of another recipe or data set; FileExistsError: a checkpoint, but no resume.
    """
    recipe = recipe or Recipe()
    per_epoch = math.ceil(len(data) / recipe.batch_size)
    steps = per_epoch * recipe.epochs
    if not steps:
        raise ValueError("no data to train on: give (picture, question, answer) samples")
    told = {**asdict(recipe), "scales": list(recipe.scales), "samples": len(data)}
    optimizer = optimizer_of(model, recipe)
    first = _resumed(model, optimizer, out, told, resume)
    log, was_training, collate = [], model.training, Collate(processor)
    model.train()
    with tqdm(total=steps, initial=first, desc="training at all scales", unit="step") as bar:
        for step in range(first, steps):
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(recipe.seed + step // per_epoch))
            at = step % per_epoch * recipe.batch_size
            batch = collate([as_sample(*data[i]) for i in order[at : at + recipe.batch_size].tolist()])
            on = {name: value.to(model.device) for name, value in batch.items()}
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * recipe.rate(step, steps)
            optimizer.zero_grad()
            log.append(backward_batch(model, on, on.pop("labels"), recipe.scales))
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm)
            optimizer.step()
            bar.set_postfix({str(scale): f"{loss:.3f}" for scale, loss in log[-1].items()})
            bar.update()
            if (step + 1) % recipe.save_every == 0 and step + 1 < steps:
                _save(model, optimizer, out, told, step + 1)
    model.train(was_training)
    model.config.matryoshka_vis_token_scale = list(recipe.scales)  # where the published checkpoints say it
    model.save_pretrained(out)
    processor.save_pretrained(out)
    shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
    return log


def _save(model: Any, optimizer: Any, out: Path, told: Mapping[str, Any], step: int) -> None:
    """Write a checkpoint beside the one there, then put it in its place."""
    new, old = out / f"{CHECKPOINT}.new", out / CHECKPOINT
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    torch.save({"optimizer": optimizer.state_dict(), "step": step, "told": json.dumps(told)}, new / STATE)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(new, old)


def _resumed(model: Any, optimizer: Any, out: Path, told: Mapping[str, Any], resume: bool) -> int:
    """The step to go on with; 0 without a checkpoint."""
    folder = next((f for f in (out / CHECKPOINT, out / f"{CHECKPOINT}.new") if (f / STATE).is_file()), None)
    if folder is None:
        return 0
    if not resume:
        raise FileExistsError(
            f"{folder} holds an interrupted training: resume=True goes on with it, or give another out"
        )
    try:
        state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
        step, before = int(state["step"]), json.loads(state["told"])
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, EOFError, OSError) as error:
        raise ValueError(f"{folder / STATE} is no checkpoint, or is cut off ({error}): give another out") from error
    if before != told:
        raise ValueError(f"{folder} was made with {state['told']}, not {json.dumps(told)}: give another out")
    saved = type(model).from_pretrained(folder, dtype=model.dtype, local_files_only=True)
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(state["optimizer"])
    return step
