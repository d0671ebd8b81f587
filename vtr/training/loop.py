"""A plain training loop on accelerate for policies with weights: one process, or many by ``accelerate launch``."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from vtr.engine.adapters import find_adapter
from vtr.training import state
from vtr.training.dynamic_llava import DynamicLLaVATraining, temperature

PRECISIONS = ("no", "bf16", "fp16")


@dataclass
class Settings:
    """How long and how fast to learn.

    Attributes:
        steps: optimiser steps. accumulate: batches per step.
        lr: of the model; 0 leaves it as it is. policy_lr: of the policy's weights (None: as the model's).
        weight_decay, warmup: AdamW's, and the share of the steps in which rates rise; then they fall as a cosine.
        clip: the gradient's norm at most. mixed_precision: "no", "bf16" or "fp16". seed: of the noise in the objective
            and of a DataLoader's order.
        save_every: steps between checkpoints (0: only at the end). temperatures: of Dynamic-LLaVA, first and last.
    """

    steps: int
    lr: float = 2e-5
    policy_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.03
    accumulate: int = 1
    clip: float = 1.0
    mixed_precision: str = "no"
    seed: int = 0
    save_every: int = 0
    temperatures: tuple[float, float] = (1.0, 0.1)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1:
            raise ValueError(f"steps={self.steps}, accumulate={self.accumulate}: both are at least 1")
        for name, rate in (("lr", self.lr), ("policy_lr", self.policy_lr)):
            if rate is not None and not 0 <= rate < math.inf:
                raise ValueError(f"{name}={rate}: a learning rate is 0 or more, e.g. 2e-5")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision={self.mixed_precision!r}: choose one of {', '.join(PRECISIONS)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}: the share of the steps in which rates rise, in [0, 1)")


def freeze_tower(model: Any) -> None:
    """Vision towers stay as they are in both papers; projector and language model learn."""
    find_adapter(model).tower(model).requires_grad_(False)


def run(
    objective: nn.Module, batches: Sequence[dict[str, Any]] | DataLoader[Any], out: str | Path, settings: Settings,
    also: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train ``objective`` (a :class:`PModTraining` or :class:`DynamicLLaVATraining`) on ``batches``, again and again.

    Writes ``out/log.jsonl`` (a line a step: loss, realised keep shares, rates), ``out/state``, and at the end
    ``out/policy`` and ``out/model``. A run that was interrupted or killed goes on from its last state by itself, and
    ends, on the same machine, with the same bytes as if it had not been: weights, optimiser, random numbers, order of
    the samples and log. (Not repeated: what a DataLoader's worker processes draw at random.)

    Args:
        batches: padded batches with labels, for all processes together (they are dealt out): a list, or a DataLoader
            of samples with its own ``batch_size`` and ``collate_fn``; if it shuffles, ``settings.seed`` and the epoch
            say how, whatever its generator. What does not learn must have ``requires_grad``
            False (:func:`freeze_tower`; LoRA: put peft's adapters into the language model before).
        also: what else the run depends on, by name, as JSON data: it only goes on where that is the same.

    Returns:
        The lines of the log that this call wrote.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: no batches, nothing that learns, or a state of a run with other settings, policy, batches or
            frozen weights (what differs is named; ``save_every`` may).
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import set_seed
    except ImportError as error:
        raise ImportError("training runs on accelerate: pip install 'accelerate>=1'") from error
    folder = Path(out)
    _check(batches)
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True)  # a rank's batch may have no image
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, kwargs_handlers=[parallel])
    optimizer = torch.optim.AdamW(_groups(objective, settings), weight_decay=settings.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings))
    said = state.identity(objective, batches, settings, accelerator.num_processes, also or {})
    first, last_state = state.resume(folder, said)
    ready, optimizer = accelerator.prepare(objective, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    if last_state is None:
        set_seed((settings.seed * 1009 + accelerator.process_index) % 2**32)
    else:
        accelerator.load_state(str(last_state))
    if accelerator.is_main_process:
        state.cut_log(folder / "log.jsonl", first)
    stream, log = _endless(accelerator, batches, first * settings.accumulate, settings.seed), []
    learnt = [p for group in optimizer.param_groups for p in group["params"]]
    show = tqdm(range(first, settings.steps), initial=first, total=settings.steps, desc="training",
                disable=not accelerator.is_main_process)  # fmt: skip
    for step in show:
        if isinstance(objective, DynamicLLaVATraining):
            objective.tau = temperature(step / settings.steps, *settings.temperatures)
        figures = _step(accelerator, ready, stream, settings.accumulate)
        accelerator.clip_grad_norm_(learnt, settings.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        line = {"step": step + 1, **figures, "lr": scheduler.get_last_lr()}
        log.append(line)
        show.set_postfix(loss=f"{figures['loss']:.3f}")
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if step + 1 == settings.steps or (settings.save_every and (step + 1) % settings.save_every == 0):
            main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
            state.save(folder, step + 1, said, lambda at: accelerator.save_state(str(at)), main, wait)
    if accelerator.is_main_process:
        _export(objective, folder)
    accelerator.wait_for_everyone()
    return log


def _check(batches: Any) -> None:
    """Raise ValueError for batches that cannot be dealt out and gone on with."""
    if isinstance(batches, DataLoader):
        if isinstance(batches.dataset, IterableDataset):
            raise ValueError(
                "an iterable dataset cannot be gone on with: give the DataLoader one with indices, or a list"
            )
        if batches.batch_sampler is None:
            raise ValueError(
                "processes cannot share a DataLoader without batch_size: give it one, or pass a list of batches"
            )
    if not len(batches):
        raise ValueError("there are no batches to train on: give at least one")


def rate(step: int, settings: Settings) -> float:
    """Factor of the learning rates at a step (from 0)."""
    return warmed_cosine(step, settings.steps, math.ceil(settings.warmup * settings.steps))


def warmed_cosine(step: int, steps: int, rise: int) -> float:
    """A factor in [0, 1] of a step (from 0): a linear rise over ``rise`` steps, then half a cosine."""
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def _groups(objective: Any, settings: Settings) -> list[dict[str, Any]]:
    """Parameters and rates: the policy's weights, and what learns of the model."""
    own = {id(p) for p in objective.weights.parameters()}
    if settings.lr == 0:
        objective.model.requires_grad_(False)
    model = [p for p in objective.model.parameters() if p.requires_grad and id(p) not in own]
    policy = [p for p in objective.weights.parameters() if p.requires_grad]
    policy_lr = settings.lr if settings.policy_lr is None else settings.policy_lr
    groups = [{"params": model, "lr": settings.lr}, {"params": policy, "lr": policy_lr}]
    if not any(group["params"] and group["lr"] for group in groups):
        raise ValueError("nothing learns: give lr or policy_lr, and let some parameters require gradients")
    return [group for group in groups if group["params"]]


