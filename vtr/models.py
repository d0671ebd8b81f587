"""Loading a model by name: a pocket model, a folder, or a name of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vtr import pocket
from vtr.engine.install import patch
from vtr.limits import similar

DTYPES = ("float32", "bfloat16", "float16")
OFFLINE = f"without a download there are {', '.join(pocket.SHIPPED_NAMES)}"


def load(name: str | None, device: str, dtype: str | None = None) -> tuple[Any, Any]:
    """A pocket model, or any checkpoint transformers can load, patched and in evaluation mode.

    Args:
        name: a folder or hub name, or one of ``vtr.pocket.NAMES``; None is "pocket". device: "auto" is cuda where there
            is one.
        dtype: "float32", "bfloat16" or "float16"; None is float32 on the CPU and for pocket models, else the
            checkpoint's own.

    Raises:
        ValueError: a checkpoint that is not there, not built, cut short, or of no image-text model; an unknown dtype; a
            device that this machine does not have.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r}{similar(str(dtype), DTYPES)}: choose one of {', '.join(DTYPES)}")
    device = find_device(device)
    check_name(name)
    wanted = None if dtype is None else getattr(torch, dtype)
    if name is None or name in pocket.NAMES:
        model, processor = pocket.load(pocket.NAMES[name or "pocket"], wanted)
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        with _readable(name):
            chosen = wanted or (torch.float32 if device == "cpu" else "auto")
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=chosen).eval()
            processor = AutoProcessor.from_pretrained(name)
    return patch(model.to(device)), processor


def skeleton(name: str) -> Any:
    """A patched model without weights, of its config alone (a pocket model with its weights): to be described.

    Args:
        name: a folder or hub name, or one of ``vtr.pocket.NAMES``.

    Raises:
        ValueError: as :func:`load`. UnsupportedError: a model that vtr cannot run.
    """
    check_name(name)
    if name in pocket.NAMES:
        return load(name, "cpu")[0]
    from transformers import AutoConfig, AutoModelForImageTextToText

    with _readable(name), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name))
    return patch(model)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Errors of transformers while it reads a checkpoint, in a sentence.

    Raises:
        ValueError: it is not complete, or of no image-text model.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"cannot load {name}: {reason} — it must be a complete checkpoint of an image-text model with its "
            "processor (a family that `vtr list` shows); if a file was cut short, fetch it again"
        ) from error


# -- devices -----------------------------------------------------------------------------------------------------------
def find_device(name: str) -> str:
    """``name``, or for "auto" the best device there is.

    Raises:
        ValueError: no device's name, or a device that this machine does not have; the message says which it has.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = devices()
    choose = f"choose {there[0]}" if len(there) == 1 else f"choose one of {', '.join(there)}"
    try:
        asked = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is no device: {choose}") from error
    if not _is_there(asked):
        raise ValueError(f"device={name!r}: PyTorch finds no such device on this machine; {choose}")
    return name


def devices() -> list[str]:
    """The devices of this machine: "cpu", then "cuda:0" …, "mps", "xpu:0" … where PyTorch finds them."""
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    xpu = getattr(torch, "xpu", None)
    return ["cpu", *gpus, *mps, *(f"xpu:{n}" for n in range(xpu.device_count() if xpu and xpu.is_available() else 0))]


def _is_there(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    if device.type in ("cuda", "mps", "xpu"):
        return any(one == str(device) or one.split(":")[0] == str(device) for one in devices())
    try:  # an accelerator that PyTorch knows by a plugin
        torch.empty(1, device=device)
    except Exception:  # each kind of device says so in its own way
        return False
    return device.type != "meta"


# -- names -------------------------------------------------------------------------------------------------------------
def check_name(name: str | None, what: str = "model", owner: bool = True) -> None:
    """Raise ValueError where no checkpoint can be meant by ``name``, before anything is loaded or long waited for.

    Args:
        name: a folder, a hub name, a pocket model's, or None for the default.
        owner: a name without a slash cannot be the hub's (true of image-text models, not of old language models).
    """
    if name == pocket.pretrained.NAME:
        pocket.pretrained.built()
    if name is None or name in pocket.NAMES:
        return
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"cannot load {name}: the folder holds no config.json, so it is no checkpoint")
        return
    if folder.exists():
        raise ValueError(f"cannot load {name}: it is a file; name the folder of a checkpoint")
    hint = similar(name, pocket.NAMES)
    parts = name.split("/")
    if len(parts) > 2 or parts[0] in ("", ".", "..", "~") or (len(parts) == 1 and (owner or hint)):
        wanted = "there is no such folder" + ("" if len(parts) > 1 else ", and a name of the hub is OWNER/NAME")
        raise ValueError(f"cannot load {what} {name}{hint}: {wanted}; {OFFLINE}")
    if (reason := _not_on_hub(name)) is not None:
        raise ValueError(f"cannot load {what} {name}{hint}: there is no such folder here, and {reason}; {OFFLINE}")


def _not_on_hub(name: str) -> str | None:
    """Why the hub's model of this name cannot be had; None if it can, or is here already. Asks once, without retries:
    transformers would try for most of a minute."""
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str) or file_exists(name, "config.json"):
            return None
        return "the Hugging Face hub has none (or it is private: `hf auth login`)"
    except HFValidationError:
        return "it cannot be a name of the hub (OWNER/NAME)"
    except GatedRepoError:
        return "the hub shows it only to those who accepted its terms (`hf auth login`)"
    except Exception as error:  # no network, a proxy, offline mode: each has an exception of its own
        return f"the Hugging Face hub cannot be reached ({type(error).__name__})"
