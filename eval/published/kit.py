"""lmms-eval, started for a policy and its tasks: the command line, the run, what it wrote.

A run is one process (or one launch of several) for a policy, and all tasks of it that are missing: the model is loaded
once. What it has answered is kept as it goes (``answers`` of :mod:`vtr.integrations.lmms_eval`), so one that was broken
off goes on where it was.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtr.eval.published.cells import slug

from vtr.files import read_json

LONGEST = 2**26
OWN, TASKS = "vtr_", Path(__file__).with_name("tasks")
"""What the names of our own tasks begin with, and where they lie: lmms-eval finds them by ``--include_path``."""
MISSING = (
    "lmms-eval is not installed: pip install 'lmms-eval>=0.7.3' 'filelock<4' datasets loguru accelerate (from a clone: "
    "pip install -e '.[eval]'). What would be run: --dry-run"
)


@dataclass(frozen=True)
class Launch:
    """How lmms-eval is started."""

    model: str
    folder: Path
    batch_size: int = 8
    processes: int = 1
    device: str | None = None
    dtype: str = "auto"
    limit: int | None = None
    include: Path | None = None


@dataclass(frozen=True)
class Job:
    """One start: a policy's spec, and tasks."""

    policy: str
    tasks: tuple[str, ...]


def check(launch: Launch, tasks: Iterable[str] = ()) -> None:
    """Raise unless the options go together.

    Raises:
        ValueError: a name that lmms-eval would cut in two, a device beside several processes, or a folder of tasks that
            lacks ours where they are needed (lmms-eval takes one folder).
    """
    for name, value in (("--model", launch.model), ("--out", str(launch.folder)), ("--device", launch.device or "")):
        if "," in value:
            raise ValueError(f"{name} {value}: lmms-eval splits its arguments at commas: use a name without")
    if launch.processes > 1 and launch.device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device {launch.device}: several processes take a GPU each: leave it out, or set CUDA_VISIBLE_DEVICES"
        )
    missing = [task for task in tasks if task.startswith(OWN) and launch.include is not None]
    if launch.include is not None and any(not (launch.include / f"{task}.yaml").exists() for task in missing):
        raise ValueError(
            f"--include-path {launch.include}: lmms-eval takes one folder of tasks, and {', '.join(missing)} must be "
            f"in it too: copy the files of {TASKS} there"
        )


def check_installed() -> None:
    """Raise RuntimeError unless lmms-eval is there."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise RuntimeError(MISSING)


def folder_of(launch: Launch, job: Job) -> Path:
    return launch.folder / "runs" / slug(job.policy)


def arguments(launch: Launch, job: Job) -> list[str]:
    """What stands behind ``lmms_eval``."""
    folder = folder_of(launch, job)
    model = [f"pretrained={launch.model}", f"policy={job.policy.replace(',', ';')}", f"answers={folder / 'answers'}"]
    model += [f"dtype={launch.dtype}"] if launch.dtype != "auto" else []
    model += [f"device={launch.device}"] if launch.device and launch.processes == 1 else []
    words = ["--model", "vtr", "--model_args", ",".join(model), "--tasks", ",".join(job.tasks)]
    words += ["--batch_size", str(launch.batch_size), "--log_samples", "--output_path", str(folder)]
    words += ["--limit", str(launch.limit)] if launch.limit else []
    include = launch.include or (TASKS if any(task.startswith(OWN) for task in job.tasks) else None)
    return words + (["--include_path", str(include)] if include else [])


def environment(launch: Launch) -> dict[str, str]:
    """What is set beside the present environment."""
    return {"ACCELERATE_USE_CPU": "true"} if launch.device == "cpu" else {}


def several(launch: Launch) -> list[str]:
    return ["--multi_gpu", "--num_processes", str(launch.processes)] if launch.processes > 1 else []


def spelled(launch: Launch, job: Job) -> str:
    """The command line, to be typed or put into a script."""
    start = ["accelerate", "launch", *several(launch)] if launch.processes > 1 else ["python"]
    words = [f"{name}={value}" for name, value in environment(launch).items()]
    return shlex.join([*words, *start, "-m", "lmms_eval", *arguments(launch, job)])


def run(launch: Launch, job: Job) -> None:
    """Start lmms-eval and wait for it.

    Raises:
        RuntimeError: it has not ended with results; says where its log is.
    """
    folder = folder_of(launch, job)
    folder.mkdir(parents=True, exist_ok=True)
    start = [sys.executable, *(["-m", "accelerate.commands.launch", *several(launch)] if launch.processes > 1 else [])]
    before = results_in(folder)
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*start, "-m", "lmms_eval", *arguments(launch, job)], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, **environment(launch)},
        )  # fmt: skip
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if results_in(folder) == before:  # lmms-eval ends with status 0 after an error too
        raise RuntimeError(f"lmms-eval gave no results (status {status}): {last_error(log)}; its log: {log}")


def results_in(folder: Path) -> set[Path]:
    """The results files of lmms-eval: a date in front; its tasks write files of such names too."""
    return {path for path in folder.rglob("*_results.json") if re.fullmatch(r"[\d_]+_results\.json", path.name)}


def last_error(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or "error:" in line.lower()]
    return (named or lines or ["it wrote nothing"])[-1][:300]


def found(
    launch: Launch, policy: str, tasks: Iterable[str]
) -> dict[str, tuple[dict[str, float], list[dict[str, Any]]]]:
    """What lies in a policy's folder of these tasks, whoever started the run: task → (results by metric, samples).

    Of several runs the latest; none with another model, precision or limit.
    """
    out: dict[str, tuple[dict[str, float], list[dict[str, Any]]]] = {}
    paths = results_in(folder_of(launch, Job(policy, ())))
    for path in sorted(paths, key=lambda one: one.stat().st_mtime_ns, reverse=True):
        data = read_json(path, "a results file of lmms-eval", LONGEST)
        if not is_of(launch, policy, data.get("config", {})):
            continue
        for task in tasks:
            samples = path.with_name(path.name.replace("_results.json", f"_samples_{task}.jsonl"))
            if task not in out and task in data.get("results", {}) and samples.exists():
                out[task] = by_metric(data["results"][task]), read_lines(samples)
    return out


def is_of(launch: Launch, policy: str, config: dict[str, Any]) -> bool:
    """Whether a run's configuration, as lmms-eval notes it, is the one that is asked for."""
    told = str(config.get("model_args", "")).split(",")
    own = arguments(launch, Job(policy, ("",)))[3].split(",")
    same = {one for one in told if one.partition("=")[0] != "device"} == {
        one for one in own if one.partition("=")[0] != "device"
    }
    return same and float(config.get("limit") or 0) == float(launch.limit or 0)


def by_metric(raw: dict[str, Any]) -> dict[str, float]:
    """``{"exact_match,none": 0.6, "alias": …}`` → ``{"exact_match": 0.6}``: numbers of the first filter."""
    out: dict[str, float] = {}
    for name, value in raw.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in name:
            out.setdefault(name.partition(",")[0], float(value))
    return out


def read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def commands(launch: Launch, jobs: Sequence[Job]) -> list[str]:
    """All command lines, in order."""
    return [spelled(launch, job) for job in jobs]
