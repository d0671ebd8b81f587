"""The pocket model that reads demonstrations: the shipped one with some decoder layers trained on.

``vtr.pocket.load("shots")`` loads it; recipe and figures are in ``weights/MODEL_CARD.md``. ``prompts`` draws prompts of
many pictures with remapped labels, ``python -m vtr.pocket.shots --out DIR`` trains it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"
FILE = "layers.safetensors"
"""What ``weights`` holds: the layers that were trained on, in half precision."""
FIRST = 2
"""The first decoder layer that was."""
POSITIONS = 8192
"""It was trained on positions up to here; the model it starts from has half as many."""


def learnt(model: Any) -> dict[str, Any]:
    """The parameters that were trained on, by name."""
    prefix = "model.language_model."
    names = [f"{prefix}layers.{i}." for i in range(FIRST, len(model.model.language_model.layers))]
    return {n: p for n, p in model.named_parameters() if n.startswith((*names, f"{prefix}norm."))}


def put_on(model: Any, processor: Any, folder: Path | None = None) -> None:
    """Make the shipped pocket LLaVA-NeXT the one that reads demonstrations.

    Args:
        folder: with layers of another training; None: those of the package.

    Raises:
        FileNotFoundError: there are none. ValueError: they are not those of this model.
    """
    from safetensors.torch import load_file

    path = (folder or WEIGHTS) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: python -m vtr.pocket.shots --out DIR trains it (DIR/weights)")
    layers = load_file(path)
    if layers.keys() != learnt(model).keys():
        raise ValueError(f"{path} does not hold the layers of this model from {FIRST} on")
    model.load_state_dict(layers, strict=False)
    model.config.text_config.max_position_embeddings = POSITIONS
    processor.tokenizer.model_max_length = POSITIONS
