"""Trains the pocket model from its seed: `python -m vtr.pocket.train --out DIR`, or the joint one: `… --joint`.

Stages (see STAGES for the schedule of the shipped weights): `tower` (vision tower, dense labels), `align` (projector
and word table), `read` (language model, shortened pictures), `mix` (everything, full and reduced pictures), `nest`
(everything, all of M3's scales of every picture, and randomly pruned ones). At the end DIR/weights and DIR/samples hold
what the package ships; `vtr.pocket.fit` makes its trained policies.

--joint starts from the shipped weights (or those of --start) and makes one backbone for every policy. Stages (see
JOINT): `list` (language model and projector, long answers), `join` (the same, under every policy: M3's scales, random
pruning, p-MoD and Dynamic-LLaVA, which learn beside it). At the end DIR/weights and DIR/policies hold what the package
ships as pocket-joint.

Every stage writes DIR/<stage>.pt; an interrupted run continues where the last checkpoint left off.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

STAGES: dict[str, dict[str, Any]] = {
    "tower": {"steps": 3600, "lr": 4e-3},
    "align": {"steps": 400, "lr": 3e-3},
    "read": {"steps": 450, "horizon": 600, "lr": 3e-3, "pictures": 6},
    "mix": {"steps": 1000, "lr": 1.2e-3, "pictures": 4, "tower": 0.1},
    "nest": {"steps": 400, "lr": 8e-4, "pictures": 4, "tower": 0.1},
}
JOINT: dict[str, dict[str, Any]] = {
    "list": {"steps": 2000, "lr": 1.2e-3, "pictures": 2},
    "join": {"steps": 1000, "lr": 6e-4, "pictures": 3},
}


class Context:
    """What a stage needs from its surroundings: its rank, seeds, progress, logging and checkpoints."""

    def __init__(self, out: Path, rank: int, workers: int, seed: int) -> None:
        self.out, self.rank, self.workers, self.seed = out, rank, workers, seed
        self.stage, self.began, self.cpu_began = "", time.time(), time.process_time()
        self.window: dict[str, list[float]] = defaultdict(list)
        self.bar: Any = None

    def stream_seed(self, stage: str, first: int) -> str:
        """Name of this worker's scene stream; another one after every resumption."""
        return f"{stage}-{self.seed}-{self.rank}-{first}"

    def path(self, stage: str) -> Path:
        return self.out / f"{stage}.pt"

    def finished(self, stage: str, steps: int) -> bool:
        path = self.path(stage)
        return path.exists() and torch.load(path, weights_only=True)["step"] >= steps

    def resume(
        self, stage: str, model: Any, optimizers: list[torch.optim.Optimizer], extra: nn.Module | None = None
    ) -> int:
        """Loads the stage's checkpoint, if there is one; returns the number of steps already done."""
        if not self.path(stage).exists():
            return 0
        state = torch.load(self.path(stage), weights_only=True)
        model.load_state_dict(state["model"])
        if extra is not None:
            extra.load_state_dict(state["extra"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return int(state["step"])

    def save(
        self, stage: str, step: int, model: Any, optimizers: list[torch.optim.Optimizer], extra: nn.Module | None = None
    ) -> None:
        if self.rank:
            return
        state = {
            "step": step,
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "extra": None if extra is None else extra.state_dict(),
        }
        torch.save(state, self.path(stage).with_suffix(".tmp"))
        os.replace(self.path(stage).with_suffix(".tmp"), self.path(stage))
        wall, cpu = (time.time() - self.began) / 60, (time.process_time() - self.cpu_began) / 60 * self.workers
        with (self.out / "times.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, "wall_min": round(wall, 2), "cpu_min": round(cpu, 2)}))
            file.write("\n")

    def steps(self, stage: str, first: int, steps: int) -> Iterator[int]:
        """The step numbers still to do, with a progress bar on the first worker."""
        self.stage, self.began, self.cpu_began = stage, time.time(), time.process_time()
        self.window.clear()
        self.bar = tqdm(
            range(first + 1, steps + 1), desc=stage, initial=first, total=steps, disable=self.rank > 0, mininterval=5
        )
        yield from self.bar

    def track(self, step: int, loss: float, values: dict[str, float], every: int = 50) -> None:
        """Collects training figures and writes their means down now and then."""
        if self.rank:
            return
        self.window["loss"].append(loss)
        for key, value in values.items():
            self.window[key].append(value)
        if step % every == 0:
            self.say(f"step {step} " + " ".join(f"{k}:{sum(v) / len(v):.3f}" for k, v in self.window.items()))
            self.window.clear()

    def say(self, text: str) -> None:
        """A line for DIR/log.txt."""
        if self.rank == 0:
            with (self.out / "log.txt").open("a") as file:
                file.write(f"{(time.time() - self.began) / 60:6.2f}m {self.stage} {text}\n")


def _stage_functions() -> dict[str, Callable[..., None]]:
    from .join import train_join
    from .language import train_align, train_lm
    from .nest import train_nest
    from .tower import train_tower

    stages: dict[str, Callable[..., None]] = {"tower": train_tower, "align": train_align, "nest": train_nest}
    stages |= {mode: functools.partial(train_lm, mode=mode) for mode in ("read", "mix")}
    return stages | {mode: functools.partial(train_join, mode=mode) for mode in ("list", "join")}


def run_stages(
    model: Any, ctx: Context, stages: Mapping[str, dict[str, Any]], functions: Mapping[str, Callable[..., None]]
) -> None:
    """Every stage that is not finished, each from where the one before ended; the model is then as the last left it."""
    before: Path | None = None
    for stage, options in stages.items():
        if not ctx.finished(stage, options["steps"]):
            if before is not None and not ctx.path(stage).exists():
                model.load_state_dict(torch.load(before, weights_only=True)["model"])
            if dist.is_initialized():
                dist.barrier()
            functions[stage](model, ctx, **options)
            if dist.is_initialized():
                dist.barrier()
        before = ctx.path(stage)
    if before is not None:
        model.load_state_dict(torch.load(before, weights_only=True)["model"])


def work(rank: int, workers: int, args: argparse.Namespace) -> None:
    """One training process: all stages that are not finished, then (first process only) the export."""
    from . import load
    from .join import alone, export_policies
    from .model import build
    from .release import export, write_samples

    torch.set_num_threads(1)
    out: Path = args.out
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=workers)
    model, ctx = build(args.seed), Context(out, rank, workers, args.seed)
    stages = STAGES
    if args.joint:
        model.load_state_dict(load(folder=args.start)[0].state_dict())
        stages = JOINT if args.alone is None else JOINT | {"join": alone(JOINT["join"], args.alone)}
    run_stages(model, ctx, stages, _stage_functions())
    if rank == 0:
        export(model, out / "weights")
        if args.joint:
            export_policies(load(folder=out / "weights")[0], ctx.path("join"), out / "policies")
        else:
            write_samples(out / "weights", out / "samples")


def command(doc: str | None, work: Callable[[Path, int], None]) -> None:
    """The command line of a model that one process trains: ``work(folder, seed)``. doc: of the module, for --help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work(args.out.resolve(), args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="training processes of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--joint", action="store_true", help="stages list and join, from a trained pocket model")
    parser.add_argument("--start", type=Path, help="with --joint: folder of that model, instead of the shipped one")
    parser.add_argument(
        "--alone",
        choices=["pmod", "dynamic"],
        help="with --joint: stage join with this policy alone, in as many steps as it has beside the others",
    )
    args = parser.parse_args()
    if not args.joint and (args.start or args.alone):
        parser.error("--start and --alone are for --joint")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rendezvous").unlink(missing_ok=True)
    if args.workers == 1:
        work(0, 1, args)
    else:
        torch.multiprocessing.spawn(work, (args.workers, args), nprocs=args.workers)


if __name__ == "__main__":
    main()
