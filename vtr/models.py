"""Loading a model by name: a pocket model, a folder, or a name of the hub."""

from __future__ import annotations

from typing import Any

import torch

from vtr import pocket
from vtr.engine.install import patch

DTYPES = ("float32", "bfloat16", "float16")


def load(name: str | None, device: str, dtype: str | None = None) -> tuple[Any, Any]:
    """A pocket model, or any checkpoint transformers can load, patched and in evaluation mode.

    Args:
        name: a folder or hub name, or one of ``vtr.pocket.NAMES``; None is "pocket". device: "auto" is cuda where there
            is one.
        dtype: "float32", "bfloat16" or "float16"; None is float32 on the CPU and for pocket models, else the
            checkpoint's own.

    Raises:
        ValueError: a checkpoint that is not there, cut short, or of no image-text model; an unknown dtype.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = None if dtype is None else getattr(torch, dtype)
    if name is None or name in pocket.NAMES:
        model, processor = pocket.load(pocket.NAMES[name or "pocket"], wanted)
    else:
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            chosen = wanted or (torch.float32 if device == "cpu" else "auto")
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=chosen).eval()
            processor = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ValueError(
                f"cannot load {name}: {reason} — it must be a complete checkpoint of an image-text model with its "
                "processor (a family that `vtr list` shows); if a file was cut short, fetch it again"
            ) from error
    return patch(model.to(device)), processor
