"""Several processes over one evaluation: who am I, how many threads may I use, wait for each other."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch

PATIENCE = timedelta(days=7)
"""How long the fastest process waits for the slowest."""


@dataclass(frozen=True)
class Rank:
    """This process among ``world`` of them. local: among those on this machine, ``local_world`` of them."""

    index: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @classmethod
    def here(cls) -> Rank:
        """As torchrun or ``accelerate launch`` set the environment; alone without them."""
        index, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local, local_world = os.environ.get("LOCAL_RANK", index), os.environ.get("LOCAL_WORLD_SIZE", world)
        return cls(index, world, int(local), int(local_world))

    def join(self, store: str | None = None) -> None:
        """Meet the others: at ``store`` (a file), or where the environment says."""
        if self.world > 1 and not torch.distributed.is_initialized():
            where = f"file://{store}" if store else "env://"
            torch.distributed.init_process_group("gloo", where, PATIENCE, self.world, self.index)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Part with the others."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def shared_cores(rank: Rank) -> Iterator[None]:
    """Let torch use this process's part of the machine's cores: more threads than cores make everyone slower.

    A process by itself takes as many as OMP_NUM_THREADS says, where that is set.
    """
    before, part = torch.get_num_threads(), max(1, cores() // rank.local_world)
    torch.set_num_threads(before if rank.local_world == 1 and "OMP_NUM_THREADS" in os.environ else part)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(work: Callable[[Rank, str | None], None], processes: int) -> None:
    """Run ``work(rank, store)`` in so many new processes of this machine, all at the same time.

    If one fails, the others are ended, and its error is raised here.

    Args:
        work: must be picklable (a function of a module, or a ``functools.partial`` of one).

    Raises:
        RuntimeError: a process failed; the message is that of its own exception.
    """
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "error"
        try:
            mp.start_processes(_child, (work, processes, folder, str(errors)), processes, start_method="spawn")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            said = errors.read_text() if errors.exists() else str(error)
            raise RuntimeError(said) from error


def _child(index: int, work: Callable[[Rank, str | None], None], world: int, folder: str, errors: str) -> None:
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        work(Rank(index, world, index, world), str(Path(folder) / "store"))
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        Path(errors).write_text(str(error))
        raise


def _end_with(parent: int) -> None:
    """End this process soon after its parent, however that ended: nobody would wait for its share."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def launched() -> bool:
    """Whether torchrun or ``accelerate launch`` started this process as one of several."""
    return Rank.here().world > 1


def run_on(work: Callable[[Rank, str | None], None], processes: int | None, sensible: int) -> bool:
    """Run ``work(rank, store)`` in the processes that torchrun started, or in so many of this machine.

    Args:
        processes: of this machine; None is ``sensible``.

    Returns:
        Whether this process is the first of them.

    Raises:
        ValueError: ``processes`` beside those of torchrun. RuntimeError: see :func:`spread`.
    """
    if launched():
        if processes is not None:
            raise ValueError("--processes starts processes itself: leave it out under torchrun or accelerate launch")
        rank = Rank.here()
        work(rank, None)
        return rank.index == 0
    count = sensible if processes is None else processes
    if count == 1:
        work(Rank(), None)
    else:
        spread(work, count)
    return True


def device_of(rank: Rank, device: str) -> Any:
    """``auto``: this process's own GPU where there are any, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and rank.local_world > 1:
        return f"cuda:{rank.local % torch.cuda.device_count()}"
    return device
