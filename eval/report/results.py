"""Result files: one JSON object each, that says what was measured, by which command and on what."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from vtr.eval.report.older import renewed

from vtr.files import read_json

Kind = Literal[
    "eval", "policies", "batch", "scale", "engine", "launches", "peers", "quality", "trained", "apart", "serve", "gpu",
    "decode", "fork", "selectors", "shots", "films", "soak", "served", "statistics", "unreduced", "cdpruner", "wrapped",
    "published",
]  # fmt: skip
PACKAGES = ("vision-token-reduction", "torch", "transformers", "numpy")
DIGITS = 8
"""Of numbers in result files."""
NEEDED = ("kind", "command", "hardware", "versions", "seed")


def cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].strip() if names else platform.machine()


def hardware(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What runs: device name, CPU threads torch uses, cores."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name() if kind == "cuda" else cpu_name()
    return {"device": kind, "name": name, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            found[package] = importlib.import_module("vtr" if package == PACKAGES[0] else package).__version__
    return found


def command() -> str:
    """The command line that is running, as one would type it again."""
    program = Path(sys.argv[0])
    # of a package (python -m vtr.eval.peers) or a module (python -m vtr.cli, python -m vtr.eval.studies.films)
    parts = program.with_suffix("").parts
    inside = parts[len(parts) - parts[::-1].index("eval") :] if "eval" in parts else parts[-1:]
    if program.parts[-2:] == ("vtr", "cli.py"):
        name = "vtr"
    elif program.suffix != ".py":
        name = program.name
    else:
        name = "python -m " + ".".join(["vtr.eval", *(part for part in inside if part != "__main__")])
    return " ".join([name, *map(shlex.quote, sys.argv[1:])])


def head(kind: Kind, seed: int, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What every result file says first: the command that is running, and on what.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(get_args(Kind))}")
    return {"kind": kind, "command": command(), "hardware": hardware(device), "versions": versions(), "seed": seed}


def save(
    path: str | Path, kind: Kind, body: Mapping[str, Any], *, seed: int, device: str | torch.device = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Write ``body`` with what it was measured by and on; returns what was written.

    Raises:
        ValueError: an unknown kind.
    """
    data = rounded({**head(kind, seed, device), **body})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")  # a reader never sees half a file
    fresh.write_text(written(data))
    fresh.replace(path)
    return data


def rounded(data: Any) -> Any:
    """Numbers with as many digits as mean something (:data:`DIGITS`), in dicts and lists."""
    if isinstance(data, float):
        return float(f"{data:.{DIGITS}g}")
    if isinstance(data, Mapping):
        return {key: rounded(value) for key, value in data.items()}
    return [rounded(value) for value in data] if isinstance(data, (list, tuple)) else data


def written(data: Mapping[str, Any]) -> str:
    """A result file's text: one thing a line, of a list of rows one row."""
    lines = []
    for name, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save` wrote; an older evaluation as it would be written now (:mod:`vtr.eval.report.older`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result file.
    """
    data = read_json(path, "a result file")
    missing = [key for key in NEEDED if not isinstance(data, dict) or key not in data]
    if missing:
        raise ValueError(f"{path} is not a result file of vtr: it lacks {', '.join(missing)}")
    for key, type_ in (("kind", str), ("hardware", dict), ("versions", dict)):
        if not isinstance(data[key], type_):
            raise ValueError(f"{path} is not a result file of vtr: its {key!r} is {str(data[key])[:80]!r}")
    try:
        return renewed(data)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is an older result of vtr eval, but lacks {error}: measure it again") from error
