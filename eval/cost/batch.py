"""What it costs that requests of one batch differ: ``vtr bench batch``. Prefill of eight rows, several mixes.

Each mix is put beside its rows run alone one after the other, and beside what a server without vtr would do: the
unpatched model on the padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm
from vtr.eval.cost import engine, midsize
from vtr.eval.cost.engine import Request, batch_runs, mixed, stairs
from vtr.eval.cost.interleave import in_turns, keep_freed_memory, median_ratio
from vtr.eval.cost.midsize import Size
from vtr.eval.cost.timing import milliseconds

import vtr

SIDES = {"small": 16, "cpu": 24}
"""Vision tokens per side of a picture on a CPU, where eight rows of the mid-size models' own would take hours."""


def choose(small: bool, device: str, dtype: str | None, repeats: int | None) -> tuple[Size, torch.dtype, int]:
    """Shapes, precision and repeats for a device; raises as the engine's benchmark does."""
    size, precision, times = engine.choose(small, device, dtype, repeats)
    if device == "cuda":
        return size, precision, times
    return replace(size, side=SIDES["small" if small else "cpu"]), precision, repeats or 3


def mixes(size: Size) -> dict[str, list[Request]]:
    """Eight requests each, as a server may get them together."""
    text, half = size.text_tokens, size.text_tokens // 2
    pools = [vtr.Pool(max(size.side // parts, 1)) for parts in (2, 3, 4, 6)]
    return {
        "all unreduced": [(None, True, text)] * 8,
        "one reduced": [(vtr.FastV(0.1, layer=2), True, text), *[(None, True, text)] * 7],
        "one unreduced": [(None, True, text), *[(vtr.FastV(0.1, layer=2), True, text)] * 7],
        "all alike": [(vtr.FastV(0.25, layer=2), True, text)] * 8,
        "all different": mixed(size),
        "four pooled": [*[(pool, True, text) for pool in pools], *[(stairs(size.layers), True, half)] * 4],
        "short and long": [(vtr.Pyramid(), True, max(text // 8, 1) * (1 + row)) for row in range(8)],
        "half without image": [*[(vtr.FastV(0.25, layer=2), True, text)] * 4, *[(None, False, text)] * 4],
    }


def measure_mix(
    stock: Any, patched: Any, size: Size, requests: list[Request], repeats: int, seed: int, done: Callable[[], Any]
) -> dict[str, Any]:
    """One mix: milliseconds, and over what it is put beside."""
    runs, inputs = batch_runs(stock, patched, size, requests, seed)
    times = in_turns(runs, repeats, done)
    rows, padded = (median_ratio(times["batch"], times[name]) for name in ("rows", "padded"))
    return {
        "policies": ["none" if policy is None else policy.spec for policy, _, _ in requests],
        "tokens": inputs["attention_mask"].sum(1).tolist(),
        "ms": milliseconds(times["batch"]),
        "rows_ms": milliseconds(times["rows"]),
        "padded_ms": milliseconds(times["padded"]),
        "over_rows": rows.value,
        "over_rows_low": rows.low,
        "over_rows_high": rows.high,
        "over_padded": padded.value,
        "over_padded_low": padded.low,
        "over_padded_high": padded.high,
    }


@torch.no_grad()
def measure(
    size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 3, seed: int = 0
) -> dict[str, Any]:
    """The body of a result of kind "batch"."""
    keep_freed_memory()
    stock = midsize.build(size, device, dtype, seed=seed)
    patched = vtr.patch(midsize.twin(stock))
    found, rows = mixes(size), []
    with tqdm(total=len(found) * 3 * (repeats + 1), unit="run", desc="vtr bench batch") as bar:
        for name, requests in found.items():
            rows.append({"name": name} | measure_mix(stock, patched, size, requests, repeats, seed, bar.update))
    return {"model": facts(size), "dtype": str(dtype).removeprefix("torch."), "repeats": repeats, "rows": rows}


def facts(size: Size) -> dict[str, Any]:
    """The shapes of a mid-size model, for a result file."""
    from vtr.eval.cost.shapes import of_size

    return of_size(size).facts()


def table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A measured result as table rows."""
    return [
        (
            row["name"],
            f"{row['ms']['median']:.0f}",
            f"{row['over_rows']:.2f} ({row['over_rows_low']:.2f}–{row['over_rows_high']:.2f})",
            f"{row['over_padded']:.2f} ({row['over_padded_low']:.2f}–{row['over_padded_high']:.2f})",
        )
        for row in result["rows"]
    ]
