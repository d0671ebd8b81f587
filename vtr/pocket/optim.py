"""Optimiser and data-parallel helpers of the pocket training: Muon in fp32, schedules, gradient averaging."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised by Newton-Schulz steps, in fp32.

    (`torch.optim.Muon` does this in bfloat16, which is slow on CPUs without native support.) Matrices of equal shape
    are processed together. An update has an RMS of about 0.2 times the learning rate.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(list(params), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            buckets: dict[tuple[int, int], list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(mean, group["momentum"])
                buckets.setdefault((p.shape[0], p.shape[1]), []).append((p, ahead))
            for (rows, cols), entries in buckets.items():
                updates = orthogonalize(torch.stack([u for _, u in entries]))
                size = group["lr"] * 0.2 * math.sqrt(max(rows, cols))
                for (p, _), update in zip(entries, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)


def orthogonalize(x: torch.Tensor, steps: int = 4) -> torch.Tensor:
    """Pushes the singular values of every matrix of a stack towards one (quintic Newton-Schulz iteration)."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def ramp(step: int, steps: int, warmup: int, shape: str) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine or a plateau with linear decay over the last half."""
    done = step / steps
    fall = 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else min(1.0, (1 - done) / 0.5)
    return min(1.0, step / warmup) * (0.03 + 0.97 * fall)


def set_lr(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Multiplies every group's first learning rate (kept in `base`) by a factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("base", group["lr"]) * factor


def descend(loss: torch.Tensor, params: list[nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """One step of all optimizers along the workers' mean gradient, clipped to norm 1."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    apply_gradients(params, optimizers)


def apply_gradients(params: list[nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """One step of all optimizers along the gradients that are there: averaged over workers, clipped to norm 1."""
    average_gradients(params)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    for optimizer in optimizers:
        optimizer.step()


def average_gradients(params: list[nn.Parameter]) -> None:
    """Mean of the gradients over all worker processes (nothing to do in a single process)."""
    if not dist.is_initialized():
        return
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1) for p in params])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(part.view_as(p))  # type: ignore[union-attr]
