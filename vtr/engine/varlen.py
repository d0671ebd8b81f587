"""One attention kernel for all rows of a packed prefill: torch's own varlen attention or flash-attn's, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float | None], torch.Tensor]
"""(q, k, v [T, heads, d], cumulative row lengths int32 [rows + 1], longest row, scaling) → [T, heads, d], causal."""


@lru_cache(maxsize=1)
def find_kernel() -> Kernel | None:
    """What is installed: torch's varlen attention, else flash-attn's, else None (rows are then taken one by one)."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        def of_torch(q, k, v, ends, longest, scaling):  # type: ignore[no-untyped-def]
            gqa = q.shape[1] != k.shape[1]
            return varlen_attn(
                q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=gqa
            )

        return of_torch
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func

        def of_flash(q, k, v, ends, longest, scaling):  # type: ignore[no-untyped-def]
            return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, softmax_scale=scaling, causal=True)

        return of_flash
    except ImportError:
        return None


def packed_attention(
    base: str, query: torch.Tensor, plan: Any, window: int | None, kwargs: dict[str, Any]
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """A function of (query [1, heads, T, d], key, value) that does all rows at once, or None where rows go one by one.

    One by one: on the CPU, in float32, over cached tokens, beyond a sliding window, with dropout, eager attention.
    """
    takes = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and base != "eager"
    if not takes or window is not None or any(plan.past) or kwargs.get("dropout") or len(plan.lengths) == 1:
        return None
    kernel = find_kernel()
    if kernel is None:
        return None
    ends = torch.tensor([0, *plan.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = ends.to(query.device, non_blocking=True)
    longest = max(plan.lengths)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        return kernel(q, k, v, ends, longest, kwargs.get("scaling"))[None]

    return run
