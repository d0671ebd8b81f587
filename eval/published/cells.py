"""What has been run, in the output folder: a file for each policy and task, so that a later call runs only the rest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtr.files import read_json

LONGEST = 2**28
KEPT = ("score", "prediction", "ground_truth", "category", "question_id", "index")
"""Of a sample's entry that is an object, what scores are made of; texts stay in lmms-eval's own files."""


@dataclass(frozen=True)
class Fixed:
    """What holds for all that lies in one folder."""

    model: str
    dtype: str
    limit: int | None


def slug(policy: str) -> str:
    """A file's name for a spec: its letters and digits, and a few digits that tell it from those of the same ones."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", policy).strip("-")[:60]
    return f"{plain}-{hashlib.sha256(policy.encode()).hexdigest()[:8]}"


class Cells:
    """The folder.

    Raises:
        ValueError: it holds runs of another model, precision or limit.
    """

    def __init__(self, folder: Path, fixed: Fixed) -> None:
        self.folder, self.fixed = folder, fixed
        file = folder / "settings.json"
        if file.exists():
            was = read_json(file, "the settings of vtr eval published")
            now = asdict(fixed)
            if changed := [name for name in now if not isinstance(was, dict) or was.get(name) != now[name]]:
                said = ", ".join(f"{name} was {was.get(name)!r} and is now {now[name]!r}" for name in changed)
                raise ValueError(
                    f"{folder} holds other runs: {said}. Give another --out, or the options it was made with"
                )

    def begin(self) -> None:
        """Make the folder, and write down what it is for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder / "settings.json", asdict(self.fixed))

    def path(self, policy: str, task: str) -> Path:
        return self.folder / "cells" / task / f"{slug(policy)}.json"

    def missing(self, policy: str, tasks: Iterable[str]) -> list[str]:
        return [task for task in tasks if not self.path(policy, task).exists()]

    def read(self, policy: str, task: str) -> dict[str, Any] | None:
        path = self.path(policy, task)
        if not path.exists():
            return None
        cell = read_json(path, "a cell of vtr eval published", LONGEST)
        if not isinstance(cell, dict) or cell.get("policy") != policy or not isinstance(cell.get("results"), dict):
            raise ValueError(f"{path} is not what was written there: delete it, and it is run again")
        return cell

    def keep(self, policy: str, task: str, results: Mapping[str, Any], samples: Iterable[dict[str, Any]]) -> None:
        """Write a cell. ``results``: by metric; ``samples``: as lmms-eval logs them."""
        names = {"doc_id", *(name for name in results if "_stderr" not in name)}
        short = [{name: trimmed(value) for name, value in one.items() if name in names} for one in samples]
        write(self.path(policy, task), {"policy": policy, "task": task, "results": dict(results), "samples": short})


def trimmed(value: Any) -> Any:
    return {name: value[name] for name in KEPT if name in value} if isinstance(value, dict) else value


def write(path: Path, data: Any) -> None:
    """A whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(json.dumps(data) + "\n", encoding="utf-8")
    fresh.replace(path)
