"""Memory of one forward: what it holds for the cache, and its peak.

On the CPU the peak is asked of a fresh process, which nothing else has raised before:
``python -m vtr.eval.cost.peak_memory SIZE DTYPE SEED POLICY`` builds the model, runs the prompt and prints the bytes by
which the forward raised the process's resident memory.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from vtr.eval.cost import midsize
from vtr.eval.cost.midsize import Size

import vtr

PROC = Path("/proc")
TWO = {**midsize.NARROW, "num_hidden_layers": 2}
"""The vision tower: some policies look at two of its layers."""


def available() -> bool:
    """Whether this system can set a process's peak back (Linux)."""
    return (PROC / "self" / "clear_refs").exists()


def measure(size: Size, dtype: torch.dtype, policy: vtr.Policy | None, seed: int = 0) -> int:
    """Bytes by which one forward under ``policy`` (None: of an unpatched model) raises a process's resident memory.

    Raises:
        RuntimeError: the process failed (the message holds what it said), or the model is too small to see.
    """
    name = str(dtype).removeprefix("torch.")
    given = [json.dumps(asdict(size)), name, str(seed), "" if policy is None else policy.spec]
    done = subprocess.run([sys.executable, "-m", __name__, *given], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring peak memory failed: {done.stderr.strip().splitlines()[-1:]}")
    grown = int(done.stdout.split()[-1])
    if grown <= 0:
        raise RuntimeError("one forward raised no memory that the system counts: measure a larger model")
    return grown


def let_peak_fall(process: int | str = "self") -> None:
    """A process's peak starts anew at what is resident now."""
    (PROC / str(process) / "clear_refs").write_text("5")


def resident(field: str, process: int | str = "self") -> int:
    """A field of /proc/…/status in bytes: VmRSS (now) or VmHWM (the peak)."""
    line = next(
        line for line in (PROC / str(process) / "status").read_text().splitlines() if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


def cuda_growth(forward: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> int:
    """Bytes by which one forward raises what is allocated on the GPU."""
    device = inputs["input_ids"].device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward(**inputs, use_cache=True, logits_to_keep=1)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def cached_bytes(model: Any, inputs: Mapping[str, torch.Tensor], **policy: Any) -> int:
    """Bytes of the key and value tensors that one forward makes for the cache, summed as they come.

    Keys that a selector projects to look ahead, outside of the attention module, are not cached and not counted.
    """
    total, attends = 0, False

    def attend(*_: Any) -> None:
        nonlocal attends
        attends = not attends

    def add(_: Any, __: Any, out: torch.Tensor) -> None:
        nonlocal total
        total += out.numel() * out.element_size() * attends

    attentions = [layer.self_attn for layer in model.get_decoder().layers]
    hooks = [proj.register_forward_hook(add, prepend=True) for a in attentions for proj in (a.k_proj, a.v_proj)]
    hooks += [a.register_forward_pre_hook(attend) for a in attentions]
    hooks += [a.register_forward_hook(attend) for a in attentions]
    try:
        model(**inputs, **policy, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return total


@torch.inference_mode()
def growth(size: Size, dtype: torch.dtype, seed: int, spec: str) -> int:
    """Build, warm up on a few words, run the prompt once."""
    model = midsize.build(size, "cpu", dtype, seed=seed, tower=TWO)
    policy = {"policy": spec} if spec else {}
    if policy:
        vtr.patch(model)
    inputs = midsize.prompts(model, size, [(True, size.text_tokens)], seed)
    model(input_ids=inputs["input_ids"][:, -4:], use_cache=True)
    gc.collect()
    let_peak_fall()
    before = resident("VmRSS")
    model(**inputs, **policy, use_cache=True, logits_to_keep=1)
    return resident("VmHWM") - before


if __name__ == "__main__":
    shapes, name, seed, spec = sys.argv[1:]
    fields = json.loads(shapes)
    fields["decode_tokens"] = tuple(fields["decode_tokens"])
    print(growth(Size(**fields), getattr(torch, name), int(seed), spec))
