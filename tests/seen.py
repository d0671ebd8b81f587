"""Images as policies see them, made of given numbers: for fixtures that begin behind the vision tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout

from vtr.image import Image, Layout, Tower, arrange


def _missing(*args: Any) -> Any:
    raise AssertionError("the policy asked for something that this fixture does not have")


@dataclass
class GivenTower(Tower):
    """A tower whose answers are given, each by the layer it is asked of (None: the one in use)."""

    states: Mapping[Any, Tensor] = field(default_factory=dict)
    """[tiles, n, width]"""
    cls: Mapping[Any, Tensor] = field(default_factory=dict)
    """[tiles, width]"""
    from_cls: Mapping[Any, Tensor] = field(default_factory=dict)
    """[tiles, heads, n]"""
    received: Mapping[Any, Tensor] = field(default_factory=dict)
    """[tiles, n]"""
    key: Mapping[Any, Tensor] = field(default_factory=dict)
    """[tiles, 1 + n, heads, head_dim]"""
    query: Mapping[Any, Tensor] = field(default_factory=dict)
    """[tiles, heads, head_dim]"""
    projector: Callable[[Tensor], Tensor] = _missing
    norm: Callable[[Tensor], Tensor] = _missing
    with_cls: bool = True

    @property
    def has_cls(self) -> bool:
        return self.with_cls

    def hidden_states(self, layer: int | None = None) -> Tensor:
        return self.states[layer]

    def cls_state(self, layer: int | None = None) -> Tensor:
        return self.cls[layer]

    def attention_from_cls(self, layer: int | None = None) -> Tensor:
        return self.from_cls[layer]

    def attention_received(self, layer: int | None = None) -> Tensor:
        return self.received[layer]

    def keys(self, layer: int | None = None) -> Tensor:
        return self.key[layer]

    def cls_query(self, layer: int | None = None) -> Tensor:
        return self.query[layer]

    def project(self, states: Tensor) -> Tensor:
        return self.projector(states)

    def final_norm(self, states: Tensor) -> Tensor:
        return self.norm(states)


def seen(tiles: Tensor, layout: Layout | None = None, tower: Tower | None = None, newline: Tensor | None = None,
         question: Tensor | None = None) -> Image:  # fmt: skip
    """The image whose tiles are these after the projector, [tiles, n, hidden_size]; square, if no layout is given.

    One that has no layout must be a single tile.
    """
    if layout is None:
        (_, n, _), side = tiles.shape, int(tiles.shape[1] ** 0.5)
        layout = tile_layout(side, side) if side * side == n else tile_layout(1, n)
    if newline is None and bool(layout.newline.any()):
        newline = torch.zeros(tiles.shape[-1])
    return Image(arrange(layout, tiles, newline), layout, 0, 1, tiles, newline, None, tower, question)
