"""What every reader of files that come from strangers needs.

Such a file says sizes, names and numbers. Each is checked before anything is made of it, so that a broken or hostile
file costs no more time and memory than its own length; whatever is wrong with one is a ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LONGEST = 8 * 2**20
"""Bytes that a JSON file may have; the longest written here has 0.1 MB."""
LONGEST_HEADER = 2**20
"""Bytes that say which tensors a safetensors file has: some thousands of them."""
WRONG = (TypeError, ArithmeticError, LookupError, AttributeError, RecursionError, OSError)
"""What settings of wrong types raise, besides ValueError, where they are used."""


def read_json(path: str | Path, what: str, most: int = LONGEST) -> Any:
    """What a JSON file holds.

    Args:
        what: "a schedule", for messages. most: bytes it may have.

    Raises:
        FileNotFoundError: no such file (a folder or a pipe is none).
        ValueError: it is longer, not UTF-8, not JSON, or nested too deeply to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {path}")
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"{path} is not {what}: it has more than {most} bytes")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{path} is not {what}: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not {what}: not JSON in UTF-8 ({error})") from error


def read_header(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file without their values: on the meta device.

    Raises:
        ValueError: not a whole safetensors file.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
    with path.open("rb") as raw:
        if int.from_bytes(raw.read(8), "little") > LONGEST_HEADER:
            raise ValueError(f"{path} is no whole safetensors file of a policy's weights: its header is too long")
    try:
        with safe_open(str(path), "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: torch.empty(part.get_shape(), dtype=kinds[part.get_dtype()], device="meta")
                for name, part in parts.items()
            }
    except (SafetensorError, RuntimeError, *WRONG, ValueError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): copy or download it again") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: not a whole safetensors file, or not all values are finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): copy or download it again") from error
    check_finite(found)
    return found


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError if a value is NaN or infinite, naming the tensors that hold such values."""
    if wrong := sorted(name for name, t in tensors.items() if not bool(t.isfinite().all())):
        raise ValueError(f"NaN or infinite values in {', '.join(wrong)}: such weights cannot be used")


def check_int(value: Any, name: str, least: int, most: int) -> int:
    """``value``, an int in [least, most].

    Raises:
        ValueError: it is something else (a bool is no int).
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={echo(value)} must be a whole number from {least} to {most}")
    return value


def told(error: BaseException) -> str:
    """What an error says, in words and at most 500 characters."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:500]


def echo(value: Any) -> str:
    """``repr`` of a value from outside, at most 80 characters of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, a list of lists of lists …
        text = type(value).__name__
    return text if len(text) <= 80 else text[:79] + "…"
