"""The engine's attention over packed rows beside attention in float32, row by row, at several head layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vtr.eval.gpu.machine import seconds
from vtr.eval.gpu.record import Record, Setup

from vtr.engine.attention import Plan, attention_name

RAGGED, EQUAL = (1, 7, 640, 129, 2992, 64), (640,) * 8
SMALL_RAGGED, SMALL_EQUAL = (1, 7, 40, 19), (24,) * 3
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""How far the results may be from float32's, as a share of their norm."""


@dataclass(frozen=True)
class Heads:
    """A head layout: query heads, key heads, and how wide a head is."""

    query: int
    key: int
    width: int

    def __str__(self) -> str:
        return f"{self.query}/{self.key} × {self.width}"


LAYOUTS = (
    Heads(32, 32, 128), Heads(32, 8, 128), Heads(28, 4, 128), Heads(16, 16, 64), Heads(14, 2, 64), Heads(32, 32, 80),
    Heads(16, 2, 96), Heads(32, 32, 96), Heads(8, 4, 256), Heads(4, 2, 12),
)  # fmt: skip
"""The last is one that no kernel takes: rows go one by one there, and must be right too."""


class Module(torch.nn.Module):
    """What an attention function asks of the module that calls it."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.layer_idx, self.is_causal = 0, True
        self.num_key_value_groups = heads.query // heads.key


def measure(setup: Setup, record: Record, found: dict[str, Any]) -> None:
    """Fill ``found``: layout, dtype and rows → error, milliseconds, and how many calls of the model's function it took.

    0 calls: one kernel for all rows.
    """
    cases = {"ragged": SMALL_RAGGED, "equal": SMALL_EQUAL} if setup.small else {"ragged": RAGGED, "equal": EQUAL}
    dtypes = CLOSE if setup.on_gpu else {torch.float32: 1e-4, torch.bfloat16: 2e-2}
    for heads in LAYOUTS[::3] if setup.small else LAYOUTS:
        for dtype in dtypes:
            for name, lengths in cases.items():
                label = f"{heads}, {str(dtype).removeprefix('torch.')}, {name}"
                found[label] = one = layout(setup, heads, dtype, lengths)
                if not one["error"] <= CLOSE[dtype]:
                    record.fault(f"packed attention, {label}: off by {one['error']:.1e} of its norm")


@torch.no_grad()
def layout(setup: Setup, heads: Heads, dtype: torch.dtype, lengths: Sequence[int]) -> dict[str, Any]:
    """One layout: error against float32, calls of the model's own function, milliseconds packed and row by row."""
    torch.manual_seed(setup.seed)
    total, scaling = sum(lengths), heads.width**-0.5
    q, k, v = (
        torch.randn(1, total, n, heads.width, device=setup.device).to(dtype).transpose(1, 2)
        for n in (heads.query, heads.key, heads.key)
    )
    run, module = ALL_ATTENTION_FUNCTIONS[attention_name("sdpa")], Module(heads)

    def packed() -> torch.Tensor:
        plan = Plan(decode=False, lengths=tuple(lengths))
        out: torch.Tensor = run(module, q, k, v, None, scaling=scaling, dropout=0.0, vtr_plan=plan)[0]
        return out

    with counted_calls() as calls:
        got = packed()
    want = by_rows(q.float(), k.float(), v.float(), lengths, scaling)
    return {
        "error": relative(got, want),
        "calls": calls[0],
        "rows": len(lengths),
        "ms": seconds(packed, setup.device, 5) * 1e3,
        "by_rows_ms": seconds(lambda: by_rows(q, k, v, lengths, scaling), setup.device, 5) * 1e3,
    }


def by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scaling: float) -> torch.Tensor:
    """Causal attention of each row alone. q [1, heads, T, d], k and v [1, fewer heads, T, d] → [1, T, heads, d]."""
    groups, out = q.shape[1] // k.shape[1], []
    for own in zip(*(t.split(list(lengths), 2) for t in (q, k, v)), strict=True):
        keys, values = (t.repeat_interleave(groups, 1) for t in own[1:])
        out.append(F.scaled_dot_product_attention(own[0], keys, values, is_causal=True, scale=scaling))
    return torch.cat(out, 2).transpose(1, 2)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ ÷ ‖want‖; infinite where something is not a number."""
    error = float((got.float() - want.float()).norm() / want.float().norm())
    return error if error == error else float("inf")


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Counts the calls of transformers' sdpa attention."""
    calls, own = [0], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return own(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = counted
    try:
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own
