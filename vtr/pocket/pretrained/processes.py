"""Several processes train one model on one machine: each on pictures of its own, with the mean of their gradients."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed


def count() -> int:
    """Processes at work."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Of this process; the first one is 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def run(processes: int, work: Callable[..., Any], *args: Any) -> None:
    """Call ``work(*args)`` in so many processes and wait for all; one works in this process.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them failed.
    """
    if processes == 1:
        work(*args)
        return
    with tempfile.TemporaryDirectory() as meeting:
        place = f"file://{meeting}/all"
        torch.multiprocessing.spawn(_one, (processes, place, torch.get_num_threads(), work, args), nprocs=processes)


def _one(rank: int, processes: int, place: str, threads: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=processes)
    try:
        work(*args)
    finally:
        distributed.destroy_process_group()


@torch.no_grad()
def share(tensors: Iterable[torch.Tensor]) -> None:
    """Give all processes what the first one has."""
    if count() > 1:
        for one in tensors:
            distributed.broadcast(one, 0)


@torch.no_grad()
def average(tensors: list[torch.Tensor]) -> None:
    """Replace float32 tensors by their means over all processes, in place."""
    if count() > 1:
        flat = torch.cat([one.flatten() for one in tensors])
        distributed.all_reduce(flat)
        flat /= count()
        for one, mean in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
            one.copy_(mean.view_as(one))


def gather(value: Any) -> list[Any]:
    """What each process has, for all of them."""
    found = [value] * count()
    if count() > 1:
        distributed.all_gather_object(found, value)
    return found
