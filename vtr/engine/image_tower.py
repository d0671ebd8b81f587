"""What one image's policy reads of the vision tower: :class:`vtr.image.Tower` on what hooks have kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vtr.base import UnsupportedError
from vtr.engine.tower import (
    Entered,
    attention_in,
    check_not_turned,
    heads_of,
    is_normed,
    layers_of,
    on_grid,
    tiles_of,
)
from vtr.image import Layer, Layout, Tower

if TYPE_CHECKING:
    from vtr.engine.captures import Captures, Place

CHUNK = 2**24
"""Attention weights that are there at once, where all queries are read."""
CACHED = 2**19
"""The same of one head on a CPU: 2 MB, which its cache can hold."""


@dataclass(frozen=True, eq=False)
class ImageTower(Tower):
    """What the vision tower has of one image: :class:`vtr.image.Tower` on what hooks have kept."""

    captures: Captures
    place: Place
    layout: Layout

    @property
    def has_cls(self) -> bool:
        return self.captures.patch.vision.cls

    def hidden_states(self, layer: Layer = None) -> torch.Tensor:
        return self._patches(self._entered(self._state_index(layer), "hidden_states", layer).states)

    def cls_state(self, layer: Layer = None) -> torch.Tensor:
        states = self._entered(self._state_index(layer), "hidden_states", layer).states
        self._check_cls("state")
        return self._tiles(states)[:, 0]

    @torch.no_grad()
    def attention_from_cls(self, layer: Layer = None) -> torch.Tensor:
        self._check_cls("row of attention")
        return self._once("from_cls", layer, self._from_cls)

    @torch.no_grad()
    def attention_received(self, layer: Layer = None) -> torch.Tensor:
        return self._once("received", layer, self._received)

    @torch.no_grad()
    def keys(self, layer: Layer = None) -> torch.Tensor:
        return self._projected(layer, "k")

    @torch.no_grad()
    def cls_query(self, layer: Layer = None) -> torch.Tensor:
        self._check_cls("query")
        return self._projected(layer, "q")[:, 0]

    def project(self, states: torch.Tensor) -> torch.Tensor:
        captures = self.captures
        if not captures.keeps_projector:
            raise ValueError('the projector is only there for policies that say so: wants = ("projector",)')
        was, captures.open = captures.open, False  # its hook is not to take this for the call's own run
        try:
            projector = captures.patch.vision.projector
            out: torch.Tensor = projector(states[None])[0]
        finally:
            captures.open = was
        captures.flops += _linear_flops(projector, len(states))
        return out

    def final_norm(self, states: torch.Tensor) -> torch.Tensor:
        tower = self.captures.patch.vision.tower
        norm = getattr(getattr(tower, "vision_model", tower), "post_layernorm", None)
        if norm is None:
            raise UnsupportedError(f"{type(tower).__name__} has no post_layernorm: use a policy that needs none")
        out: torch.Tensor = norm(states)
        return out

    # -- attention -------------------------------------------------------------------------------------------------
    def _from_cls(self, index: int, attention: Any) -> torch.Tensor:
        """float32 [tiles, heads, patches]."""
        check_not_turned(self.captures.patch.vision.tower)
        q, k = self._heads(index, attention, "q")[:, 0], self._heads(index, attention, "k")
        logits = torch.einsum("thd,tnhd->thn", q.float(), k.float())
        self.captures.flops += 2 * k.numel()
        return (logits / q.shape[-1] ** 0.5).softmax(-1)[..., self._leading :]

    def _received(self, index: int, attention: Any) -> torch.Tensor:
        """float32 [tiles, patches] or, of an image with a grid of its own, [1, patches]."""
        q, k = (self._heads(index, attention, which).transpose(1, 2).float() for which in "qk")
        at, n = self.captures.entered[index][self.place.run], q.shape[2]
        first, last = self.captures.span(self.place) if at.states.dim() == 2 else (0, n)
        if at.rope is not None:
            cos, sin = (t[first:last].float() for t in at.rope)
            q, k = (t * cos + _turned(t) * sin for t in (q, k))
        edges = [0, n]
        if at.edges is not None:
            edges = sorted({0, n, *(int(e) - first for e in at.edges if first < e < last)})
        spans = list(itertools.pairwise(edges))
        parts = [_columns(q[:, :, a:b], k[:, :, a:b]) for a, b in spans]
        self.captures.flops += sum(2 * q[:, :, 0].numel() * (b - a) ** 2 for a, b in spans)
        return torch.cat(parts, 1)[:, self._leading :]

    def _heads(self, index: int, attention: Any, which: str) -> torch.Tensor:
        """The layer's queries or keys of this image, [tiles, leading + patches, heads, head_dim]; of an image with a
        grid of its own [1, patches, …], not turned."""
        run = self.captures.asked[index][which][self.place.run]
        if self.captures.entered[index][self.place.run].states.dim() == 2:
            first, last = self.captures.span(self.place)
            mine = run.flatten(0, -2)[None, first:last]  # (Pixtral's are a batch of one)
        else:
            mine = self._tiles(run)
        mine = getattr(attention, f"{which}_norm")(mine) if is_normed(attention) else mine
        return mine.unflatten(-1, (heads_of(attention), -1))

    def _projected(self, layer: Layer, which: str) -> torch.Tensor:
        index, attention = self._layer(layer)
        if self.captures.entered[index][self.place.run].rope is not None:
            raise UnsupportedError(
                f"{type(self.captures.patch.vision.tower).__name__} turns queries and keys by where patches are "
                "(rope), so they cannot be compared as they are: use another policy"
            )
        return self._heads(index, attention, which)

    # -- what was kept ---------------------------------------------------------------------------------------------
    @property
    def _leading(self) -> int:
        return self.captures.patch.vision.leading

    def _depth(self) -> int:
        return len(layers_of(self.captures.patch.vision.tower))

    def _state_index(self, layer: Layer) -> int:
        """Which of ``hidden_states`` it is, counted from 0."""
        return state_index(layer, self._depth(), self.captures.features_at)

    def _layer(self, layer: Layer) -> tuple[int, Any]:
        """A layer's number, counted from 0, and its attention, whose queries and keys have been kept."""
        index = attention_index(layer, self._depth(), self.captures.features_at)
        if index not in self.captures.asked:
            raise _unasked("attentions", layer)
        self._entered(index, "attentions", layer)
        return index, attention_in(layers_of(self.captures.patch.vision.tower)[index])

    def _entered(self, index: int, kind: str, layer: Layer) -> Entered:
        runs = self.captures.entered.get(index)
        if runs is None:
            raise _unasked(kind, layer)
        self.captures.check_ran([run.states for run in runs], "vision tower")
        return runs[self.place.run]

    def _once(self, what: str, layer: Layer, make: Callable[[int, Any], torch.Tensor]) -> torch.Tensor:
        """Rows that share an image share what is made of it: [tiles, …, h * w] of the image's tokens."""
        index, attention = self._layer(layer)
        known = self.captures.made
        if (key := (self.place, what, index)) not in known:
            found, at = make(index, attention), self.captures.entered[index][self.place.run]
            lead = found.shape[1:-1]
            patches = self._ordered(found.flatten(1, -2).transpose(1, 2) if lead else found, at.states.dim() == 2)
            known[key] = patches.transpose(1, 2).unflatten(1, lead) if lead else patches
        return known[key].clone()

    def _tiles(self, states: torch.Tensor) -> torch.Tensor:
        """The image's part of a run: [tiles, leading + patches, width]."""
        return tiles_of(states, self.place, self.layout)

    def _patches(self, states: torch.Tensor) -> torch.Tensor:
        """States of a run as those of the image's tokens, [tiles, h * w, width]."""
        if states.dim() == 2:
            first, last = self.captures.span(self.place)
            return self._ordered(states[first:last][None], True)
        return self._ordered(self._tiles(states)[:, self._leading :], False)

    def _ordered(self, patches: torch.Tensor, flat: bool) -> torch.Tensor:
        """What patches have, in the tower's order, as what tokens have: the mean where a token is several patches."""
        if not flat:
            return on_grid(patches, self.layout.grid)
        tokens = self.layout.tiles * self.layout.grid[0] * self.layout.grid[1]
        each = patches[0].unflatten(0, (tokens, -1)).mean(1)
        order = self.captures.order_of(self.place)
        each = each if order is None else each.index_select(0, order.to(each.device))
        return each.unflatten(0, (self.layout.tiles, -1))

    def _check_cls(self, what: str) -> None:
        if not self.has_cls:
            raise UnsupportedError(
                f"{type(self.captures.patch.vision.tower).__name__} has no CLS token, so there is no {what} of one: "
                "attention_received(layer) is there for every tower"
            )


