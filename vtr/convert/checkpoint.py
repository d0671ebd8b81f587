"""A checkpoint folder's tensors: one file or shards, safetensors or torch's .bin; nothing in them is ever executed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

NAMES = ("model.safetensors", "pytorch_model.bin")
SHOWN = 20
"""How many tensors a message lists before it counts the rest."""


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint folder: it holds no config.json")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings")
    return config


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name, on the CPU in their own dtypes (memory-mapped where the file allows).

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is not there.
        ValueError: a file is cut off or no weights file, or shards and index do not say the same tensors.
    """
    files, index = _files(folder)
    state: dict[str, torch.Tensor] = {}
    for path in tqdm(files, desc="reading", unit="file", disable=len(files) < 2):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though the index of {folder} names it: download it as well")
        found = _read(path)
        if twice := sorted(found.keys() & state.keys()):
            raise ValueError(f"{path} has tensors that another file has too: {listed(twice)}")
        state |= found
    if index is not None and (wrong := sorted(set(index) ^ set(state))):
        raise ValueError(f"index and shards of {folder} do not hold the same tensors: {listed(wrong)}")
    return state


def _files(folder: Path) -> tuple[list[Path], list[str] | None]:
    """The weight files, and the tensors that an index says are in them."""
    for name in NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                where: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is no index of shards: it needs a weight_map") from error
            if bad := sorted(file for file in set(where.values()) if Path(file).name != file):
                raise ValueError(f"{index} names files outside of its folder: {listed(bad)}")
            return [folder / file for file in sorted(set(where.values()))], list(where)
        if (folder / name).is_file():
            return [folder / name], None
    wanted = " or ".join([*NAMES, *(f"{name}.index.json with shards" for name in NAMES)])
    raise FileNotFoundError(f"{folder} holds no weights: it needs {wanted}")


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}): download it again") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as weights alone ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise ValueError(f"{path} holds something else than named tensors")
    return found


def listed(names: list[str]) -> str:
    """Names for a message: all of them, or the first and how many more."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
