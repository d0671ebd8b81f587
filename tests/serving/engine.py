"""A small vLLM engine in this process."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextlib.contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[Any]:
    """``vllm.LLM`` of the checkpoint in ``folder``, float32, eager."""
    from vllm import LLM

    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 3000,
        "max_num_seqs": 8,
        "enable_mm_embeds": True,
        **settings,
    }
    llm = LLM(str(folder), limit_mm_per_prompt={"image": 3}, disable_log_stats=True, **given)
    try:
        yield llm
    finally:
        del llm
        gc.collect()
