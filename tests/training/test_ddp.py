"""Data-parallel training of a patched model: two processes, each with policies of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

import vtr
from tests import tiny
from tests.engine.test_seams import Mod, Pairs
from tests.loads import ROWS, gradients, labels, trainable

RANKS = 2
STEPS: list[list[Any]] = [
    [[vtr.FastV(0.5), None, None, vtr.Random(0.2)], [Pairs(), Mod(), None, vtr.FastV(0.25)]],
    [[vtr.Random(0.0)] * 4, None],
    [None, [None, Mod(), None, Pairs()]],
]
"""Policies of every step and rank; None reduces nothing."""


def made() -> Any:
    return trainable(vtr.patch(tiny.llava_next(layers=3)))


def loss(model: Any, policy: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, labels=labels(inputs), policy=policy).loss


def train(rank: int, folder: str) -> None:
    """One process: the steps' averaged gradients go to a file."""
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(folder, "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        model = made()
        inputs, steps = tiny.batch(model, ROWS, "right", seed=rank), []
        parallel = DistributedDataParallel(model, find_unused_parameters=False)
        for policies in STEPS:
            loss(parallel, policies[rank], inputs).backward()
            steps.append(gradients(model))
        torch.save(steps, os.path.join(folder, f"rank{rank}.pt"))
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch was built without gloo"
)
def test_ranks_with_different_policies_average_their_gradients(tmp_path: Path) -> None:
    spawn(train, (str(tmp_path),), nprocs=RANKS)
    got = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    model = made()
    inputs = [tiny.batch(model, ROWS, "right", seed=rank) for rank in range(RANKS)]
    for step, policies in enumerate(STEPS):
        for rank in range(RANKS):
            (loss(model, policies[rank], inputs[rank]) / RANKS).backward()
        want = gradients(model)
        assert want
        for rank in range(RANKS):
            assert got[rank][step].keys() == want.keys()
            for name, grad in want.items():
                torch.testing.assert_close(got[rank][step][name], grad, atol=1e-6, rtol=1e-4)
