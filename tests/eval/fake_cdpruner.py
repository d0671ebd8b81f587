"""A worker of the CDPruner comparison without a model: it prunes what it is told, or fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "eval" / "peers"))

from channel import serve

TOTAL, TEXT = 144, 33


def start(folder: str) -> dict[str, str]:
    assert (Path(folder) / "questions.json").is_file()
    return {"fake": "1.0"}


def run(index: int, method: str, steps: int, as_theirs: bool = False) -> dict[str, Any]:
    """A percentage, or a spec with a count. A call costs a millisecond a token, a decoded token two."""
    if method == "90":
        raise RuntimeError("not that many")
    spec = method.startswith("cdpruner:keep=")
    count = int(method.partition("=")[2].partition(",")[0]) if spec else TOTAL
    if method.isdigit():
        count = TOTAL - TOTAL * int(method) // 100
    said = [count, index, int(spec and index == 1 and not as_theirs)] * steps
    return {"ids": said[:steps], "tokens": TEXT + count, "cpu_ms": TEXT + count + 2.0 * (steps - 1)}


if __name__ == "__main__":
    serve({"start": start, "run": run})
