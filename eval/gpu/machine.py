"""The machine by name, and its two ceilings as measured: products of the models' shapes, and memory."""

from __future__ import annotations

import importlib.metadata
import inspect
import statistics
from collections.abc import Callable
from typing import Any

import torch
from vtr.eval.cost.shapes import LLAMA_7B
from vtr.eval.cost.timing import between, mark
from vtr.eval.gpu.record import Setup

from vtr.engine import varlen

TOKENS = (640, 5120, 24000)
"""Rows of the products: a prompt of LLaVA-1.5, eight of them, eight of LLaVA-NeXT."""


def measure(setup: Setup, found: dict[str, Any]) -> None:
    """Fill ``found``: names, and ``gemm_flops`` (FLOP/s) and ``bandwidth`` (bytes/s), the best that was measured."""
    found |= named(setup)
    found["products"] = products(setup)
    found["gemm_flops"] = max(one["flops_per_s"] for one in found["products"])
    found["memory"] = memory(setup)
    found["bandwidth"] = max(found["memory"].values())


def named(setup: Setup) -> dict[str, Any]:
    """What the hardware and the kernels are called; versions stand in the head of the file."""
    kernel = varlen.find_kernel()
    out: dict[str, Any] = {
        "dtype": str(setup.dtype).removeprefix("torch."),
        "cuda": torch.version.cuda,
        "flash_attn": _version("flash-attn"),
        "packed_kernel": None if kernel is None else kernel.__qualname__.rpartition(".")[2],
        "varlen_attn_takes": varlen_arguments(),
    }
    if setup.on_gpu:
        about = torch.cuda.get_device_properties(setup.device)
        out |= {
            "name": about.name,
            "capability": [about.major, about.minor],
            "memory_gb": round(about.total_memory / 1e9, 1),
            "multiprocessors": about.multi_processor_count,
        }
    return out


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def varlen_arguments() -> list[str] | None:
    """What torch's own varlen attention can be told, which differs by version; None where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return list(inspect.signature(varlen_attn).parameters)


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 7, warmup: int = 2) -> float:
    """The median of ``run()``."""
    times = []
    for i in range(warmup + repeats):
        start = mark(device)
        run()
        spent = between(start, mark(device))
        if i >= warmup:
            times.append(spent)
    return statistics.median(times)


def products(setup: Setup) -> list[dict[str, Any]]:
    """FLOP/s of [tokens, inner] × [inner, columns], as the decoder's projections and its MLP have them."""
    wide, inner = LLAMA_7B["hidden_size"], LLAMA_7B["intermediate_size"]
    if setup.small:
        wide, inner = wide // 32, inner // 32
    out = []
    for tokens in TOKENS[:1] if setup.small else TOKENS:
        for k, n in ((wide, wide), (wide, inner), (inner, wide)):
            a, b = (torch.randn(*size, device=setup.device).to(setup.dtype) for size in ((tokens, k), (k, n)))
            spent = seconds(lambda a=a, b=b: a @ b, setup.device)  # type: ignore[misc]
            out.append({"tokens": tokens, "inner": k, "columns": n, "flops_per_s": 2 * tokens * k * n / spent})
    return out


def memory(setup: Setup) -> dict[str, float]:
    """Bytes/s of reading and of copying a GiB (a copy reads and writes)."""
    count = 1 << 20 if setup.small else 1 << 28
    source = torch.ones(count, dtype=torch.float32, device=setup.device)
    read = 4 * count / seconds(lambda: source.sum(), setup.device)
    target = torch.empty_like(source)
    return {"read": read, "copy": 8 * count / seconds(lambda: target.copy_(source), setup.device)}
