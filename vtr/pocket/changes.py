"""Weights in about a byte a number, and a model kept as what training changed of another one.

:func:`pack` and :func:`unpack` write and read a dict of tensors. The rest turns whole checkpoints of the pocket models
into changes and back; a folder of changes has the config and the processor of a whole one, and :data:`FILE` instead of
its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtr.files import check_finite, read_tensors

FILE = "changes.safetensors"
WHOLE = "model.safetensors"
"""The weights of a whole checkpoint."""
SCALE, MOST = ".scale", 127
HALF_STEP = 2.0**-25
"""Half of the smallest float16 above zero: with it a scale that is smaller than float16 can say is rounded up."""


# -- tensors in a file -------------------------------------------------------------------------------------------------
def pack(weights: Mapping[str, Tensor], path: Path, notes: dict[str, str] | None = None) -> None:
    """Write weights: matrices as int8 with one float16 scale a row (``name`` and ``name.scale``), vectors as float32.

    A number of a matrix is off by up to half a scale, which is 1/254 of the largest number of its row.

    Args:
        weights: floating-point tensors by name. Of one with more than two dimensions the first counts its rows.
        notes: what else the file is to say.

    Raises:
        ValueError: a value is NaN, infinite or above 127 times what float16 can say, or a name ends in ".scale".
            Nothing is written then.
    """
    from safetensors.torch import save_file

    if wrong := sorted(name for name in weights if name.endswith(SCALE)):
        raise ValueError(f"{', '.join(wrong)}: names that end in {SCALE} are those of scales; name them otherwise")
    check_finite(weights)
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        weight = weight.detach().float()
        if weight.ndim < 2:
            stored[name] = weight.clone()
            continue
        rows = weight.flatten(1).contiguous()
        scale = (rows.abs().amax(1) / MOST + HALF_STEP).half()
        stored[name + SCALE] = scale
        steps = rows / scale.float().clamp(min=HALF_STEP)[:, None]
        stored[name] = steps.round().clamp(-MOST, MOST).to(torch.int8).view(weight.shape)
    check_finite(stored)
    save_file(stored, str(path), notes)


def unpack(path: Path) -> dict[str, Tensor]:
    """What :func:`pack` wrote, in float32.

    Raises:
        FileNotFoundError: no such file. ValueError: it is not whole, or a matrix has no scale for each row.
    """
    stored = read_tensors(path)
    found = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            scale = stored.get(name + SCALE)
            if tensor.ndim < 2 or scale is None or scale.shape != tensor.shape[:1]:
                raise ValueError(f"{path}: {name} is int8 without a scale for each row; write it with changes.pack")
            tensor = (tensor.flatten(1).float() * scale.float()[:, None]).view(tensor.shape)
        elif name.endswith(SCALE):
            continue
        found[name] = tensor.float()
    return found


# -- a model on top of another -----------------------------------------------------------------------------------------
def of(trained: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What training changed: ``trained`` − ``base`` in float32, of the tensors that differ.

    A table may have got rows behind those of ``base``: they are changes of zeros.

    Raises:
        ValueError: other names, or other shapes.
    """
    changed = {name: weight for name, weight in trained.items() if not _same(weight, base.get(name))}
    _check(changed, base)
    if gone := sorted(base.keys() - trained.keys()):
        raise ValueError(f"{', '.join(gone)}: in the base but not in what was trained on from it")
    return {name: weight.float() - _grown(base[name], len(weight)) for name, weight in changed.items()}


def put_on(base: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of ``base`` with changes added, in float32.

    Raises:
        ValueError: changes of tensors that ``base`` does not have, or has in other shapes.
    """
    _check(changes, base)
    changed = {name: _grown(base[name], len(change)) + change for name, change in changes.items()}
    return {name: weight.float() for name, weight in base.items()} | changed


def _check(changed: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    wrong = [
        name
        for name, weight in changed.items()
        if name not in base or base[name].shape[1:] != weight.shape[1:] or len(base[name]) > len(weight)
    ]
    if wrong:
        raise ValueError(f"{', '.join(sorted(wrong))}: the base has no such tensors to be changed, or of other shapes")


def _same(weight: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(weight, other)


def _grown(weight: Tensor, rows: int) -> Tensor:
    """``weight`` in float32, with rows of zeros behind its own up to ``rows``."""
    return torch.cat([weight.float(), weight.new_zeros(rows - len(weight), *weight.shape[1:], dtype=torch.float32)])


# -- checkpoints -------------------------------------------------------------------------------------------------------
def leave_only(folder: Path, base: Path) -> None:
    """Keep of a whole checkpoint in ``folder`` what it changed of the one in ``base``, and delete its weights.

    Raises:
        ValueError: as :func:`of`; the folder stays as it is then.
    """
    changes = of(read_tensors(folder / WHOLE), read_tensors(base / WHOLE))
    pack(changes, folder / FILE, {"base": _digest(base)})
    (folder / WHOLE).unlink()


def load_model(folder: Path, base: Path, **how: Any) -> Any:
    """The model whose changes are in ``folder``.

    Args:
        base: the folder of the whole checkpoint that they are changes of. how: for transformers' ``from_pretrained``.

    Raises:
        FileNotFoundError: no changes. ValueError: they are not whole, or of another checkpoint.
    """
    from safetensors import safe_open
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, GenerationConfig

    changes = unpack(folder / FILE)
    with safe_open(str(folder / FILE), "pt") as file:
        noted = (file.metadata() or {}).get("base")
    if noted != _digest(base):
        raise ValueError(f"{folder / FILE} holds changes of another {WHOLE} than {base / WHOLE}: train it again")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model = kind.from_pretrained(None, config=config, state_dict=put_on(read_tensors(base / WHOLE), changes), **how)
    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / WHOLE).read_bytes()).hexdigest()
