"""A made-up table about a model of these tests, for ``--tables``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FASTV, RANDOM = "fastv:keep=0.1,layer=2", "random:keep=0.005"
MODEL = {
    "text": {"hidden": 128, "intermediate": 256, "layers": 10, "heads": 4, "kv_heads": 4},
    "vision": {"hidden": 64, "intermediate": 128, "layers": 3, "tokens": 145, "tiles": 5, "side": 12},
    "source": "made up",
}
VQA = {
    "title": "questions", "task": "pocket_vqa", "metrics": ["exact_match"], "interval": "mean", "questions": 100,
    "counted": "made up",
}  # fmt: skip


def table(**changed: Any) -> dict[str, Any]:
    made = {
        "source": "made up, Table 1", "read": "nowhere", "model": "pocket", "columns": {"vqa": "pocket_vqa"},
        "unreduced": {"vqa": 90.0},
        "rows": [
            {"name": "FastV", "tokens": 0.3, "policy": FASTV, "numbers": {"vqa": 81.0}},
            {"name": "random", "tokens": 4, "policy": RANDOM, "numbers": {"vqa": 70.5}},
            {"name": "other", "numbers": {"vqa": 1.0}, "why": "it needs weights"},
        ],
    }  # fmt: skip
    return made | changed


def write(folder: Path, made: dict[str, Any] | None = None, **vqa: Any) -> Path:
    """The folder of tables: ``made-up.json`` and what it speaks of."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "models.json").write_text(json.dumps({"pocket": {"checkpoints": ["pocket"], **MODEL}}))
    (folder / "benchmarks.json").write_text(json.dumps({"pocket_vqa": {**VQA, **vqa}}))
    (folder / "made-up.json").write_text(json.dumps(made or table()))
    return folder
