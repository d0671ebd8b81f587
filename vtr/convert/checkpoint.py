"""A checkpoint folder's tensors: one file or shards, safetensors or torch's .bin; nothing in them is ever executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vtr.convert.settings import read_json

NAMES = ("model.safetensors", "pytorch_model.bin")
ENDINGS = (".safetensors", ".bin")
KNOWN = (torch.float32, torch.float16, torch.bfloat16)
SHOWN = 20
"""How many tensors a message lists before it counts the rest."""

State = dict[str, torch.Tensor]


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint folder: it holds no config.json")
    return read_json(path)


def has_tensors(folder: Path) -> bool:
    """Whether a folder holds weights that :func:`read_tensors` would look for."""
    return any((folder / (name + end)).is_file() for name in NAMES for end in ("", ".index.json"))


def read_tensors(folder: Path) -> State:
    """All tensors of a checkpoint, by name, on the CPU in their own dtypes (memory-mapped where the file allows).

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is not there.
        ValueError: a file is cut off or no weights file, or shards and index do not say the same tensors.
    """
    files, index = _files(folder)
    if missing := [path for path in files if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} is missing, though the index of {folder} names it: download it as well")
    state: State = {}
    for path in tqdm(files, desc="reading", unit="file", disable=len(files) < 2):
        found = read_file(path)
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
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
                raise ValueError(f"{index} is no index of shards: it needs a weight_map of tensors' names to files")
            files = sorted(set(where.values()))
            if bad := [file for file in files if Path(file).name != file or "\\" in file or file == ".."]:
                raise ValueError(f"{index} names files outside of its folder: {listed(bad)}")
            if bad := [file for file in files if not file.endswith(ENDINGS)]:
                raise ValueError(f"{index} names files that are no {' or '.join(ENDINGS)}: {listed(bad)}")
            return [folder / file for file in files], list(where)
        if (folder / name).is_file():
            return [folder / name], None
    wanted = " or ".join([*NAMES, *(f"{name}.index.json with shards" for name in NAMES)])
    raise FileNotFoundError(f"{folder} holds no weights: it needs {wanted}")


def read_file(path: Path) -> State:
    """The tensors of one .safetensors or .bin file.

    Raises:
        ValueError: it is neither, is cut off, or holds something else than named tensors with values.
    """
    try:
        found = _load(path)
    except Exception as error:  # readers of broken files raise anything
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} is no whole safetensors file ({said}): download it again") from error
        raise ValueError(f"{path} cannot be read as weights alone ({said}): download it again") from error
    if not isinstance(found, dict) or not all(
        isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in found.items()
    ):
        raise ValueError(f"{path} holds something else than named tensors")
    if not found:
        raise ValueError(f"{path} holds no tensors")
    if odd := [n for n, t in found.items() if t.layout != torch.strided or t.is_quantized or t.device.type != "cpu"]:
        raise ValueError(f"{path} has tensors that are sparse, quantized or without values: {listed(odd)}")
    return {name: tensor.detach() for name, tensor in found.items()}


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(path))
    return torch.load(path, map_location="cpu", weights_only=True)


def check_numbers(state: State) -> None:
    """Raise ValueError for tensors that are no floats of 16 or 32 bits, or hold NaN or infinity (they are listed)."""
    if odd := [f"{name} ({str(t.dtype).removeprefix('torch.')})" for name, t in state.items() if t.dtype not in KNOWN]:
        raise ValueError(
            f"weights must be float16, bfloat16 or float32, not quantized or of another kind: {listed(odd)}; take the "
            "checkpoint that was trained, before it was quantized"
        )
    if bad := [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(f"these weights hold NaN or infinity, so the checkpoint is broken: {listed(bad)}")


def listed(names: list[str]) -> str:
    """Names for a message: all of them, or the first and how many more."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