def _endless(accelerator: Any, batches: Any, skip: int, seed: int) -> Iterator[dict[str, Any]]:
    """This process's batches of all epochs, from its ``skip``-th on: dealt out one by one, also across epochs."""
    from accelerate.utils import send_to_device

    count, share = len(batches), accelerator.num_processes
    at = skip * share + accelerator.process_index
    while True:
        epoch, first = divmod(at, count)
        mine = range(first, count, share)
        one_epoch = (
            _loaded(batches, epoch, mine, seed) if isinstance(batches, DataLoader) else (batches[i] for i in mine)
        )
        for batch in one_epoch:
            yield send_to_device(batch, accelerator.device)
        at += share * len(mine)


def _loaded(loader: DataLoader[Any], epoch: int, mine: range, seed: int) -> Iterable[Any]:
    """The batches ``mine`` of an epoch, whose order is a function of the seed and the epoch alone."""
    start = random.Random(f"{seed} {epoch}").getrandbits(63)
    samplers: list[Any] = [loader.sampler, loader.batch_sampler]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(start)
        for sampler in samplers:
            if isinstance(own := getattr(sampler, "generator", None), torch.Generator):
                own.manual_seed(start)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        order = list(loader.batch_sampler)  # type: ignore[arg-type]
    return DataLoader(
        loader.dataset, batch_sampler=[order[i] for i in mine], collate_fn=loader.collate_fn,
        num_workers=loader.num_workers, pin_memory=loader.pin_memory, timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn, multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor, generator=torch.Generator().manual_seed(start),
    )  # fmt: skip


def _step(accelerator: Any, ready: Any, stream: Any, count: int) -> dict[str, float]:
    """Gradients of ``count`` batches' mean loss; returns the mean of every figure that is a number."""
    seen: list[dict[str, torch.Tensor]] = []
    for i in range(count):
        batch = next(stream)
        if i + 1 < count:
            with accelerator.no_sync(ready):
                out = ready(**batch)
                accelerator.backward(out["loss"] / count)
        else:
            out = ready(**batch)
            accelerator.backward(out["loss"] / count)
        seen.append({name: value.detach().float() for name, value in out.items()})
    means = {name: accelerator.gather(torch.stack([one[name] for one in seen])).nanmean() for name in seen[0]}
    return {name: round(value.item(), 6) for name, value in means.items()}


def _export(objective: Any, folder: Path) -> None:
    """The policy with the fingerprint of the model as it is now, and the model; each whole or not at all."""
    objective.policy.fit(objective.model)
    folder.mkdir(parents=True, exist_ok=True)
    state.publish(folder / "policy", objective.policy.save_pretrained)
    state.publish(folder / "model", objective.model.save_pretrained)
