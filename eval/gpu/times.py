"""Prefill and decoded tokens of the 7B shapes, beside the unpatched model and beside what the machine allows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from vtr.eval.cost.interleave import decode_in_turns, in_turns, median_ratio, text_times, total_ratio
from vtr.eval.cost.midsize import IMAGE_ID
from vtr.eval.cost.peak_memory import cuda_growth
from vtr.eval.cost.timing import milliseconds
from vtr.eval.gpu.models import UNPATCHED, Cell, Contender, Pair
from vtr.eval.gpu.record import Setup

CACHES_GB = 40.0
"""Caches of contenders that decode side by side take no more than this."""
DECODED = (
    "no policy", "fastv 100 %", "fastv 33 %", "fastv 11 %", "gsearch 33 %", "pyramid 33 %", "m3 33 %", "pmod",
    "dynamic-llava 33 %", "a mix",
)  # fmt: skip


# -- prefill -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def prefill(setup: Setup, pair: Pair, name: str, ceilings: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Fill ``found``: the shape, and under "rows" label → times, ratio to the unpatched model, bound, selector, memory.

    The bound is the longer of the matrix products at the measured FLOP/s and of the layers' weights at the measured
    bytes/s. ceilings: what :func:`vtr.eval.gpu.machine.measure` found.
    """
    cell = pair.cell(name, setup)
    found |= about(pair, cell)
    chosen: dict[str, list[float]] = {label: [] for label in cell.contenders}

    def run(label: str, contender: Contender) -> float:
        with text_times(contender.model) as spans:
            contender.forward(cell.inputs)
        report = contender.report()
        chosen[label].append(0.0 if report is None else report.selector_ms)
        return sum(spans)

    times = in_turns({label: partial(run, label, one) for label, one in cell.contenders.items()}, setup.repeats)
    found["rows"] = rows = {}
    for label, contender in cell.contenders.items():
        seconds = times[label]
        work, kv_bytes, growth = weighed(setup, pair, cell, contender)
        bound = max(work / ceilings["gemm_flops"], pair.layer_bytes / ceilings["bandwidth"])
        rows[label] = {
            "prefill_ms": milliseconds(seconds),
            "over_unpatched": asdict(median_ratio(seconds, times[UNPATCHED])),
            "bound_ms": bound * 1e3,
            "over_bound": statistics.median(seconds) / bound,
            "selector_ms": statistics.median(chosen[label][1:]),
            "flops": work,
            "kv_bytes": kv_bytes,
            "growth_gb": growth,
        }


def about(pair: Pair, cell: Cell) -> dict[str, Any]:
    """What a part was measured on."""
    tokens = cell.inputs["attention_mask"].sum(1).tolist()
    return {
        "vision_tokens": pair.shape.vision_tokens, "layers": pair.layers, "tokens": tokens, "left_out": cell.left_out,
    }  # fmt: skip


def weighed(setup: Setup, pair: Pair, cell: Cell, contender: Contender) -> tuple[int, int, float | None]:
    """FLOPs of the prefill, bytes of its cache, and by how many GB a forward raises memory (None on a CPU).

    The unpatched model computes what the patched one does without a policy.
    """
    counted = contender if contender.policy else cell.contenders["no policy"]
    counted.forward(cell.inputs)
    report = counted.report()
    growth = cuda_growth(partial(contender.model, **contender.policy), cell.inputs) / 1e9 if setup.on_gpu else None
    return report.prefill_flops, report.kv_bytes, growth


# -- decode ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def decode(setup: Setup, pair: Pair, name: str, ceilings: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Fill ``found``: under "rows" label → milliseconds a token of the batch, ratio to the unpatched model, bound.

    The bound is the weights of layers and head, and the cache as it is after the prompt, at the measured bytes/s.
    """
    cell = pair.cell(name, setup)
    found |= about(pair, cell)
    found["rows"] = rows = {}
    others = [label for label in DECODED if label in cell.contenders]
    whole = pair.token_bytes * pair.layers * cell.inputs["input_ids"].numel() / 1e9
    together = max(int(CACHES_GB / whole) - 1, 1)
    for start in range(0, len(others), together):
        group = [UNPATCHED, *others[start : start + together]]
        seconds = decode_in_turns({label: generates(setup, cell, label) for label in group}, setup.device)
        for label in group:
            if label in rows:
                continue
            kv_bytes = weighed_cache(pair, cell, label)
            bound = (pair.weight_bytes + kv_bytes) / ceilings["bandwidth"]
            mine, beside = seconds[label][1:], seconds[UNPATCHED][1:]  # the first token warms up
            rows[label] = {
                "decode_ms": milliseconds(mine),
                "over_unpatched": asdict(total_ratio(mine, beside)),
                "bound_ms": bound * 1e3,
                "over_bound": statistics.median(mine) / bound,
                "kv_bytes": kv_bytes,
            }


def generates(setup: Setup, cell: Cell, label: str) -> Callable[[Any], Any]:
    """A ``generate`` for :func:`vtr.eval.cost.interleave.decode_in_turns`."""
    contender = cell.contenders[label]

    def generate(criteria: Any) -> Any:
        return contender.model.generate(
            **cell.inputs, **contender.policy, max_new_tokens=setup.tokens + 1, do_sample=False,
            suppress_tokens=[IMAGE_ID], stopping_criteria=criteria,
        )  # fmt: skip

    return generate


def weighed_cache(pair: Pair, cell: Cell, label: str) -> int:
    """Bytes of keys and values after the prompt (of the unpatched model with those of its padding)."""
    contender = cell.contenders[label]
    if not contender.policy:
        return int(pair.token_bytes * pair.layers * cell.inputs["input_ids"].numel())
    contender.forward(cell.inputs)
    return int(contender.report().kv_bytes)