def _unasked(kind: str, layer: Layer) -> ValueError:
    want = kind if layer is None else f"{kind}[{layer}]"
    return ValueError(f'the tower\'s {want} are only there for policies that say so: wants = ("{want}",)')


def state_index(layer: Layer, depth: int, features_at: int) -> int:
    """Which of ``depth`` + 1 ``hidden_states`` is meant, counted from 0; None: the one the model uses."""
    if isinstance(layer, float):
        return max(math.ceil(layer * depth - 1e-9), 1)
    at = features_at if layer is None else layer
    return at if at >= 0 else depth + 1 + at


def attention_index(layer: Layer, depth: int, features_at: int) -> int:
    """Which of ``depth`` layers is meant, counted from 0; None: the one whose output the model uses."""
    if layer is None or isinstance(layer, float):
        return max(state_index(layer, depth, features_at) - 1, 0)
    return layer if layer >= 0 else depth + layer


def _columns(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Attention that each key gets, mean over heads and queries; q, k: [tiles, heads, n, head_dim] → [tiles, n].

    On a CPU head by head, in parts that stay in its cache: three times as fast for a tile of 576 patches.
    """
    tiles, heads, n, size = q.shape
    q, k = (q * size**-0.5).flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
    together, most = (1, CACHED) if q.device.type == "cpu" else (tiles * heads, CHUNK)
    rows = max(most // (together * n), 1)
    found = [
        reduce(add, (torch.matmul(some, keys).softmax(-1).sum(1) for some in queries.split(rows, 1)))
        for queries, keys in zip(q.split(together), k.split(together), strict=True)
    ]
    return torch.cat(found).unflatten(0, (tiles, heads)).mean(1) / n


def _turned(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _linear_flops(module: Any, rows: int) -> int:
    return sum(2 * rows * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
