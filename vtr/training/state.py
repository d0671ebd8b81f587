"""What a training run leaves to go on from: its last whole state, what kind of run it was, and its log up to there.

All of it is written so that a process killed at any moment leaves the state before or the state after, never a half.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

FREE = ("save_every",)
"""Settings that a run may go on with changed: nothing that is learnt depends on them."""
SAMPLED = 16
DIGEST = "sha256:"


@torch.no_grad()
def digest(named: Iterable[tuple[str, Any]]) -> str:
    """Of names, and of a few values of each tensor (other values as they are)."""
    found = hashlib.sha256()
    for name, value in named:
        found.update(name.encode())
        if not isinstance(value, torch.Tensor):
            found.update(repr(value).encode())
            continue
        found.update(str(list(value.shape)).encode())
        if value.device.type != "meta" and value.numel():
            flat = value.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED]
            found.update(some.double().cpu().numpy().tobytes())
    return DIGEST + found.hexdigest()[:16]


def identity(objective: Any, batches: Any, settings: Any, processes: int, also: dict[str, Any]) -> dict[str, Any]:
    """All that a run depends on, as JSON data; called once it is settled which parameters learn.

    Args:
        also: what else the caller knows, such as a digest of the samples' files.
    """
    said = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}
    said |= {"objective": type(objective).__name__, "policy": objective.policy.spec, "processes": processes}
    said |= {
        name: getattr(objective, name) for name in ("text_keep", "min_answer", "weight") if hasattr(objective, name)
    }
    if isinstance(batches, DataLoader):
        said |= {"batch": batches.batch_size, "batches": len(batches), "order": type(batches.sampler).__name__}
        if hasattr(batches.dataset, "__len__"):
            said["samples"] = len(batches.dataset)
    else:
        said["batches"] = len(batches)
        if isinstance(batches, list):
            tensors = ((f"{i}.{name}", t) for i, batch in enumerate(list(batches)) for name, t in batch.items())
            said["data"] = digest(tensors)
    parameters = list(objective.named_parameters())
    said["what learns"] = digest((name, list(p.shape)) for name, p in parameters if p.requires_grad)
    said["what stays as it is"] = digest((name, p) for name, p in parameters if not p.requires_grad)
    return json.loads(json.dumps(said | also))


def resume(folder: Path, said: dict[str, Any]) -> tuple[int, Path | None]:
    """The steps already done, and the state to load; (0, None) if there is none. Nothing is changed.

    Raises:
        ValueError: the state is of a run with other settings (each is named), or is damaged.
    """
    at = folder / "state" / "at.json"
    away = f"choose another folder, or move {folder / 'state'} away to begin anew"
    if not at.is_file():
        return 0, None
    try:
        note = json.loads(at.read_text(encoding="utf-8"))
        step, before = int(note["step"]), dict(note["run"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{at} does not say what run it is of (damaged, or of an older version): {away}") from error
    if other := [_differing(name, before, said) for name in {**before, **said} if before.get(name) != said.get(name)]:
        raise ValueError(
            f"{folder} holds a run that is not the same: {'; '.join(other)}. Give the same to go on; or {away}"
        )
    state = folder / "state" / f"step-{step}"
    if not state.is_dir():
        raise ValueError(f"{state} is not there, though {at} names it: {away}")
    return step, state


def _differing(name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    old, new = before.get(name), now.get(name)
    if any(isinstance(value, str) and value.startswith(DIGEST) for value in (old, new)):
        return f"{name} differs"
    return f"{name} {old!r} there, {new!r} here"


def cut_log(path: Path, step: int) -> None:
    """Leave the log's lines up to ``step``: those behind are written again, and the last may be half a line."""
    if not path.is_file():
        return
    lines, kept = path.read_bytes().splitlines(keepends=True), []
    for line in lines:
        try:
            number = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if number > step or not line.endswith(b"\n"):
            break
        kept.append(line)
    if kept != lines:
        replace(path, b"".join(kept))


def save(folder: Path, step: int, said: dict[str, Any], write: Callable[[Path], Any], main: bool, wait: Any) -> None:
    """A whole state, then the note that it is the one to go on from, then the states before it go.

    Args:
        write: puts a state into a folder; called by all processes. main: whether this one does the rest. wait: for all.
    """
    state = folder / "state" / f"step-{step}"
    if main:
        shutil.rmtree(state, ignore_errors=True)  # half of one, from a process that was killed
    wait()
    write(state)
    wait()
    if main:
        replace(folder / "state" / "at.json", json.dumps({"step": step, "run": said}, indent=1).encode())
        for old in (folder / "state").glob("step-*"):
            if old != state:
                shutil.rmtree(old)
    wait()


def replace(path: Path, content: bytes) -> None:
    """Write a file whole: who reads it sees the old one or the new one."""
    fresh = path.with_name(path.name + ".part")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def publish(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a folder beside this one, then give its files their names here, each at once."""
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    write(fresh)
    if not folder.exists():
        fresh.rename(folder)
        return
    for file in sorted(fresh.iterdir()):
        os.replace(file, folder / file.name)
    fresh.rmdir()
