"""Policies in folders, and what every reader of files that come from strangers needs.

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

    from vtr.base import Policy

CONFIG_NAME = "vtr_policy.json"
WEIGHTS_NAME = "vtr_policy.safetensors"
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


def whole(value: Any, name: str, least: int, most: int) -> int:
    """``value``, an int in [least, most].

    Raises:
        ValueError: it is something else (a bool is no int).
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={_short(value)} must be a whole number from {least} to {most}")
    return value


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Write ``vtr_policy.json`` (and ``vtr_policy.safetensors``, if there are weights) into ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {"policy": policy.name, "settings": policy.config()}
    tensors, about = policy.tensors(), policy.about()
    if about is not None:
        data["weights"] = about
    if tensors:
        from safetensors.torch import save_file

        save_file(tensors, str(folder / WEIGHTS_NAME))
    else:
        (folder / WEIGHTS_NAME).unlink(missing_ok=True)  # of a policy that was there before
    (folder / CONFIG_NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def load_policy(folder: str | Path, allow_mismatch: bool = False) -> Policy:
    """See :meth:`vtr.Policy.from_pretrained`."""
    path, weights = Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; policy.save_pretrained(folder) writes one")
    data = read_json(path, "a policy file")
    if not isinstance(data, dict) or not isinstance(data.get("policy"), str):
        raise ValueError(f'{path} is not a policy file: it needs {{"policy": …, "settings": {{…}}}}')
    name, about = data["policy"], data.get("weights")
    loaded = _built(name, data.get("settings"), path)
    if about is not None and not weights.is_file():
        raise FileNotFoundError(f"{folder} lacks {WEIGHTS_NAME}, the weights of {name!r}: copy it there as well")
    if weights.is_file():
        said = [] if about is None else [about]
        try:
            loaded.expect(read_header(weights), *said)
            loaded.load_tensors(read_tensors(weights), *said)
        except (*WRONG, RuntimeError) as error:
            raise ValueError(f"{folder} does not hold the weights of {name!r}: {_told(error)}") from error
    for part in getattr(loaded, "policies", [loaded]):
        if hasattr(part, "allow_mismatch"):
            part.allow_mismatch = allow_mismatch
            part.folder = str(folder) if part is loaded else None
    return loaded


def _built(name: str, settings: Any, path: Path) -> Policy:
    """The policy that a file's settings make, without its weights."""
    from vtr import settings

    try:
        _check_names_no_file(name, settings)
        return settings.build(name, settings)
    except WRONG as error:
        raise ValueError(f"{path}: settings that {_short(name)} cannot have: {_told(error)}") from error


def _check_names_no_file(name: Any, settings: Any) -> None:
    """Raise ValueError for settings that name other files: a spec string may do that, a file that was sent may not."""
    from vtr.schedule import presets

    if not isinstance(name, str) or not isinstance(settings, dict):
        raise ValueError(f'a policy is {{"policy": name, "settings": {{…}}}}, not {_short(name)}, {_short(settings)}')
    schedule = settings.get("schedule")
    if "weights" in settings or (isinstance(schedule, str) and schedule.lower() not in presets()):
        raise ValueError(f"the settings of {name!r} name another file, which a policy file may not: write it in full")
    for part in settings.get("policies", []) if name == "chain" else []:
        _check_names_no_file(part["policy"], part["settings"])


def _told(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:500]


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, a list of lists of lists …
        text = type(value).__name__
    return text if len(text) <= 80 else text[:79] + "…"
