"""A peer's worker without a model: some of its methods work, others fail, hang or die."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "eval" / "peers"))

from channel import serve

SPEED = {"slow": 40.0, "fast": 10.0, "half": 20.0, "none": 80.0}


def start(folder: str, weights: str, budget: Any) -> dict[str, str]:
    assert Path(folder).is_dir()
    return {"fake": "1.0", "process": str(os.getpid())}


def answer(method: str, indexes: list[int], budget: dict[str, float], steps: int = 0) -> dict[str, Any]:
    """Question i's answer is token i; ``half`` knows the even ones; ``padded`` answers otherwise in a batch."""
    print("a library's chatter on stdout")
    if method == "raises":
        raise AttributeError("'LlavaNextModel' object has no attribute 'rope_deltas'")
    if method == "hangs":
        time.sleep(60)
    if method == "dies":
        print("Fatal: out of luck", file=sys.stderr)
        os._exit(3)
    ids = [[i if method != "half" or i % 2 == 0 else -1] for i in indexes]
    if steps:
        ids = [[*row, len(indexes) if method == "padded" and row[0] % 2 else 0] for row in ids]
    return {"ids": ids, "kv_tokens": budget["kept_tokens"]}


def clock(method: str, index: int, steps: int, budget: dict[str, float]) -> dict[str, Any]:
    if method == "untimed":
        raise NotImplementedError("decoding")
    return {"prefill_ms": SPEED[method], "decode_ms": [SPEED[method] / 10] * steps}


if __name__ == "__main__":
    serve({"start": start, "answer": answer, "time": clock})
