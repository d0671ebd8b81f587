"""How often the host launches, copies and waits, by torch's profiler: what decides at small batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from vtr.eval.gpu.models import UNPATCHED, Cell, Contender, Pair
from vtr.eval.gpu.record import Setup
from vtr.eval.gpu.times import about

from vtr.engine.compat import cache_in, put_cache

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
SMALL = (UNPATCHED, "fastv 33 %", "a mix")


@torch.no_grad()
def measure(setup: Setup, pair: Pair, name: str, found: dict[str, Any]) -> None:
    """Fill ``found``: under "rows" label → counts of a prefill and of a decoded token.

    On a CPU only operators are counted; the rest is None.
    """
    cell = pair.cell(name, setup)
    found |= about(pair, cell)
    found["rows"] = rows = {}
    for label, contender in cell.contenders.items():
        if not label.endswith(" 11 %") and (not setup.small or label in SMALL):  # at a ninth as many as at a third
            rows[label] = {
                "prefill": counts(setup, partial(contender.forward, cell.inputs)),
                "token": counts(setup, one_token(cell, contender)),
            }


def one_token(cell: Cell, contender: Contender) -> Callable[[], Any]:
    """A forward of one more token a row on the cache of the prompt, after one that warms up."""
    ids, mask = cell.inputs["input_ids"][:, -1:], cell.inputs["attention_mask"]
    cache = cache_in(dict(contender.forward(cell.inputs)))
    places = mask.sum(1, keepdim=True)

    def step() -> Any:
        nonlocal mask, places
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "use_cache": True}
        put_cache(contender.model, given, cache)
        places = places + 1
        return contender.model(**given)

    step()
    return step


def counts(setup: Setup, run: Callable[[], Any]) -> dict[str, int | None]:
    """Of one ``run()``: kernels launched, copies, waits of the host, torch's operators."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.on_gpu else [])]
    with profile(activities=kinds) as seen:
        run()
        if setup.on_gpu:
            torch.cuda.synchronize(setup.device)
    events = [(event.key, event.count) for event in seen.key_averages()]

    def total(fits: Callable[[str], bool]) -> int:
        return sum(count for key, count in events if fits(key))

    return {
        "launches": total(lambda key: "aunchKernel" in key) if setup.on_gpu else None,
        "copies": total(lambda key: key.startswith("cudaMemcpy")) if setup.on_gpu else None,
        "waits": total(lambda key: key in WAITS) if setup.on_gpu else None,
        "operators": total(lambda key: key.startswith("aten::")),
    }
