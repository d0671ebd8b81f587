"""The pocket model that reads demonstrations: the shipped one with some decoder layers trained on.

``vtr.pocket.load("shots")`` loads it; recipe and figures are in ``weights/MODEL_CARD.md``. ``prompts`` draws prompts of
many pictures with remapped labels, ``python -m vtr.pocket.shots --out DIR`` trains it again.
"""

from __future__ import annotations

from typing import Any

FILE = "layers.safetensors"
"""What ``weights`` holds: the layers that were trained on, in half precision."""
FIRST = 2
"""The first decoder layer that was."""


def learnt(model: Any) -> dict[str, Any]:
    """The parameters that were trained on, by name."""
    prefix = "model.language_model."
    names = {f"{prefix}layers.{i}." for i in range(FIRST, len(model.model.language_model.layers))}
    return {n: p for n, p in model.named_parameters() if n.startswith((*names, f"{prefix}norm."))}
