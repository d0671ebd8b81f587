"""The module that runs the decoder layers, and what is read off it once, when the model is patched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtr.base import UnsupportedError
from vtr.engine.positions import many_axes
from vtr.engine.trace import Geometry


@dataclass(frozen=True, eq=False)
class Decoder:
    """The text model of a patched model.

    Attributes:
        text: the module; it has ``.layers``, ``.rotary_emb`` and ``.config``.
        geometry: its sizes.
        windows: the sliding window of every layer, in positions; None where attention is causal over everything.
    """

    text: Any
    geometry: Geometry
    windows: tuple[int | None, ...]

    @classmethod
    def from_text_model(cls, text: Any) -> Decoder:
        """Read it off the module.

        Raises:
            UnsupportedError: layers or positions that the packed engine cannot run.
        """
        made = cls(text, Geometry.from_text_model(text), windows(text))
        if any(made.windows) and many_axes(text.rotary_emb):
            raise UnsupportedError(
                "sliding windows over positions of several axes (M-RoPE) are not supported: load the checkpoint with "
                "use_sliding_window=False in its text config, if it was trained so"
            )
        return made

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return self.geometry.num_hidden_layers


def windows(text: Any) -> tuple[int | None, ...]:
    """The sliding window of every decoder layer, in positions; None where attention is causal over everything.

    Raises:
        UnsupportedError: layers with another kind of attention.
    """
    config, depth = text.config, len(text.layers)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * depth
    if strange := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedError(
            f"{type(text).__name__} has layers with {', '.join(sorted(strange))}, which the packed engine cannot run: "
            "use a model with causal attention (sliding windows are fine)"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
