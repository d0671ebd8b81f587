"""One attention kernel for all rows of a packed prefill: torch's own varlen attention or flash-attn's, on a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float | None], torch.Tensor]
"""(q, k, v [T, heads, d], cumulative row lengths int32 [rows + 1], longest row, scaling) → [T, heads, d], causal."""


@lru_cache(maxsize=1)
def find_kernel() -> Kernel | None:
    """What is installed: torch's varlen attention, else flash-attn's, else None (rows are then taken one by one)."""
    found = _function("torch.nn.attention.varlen", "varlen_attn")
    if found is not None:
        return of_torch(found)
    found = _function("flash_attn", "flash_attn_varlen_func")
    if found is None and _all_hopper():
        found = _function("flash_attn_interface", "flash_attn_varlen_func")  # flash-attn 3
    return None if found is None else of_flash(found)


def of_torch(varlen_attn: Callable[..., Any]) -> Kernel:
    """torch's function as a kernel, asked for what its release knows: it got ``scale``, ``enable_gqa`` one by one."""
    known = inspect.signature(varlen_attn).parameters

    def kernel(q, k, v, ends, longest, scaling):  # type: ignore[no-untyped-def]
        more: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        own = q.shape[-1] ** -0.5
        if "scale" in known:
            more["scale"] = scaling
        elif scaling is not None and scaling != own:
            q = q * (scaling / own)
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in known:
                more["enable_gqa"] = True
            else:
                k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return varlen_attn(q, k, v, ends, ends, longest, longest, **more)

    return kernel


def of_flash(flash_attn_varlen_func: Callable[..., Any]) -> Kernel:
    """flash-attn's function as a kernel. Some releases of flash-attn 3 give the log-sum-exp back as well."""

    def kernel(q, k, v, ends, longest, scaling):  # type: ignore[no-untyped-def]
        out = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, softmax_scale=scaling, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return kernel


def _function(module: str, name: str) -> Callable[..., Any] | None:
    try:
        found: Callable[..., Any] | None = getattr(import_module(module), name, None)
    except ImportError:
        return None
    return found


def _all_hopper() -> bool:
    """Whether every GPU is one that flash-attn 3 is built for."""
    return all(torch.cuda.get_device_capability(i)[0] == 9 for i in range(torch.cuda.device_count()))


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernels take queries, keys and values of this kind (heads in dimension 1, head size in the last)."""
    size = q.shape[-1]
    if not q.is_cuda or torch.version.hip is not None or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if any(t.dtype != q.dtype or t.shape[-1] != size for t in (k, v)) or q.shape[1] % k.shape[1]:
        return False
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))  # not every GPU goes back over 256
    if size % 8 or size > (192 if learns else 256):
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def packed_attention(
    base: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Any, window: int | None,
    kwargs: dict[str, Any],
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:  # fmt: skip
    """A function of (query [1, heads, T, d], key, value) that does all rows at once, or None where rows go one by one.

    One by one: a row alone, on the CPU, in float32, over cached tokens, beyond a sliding window, with dropout, capped
    logits or sinks, eager attention; and what no kernel takes: head sizes that are no multiple of 8 or above 256 (192
    where gradients flow), GPUs before compute capability 8.0, and AMD's.
    """
    if base == "eager" or window is not None or any(plan.past) or len(plan.lengths) == 1:
        return None
    if kwargs.get("dropout") or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        return None
    if not takes(query, key, value) or (kernel := find_kernel()) is None:
        return None
    lengths, device = plan.lengths, query.device
    ends = plan.once.of("ends", lengths, device, make=lambda: _ends(lengths, device))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        return kernel(q, k, v, ends, max(lengths), kwargs.get("scaling"))[None]

    return run


def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 [rows + 1]: where each row begins in the packed sequence, and where the last one ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
