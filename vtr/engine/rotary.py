"""The rotary embedding of a text model, as each of its layers gets it."""

from __future__ import annotations

import inspect
from typing import Any

import torch

FIXED_ROPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary embeddings that depend on nothing but each position."""


class Rotary:
    """Makes rope anew for positions that have changed.

    Attributes:
        kinds: per layer, the layer type that the rotary embedding takes; None where it makes one rope for all.
        many_axes: whether positions have several axes (M-RoPE).
        why_fixed: why rope cannot be made anew for a layer, so that no policy may renumber positions; None: it can.
    """

    def __init__(self, text: Any, kinds: tuple[str, ...]) -> None:
        self.text = text
        module = text.rotary_emb
        takes = inspect.signature(type(module).forward).parameters
        self.kinds: tuple[str | None, ...] = kinds if "layer_type" in takes else (None,) * len(kinds)
        self.many_axes = many_axes(module)
        self.why_fixed = _why_fixed(text, takes)

    def of(self, kind: str | None, hidden: torch.Tensor, ids: torch.Tensor) -> Any:
        """Rope of layers of this kind at positions ``ids`` (int64 [1 or rows, n], or with several axes in front)."""
        if kind is None:
            return self.text.rotary_emb(hidden, position_ids=ids)
        return self.text.rotary_emb(hidden, ids, kind)

    @property
    def alike(self) -> bool:
        """Whether rope depends on nothing but each position."""
        plain = getattr(self.text.rotary_emb, "rope_type", None) in FIXED_ROPES
        return plain and not self.many_axes and not any(self.kinds)


def many_axes(rotary: Any) -> bool:
    """Whether positions have several axes (M-RoPE)."""
    return getattr(rotary, "mrope_section", None) is not None


def _why_fixed(text: Any, takes: Any) -> str | None:
    if sum("rotary" in type(child).__name__.lower() for child in text.children()) > 1:
        return "its layers have rotary embeddings of their own"
    needed = [name for name, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if unknown := set(needed) - {"self", "x", "hidden_states", "position_ids", "layer_type"}:
        return f"its rotary embedding also takes {', '.join(sorted(unknown))}"
    return None


def cut(rope: Any, index: torch.Tensor) -> Any:
    """Rope of the tokens ``index`` (int64), whatever form it has; None stays None."""
    if rope is None:
        return None
    if isinstance(rope, torch.Tensor):
        return rope.index_select(1, index)
    return tuple(cut(one, index) for one in rope)


def moved(rope: Any, device: torch.device) -> Any:
    """Rope on another device."""
    if rope is None or isinstance(rope, torch.Tensor):
        return None if rope is None else rope.to(device)
    return tuple(moved(one, device) for one in rope)
