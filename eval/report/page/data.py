"""Reads result files for the page, and says which file is not one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vtr.eval.report import results

T = TypeVar("T")
LISTS = {
    "eval": "policies", "policies": "rows", "batch": "rows", "scale": "series", "serve": "rows", "engine": "",
    "launches": "rows", "decode": "rows", "peers": "rows",
}  # fmt: skip
"""Kinds the page shows → the list that holds their rows (an engine's result is flat)."""
BASELINES = ("none", "random", "uniform", "pool", "downsample")
"""Policies that anything better than chance has to beat."""


@dataclass(frozen=True)
class Result:
    """One result file."""

    path: Path
    data: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.data["kind"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data[LISTS[self.kind]]

    @property
    def model(self) -> str:
        """The model in words: its name, or its shapes with random weights."""
        model = self.data.get("model", "")
        if isinstance(model, str):
            return model
        parts = [f"{key.replace('_', ' ')} {value}" for key, value in model.items() if isinstance(value, (str, int))]
        text = model.get("text")
        if isinstance(text, dict) and {"num_hidden_layers", "hidden_size"} <= set(text):
            parts.insert(0, f"{text['num_hidden_layers']} layers × {text['hidden_size']}")
        return "random weights, " + ", ".join(parts)

    @property
    def shown(self) -> int:
        """How many questions the rows of an eval are about: all, or those that need the image."""
        data = self.data["data"]
        return data["shown"] if data.get("only_indispensable") else data["samples"]

    @property
    def task(self) -> str:
        """The data in words: "pocket", "pocket listing", or the name of a file or data set."""
        return self.data["data"]["name"].replace(":task=", " ")

    @property
    def machine(self) -> str:
        hardware = self.data["hardware"]
        threads = (
            "" if hardware["device"] == "cuda" else f", {hardware['threads']} thread" + "s" * (hardware["threads"] != 1)
        )
        return f"{hardware['name']}{threads}"


def unreduced(result: Result) -> dict[str, Any] | None:
    """The row of no reduction."""
    return next((row for row in result.rows if row["policy"] == "none"), None)


def files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that ``paths`` name; a folder stands for its JSON files.

    Raises:
        ValueError: no path at all, or a folder without JSON.
    """
    if not paths:
        raise ValueError("no result files: name what `vtr eval` or `vtr bench … --json` wrote, or a folder of them")
    out: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not found:
            raise ValueError(
                f"{path} holds no result files (*.json): name one that `vtr eval` or `vtr bench` wrote into"
            )
        out += found
    return list(dict.fromkeys(out))


def read(path: str | Path) -> Result:
    """One result file that the page can show.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result file, of a kind that has no section, or without rows.
    """
    data = results.load(path)
    kind = data["kind"]
    if kind not in LISTS:
        raise ValueError(f"{path} is of kind {kind!r}, which the page does not show: it shows {', '.join(LISTS)}")
    rows = data.get(LISTS[kind]) if LISTS[kind] else [data]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is of kind {kind} but its {LISTS[kind]!r} is no list with rows: measure it again")
    for key in ("name", "policy", "contender"):
        if strange := [row[key] for row in rows if not isinstance(row.get(key), (str, type(None)))]:
            raise ValueError(f"{path} is of kind {kind} but calls a policy {str(strange[0])[:80]}: measure it again")
    return Result(Path(path), data)


def per_file(make: Callable[[Result], T], found: Iterable[Result]) -> list[T]:
    """``make`` of every result.

    Raises:
        ValueError: a result lacks something, naming its file.
    """
    out = []
    for result in found:
        try:
            out.append(make(result))
        except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise ValueError(f"{result.path} is of kind {result.kind} but {what}: measure it again") from error
    return out
