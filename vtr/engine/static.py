"""Decoding with constant shapes: storage that does not grow, and lengths that stay on the device.

After a reduced prefill each row gets one token a step. ``freeze`` then takes the ragged layers over: a step writes each
row's key and value into its next cell, attends over all of the storage under the mask of what is filled, and moves the
cells on. No shape and nothing on the host depends on what is decoded, so that a step can be compiled as one graph, or
captured in a CUDA graph. ``thaw`` gives the rows back to the ragged layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from vtr.base import Token
from vtr.engine.attention import as_numbers, attend_filled
from vtr.engine.cache import RaggedLayer
from vtr.engine.cache_state import Constant
from vtr.engine.call import PIXELS
from vtr.engine.capture import StepGraph
from vtr.engine.decode import as_tensor, each_row, may_forget, memo_on
from vtr.engine.once import from_host
from vtr.engine.rotary import Rotary, moved
from vtr.engine.scores import expanded
from vtr.engine.sight import near
from vtr.engine.trace import Trace


class StaticRaggedCache(DynamicCache):
    """The cache of a reduced ``generate(…, cache_implementation="static")``; ``generate(cache=…)`` goes on with it.

    Attributes:
        constant: what the running ``generate`` wants of it.
    """

    constant: Constant | None = None

    @property
    def is_compileable(self) -> bool:
        return self.constant is not None and self.constant.compiles


@dataclass(eq=False)
class Part:
    """Rows that lie in one dense block of a layer's storage.

    Attributes:
        rows: int64 [b], which of the batch; None: all, in order.
        cells: int64 [b, capacity], where in the storage they lie.
    """

    rows: torch.Tensor | None
    cells: torch.Tensor

    def pick(self, t: torch.Tensor) -> torch.Tensor:
        """[rows, …] → [b, …]."""
        return t if self.rows is None else t.index_select(0, self.rows)


@dataclass(eq=False)
class Frozen:
    """One layer's storage while it decodes.

    Attributes:
        keys, values: [kv_heads, cells, head_dim]. positions: int64 [cells], with a sliding window only.
        parts: see :class:`Part`. order: int64 [rows], from the parts' rows to the batch's; None: as they come.
        on, lengths: on which device, and which of the lengths there, see :class:`Decoding`.
        window: the sliding window, if it will hide anything. stage: which of the positions.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor | None
    parts: list[Part]
    order: torch.Tensor | None
    on: int
    lengths: int
    window: int | None
    stage: int

    def blocks(self, t: torch.Tensor) -> list[torch.Tensor]:
        """By part, [kv_heads, cells, d] → [b, kv_heads, capacity, d]; [cells] → [b, capacity].

        Where a part begins is told by the sizes of tensors, which a compiled step takes for variables.
        """
        if t.dim() == 1:
            split = t.split([part.cells.numel() for part in self.parts])
            return [piece.view(part.cells.shape) for piece, part in zip(split, self.parts, strict=True)]
        split = t.split([part.cells.numel() for part in self.parts], 1)
        return [
            piece.unflatten(1, tuple(part.cells.shape)).transpose(0, 1)
            for piece, part in zip(split, self.parts, strict=True)
        ]


class Decoding:
    """The rows of a ragged cache between a prefill and the end of ``generate``.

    Attributes:
        next: per device, int64 [lengths, rows]: the cell that each row's next token goes to. Layers whose rows are as
            long and lie alike share a line.
        first: per device, int64 [lengths, rows]: each row's first cell.
        offsets: per stage int64 [rows, 1], what to take off the positions; None for nothing.
        asked: policies that may forget, each with its rows.
        said: bool [layers, rows, room], which tokens were remembered; None if none is ever forgotten.
        steps: int64 [1], how many there have been; attended: like ``next``, keys attended to. Kept where ``said`` is.
        flops: what the policies' own matrix products cost a step.
        latents: what the running layer's cache is to hold of the new tokens, where that is no keys and values.
        graph: its steps as a CUDA graph; None before the first, and where they are not captured.
    """

    def __init__(self, layers: list[RaggedLayer], trace: Trace) -> None:
        self.ragged, self.trace, self.state = layers, trace, layers[0].state
        assert self.state.constant is not None
        self.constant, self.rows, self.flops = self.state.constant, len(layers[0].place), 0
        self.graph: StepGraph | None = None
        self.latents: tuple[torch.Tensor, torch.Tensor] | None = None
        self.asked = may_forget(self.state.policies)
        self.next: list[torch.Tensor] = []
        self.first: list[torch.Tensor] = []
        self._devices: list[torch.device] = []
        self._known: dict[Any, tuple[int, list[Part], torch.Tensor | None]] = {}
        self._lines: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        stages = list(dict.fromkeys(map(tuple, self.state.shift)))
        self.layers = [self._frozen(layer, stages.index(tuple(self.state.shift[i]))) for i, layer in enumerate(layers)]
        self.next = [torch.stack(lines) for lines, _ in self._lines]
        self.first = [torch.stack(lines) for _, lines in self._lines]
        device = self._devices[0]
        off = [[d + s for d, s in zip(self.state.dropped, stage, strict=True)] for stage in stages]
        self.offsets = [from_host(by, device)[:, None] if any(by) else None for by in off]
        self.stages, self.spread = len(stages), len(self._devices) > 1
        self.no_mask = self.state.no_mask(device)
        self.said = self.steps = None
        if self.asked:
            self.said = torch.ones(len(layers), self.rows, self.constant.room, dtype=torch.bool, device=device)
            self.steps = torch.zeros(1, dtype=torch.int64, device=device)
        self.attended = [torch.zeros_like(cells) for cells in self.next] if self.asked else []
        if self.constant.compiles:
            self._pin()

    def _frozen(self, layer: RaggedLayer, stage: int) -> Frozen:
        storage = layer.whole_storage()
        device = storage.keys.device
        if device not in self._devices:
            self._devices.append(device)
            self._lines.append(([], []))
        on = self._devices.index(device)
        sizes = tuple((tuple(b.rows), b.keys.shape[2], b.ragged if b.known() is None else tuple(b.known() or ()))
                      for b in layer.buckets)  # fmt: skip
        key = (on, sizes, layer.index if self.asked else None)
        if key not in self._known:
            self._known[key] = self._line(layer, on, device)
        lengths, parts, order = self._known[key]
        hides = layer.window is not None and self.state.logical + self.constant.room >= layer.window
        window = layer.window if hides else None
        return Frozen(storage.keys, storage.values, storage.positions, parts, order, on, lengths, window, stage)

    def _line(
        self, layer: RaggedLayer, on: int, device: torch.device
    ) -> tuple[int, list[Part], torch.Tensor | None]:  # fmt: skip
        """A line of lengths of its own for the layer: which, and how its rows lie."""
        parts, at, rows = [], 0, [row for bucket in layer.buckets for row in bucket.rows]
        for bucket in layer.buckets:
            shape = len(bucket.rows), bucket.keys.shape[2]
            cells = torch.arange(at, at + shape[0] * shape[1], device=device).view(shape)
            mine = None if layer.one_bucket else from_host(bucket.rows, device)
            parts.append(Part(mine, cells))
            at += shape[0] * shape[1]
        order = None
        if rows != sorted(rows):
            order = from_host(sorted(range(len(rows)), key=rows.__getitem__), device)
        firsts, lens = torch.cat([p.cells[:, 0] for p in parts]), torch.cat([b.lens for b in layer.buckets])
        firsts, lens = (t if order is None else t.index_select(0, order) for t in (firsts, lens))
        lines = self._lines[on]
        lines[0].append(firsts + lens)
        lines[1].append(firsts)
        return len(lines[0]) - 1, parts, order

    def _pin(self) -> None:
        """Tell torch.compile that these tensors stay where they are."""
        for layer in self.layers:
            for t in (layer.keys, layer.values, layer.positions):
                if t is not None:
                    torch._dynamo.mark_static_address(t)
        for t in (*self.next, *self.attended, self.said, self.steps):
            if t is not None:
                torch._dynamo.mark_static_address(t)

    def reorder(self, beam_idx: torch.Tensor) -> None:
        """Row i goes on from what row ``beam_idx[i]`` (int64 [rows]) has, which is a beam of the same prompt.

        Beams of a prompt lie in one part. All is written in place.
        """
        for on, device in enumerate(self._devices):
            at = beam_idx.to(device)
            lens = (self.next[on] - self.first[on]).index_select(1, at)
            self.next[on].copy_(self.first[on] + lens)
        for layer in self.layers:
            at = beam_idx.to(layer.keys.device)
            stores = [t for t in (layer.keys, layer.values, layer.positions) if t is not None]
            for part, *blocks in zip(layer.parts, *map(layer.blocks, stores), strict=True):
                local = at
                if part.rows is not None:  # of the part's rows, the one that stands at beam_idx
                    place = torch.zeros(self.rows, dtype=torch.int64, device=at.device)
                    each = torch.arange(len(part.rows), device=at.device)
                    local = place.index_copy(0, part.rows, each).index_select(0, at.index_select(0, part.rows))
                for block in blocks:
                    block.copy_(block.index_select(0, local))
        if self.said is not None:
            self.said.copy_(self.said.index_select(1, beam_idx.to(self.said.device)))

    def taken(self) -> int:
        """Steps so far (reads the device)."""
        if self.steps is not None:
            return int(self.steps)
        bucket = self.ragged[0].buckets[0]
        return int((self.next[0][0] - self.first[0][0])[bucket.rows[0]]) - int(bucket.lens[0])

    def thaw(self) -> None:
        """Give the rows back to the ragged layers and note what the steps came to (reads the device)."""
        state, steps, trace = self.state, self.taken(), self.trace
        lens = [(after - first).tolist() for after, first in zip(self.next, self.first, strict=True)]
        said = None if self.said is None else self.said[:, :, :steps].cpu()
        counted = [keys.sum(1).tolist() for keys in self.attended]
        for index, (layer, frozen) in enumerate(zip(self.ragged, self.layers, strict=True)):
            here = lens[frozen.on][frozen.lengths]
            if counted:
                attended = counted[frozen.on][frozen.lengths]
            else:
                attended = sum(steps * (n - steps) + steps * (steps + 1) // 2 for n in here)
            layer.attended = layer.attended + attended
            layer._set_lengths(here)
            if said is not None:
                trace.remembered.setdefault(index, []).extend(said[index].unbind(1))
        state.decoding = None
        state.logical += steps
        state.tail += steps
        state.exact = state.exact and (said is None or bool(said.all()))
        state.once.clear()
        trace.decode_steps += steps
        trace.decode_flops += steps * self.rows * sum(trace.geometry.linear_flops)
        trace.selector_flops += steps * self.flops


class StaticStep:
    """One decoded token per row. Stands for both the session and the plan of a step that is not static.

    Args:
        positions: int64 [rows, 1], or [axes, rows, 1] of several axes, as ``generate`` counts them.
    """

    routing = scale = None

    def __init__(self, decoding: Decoding, positions: torch.Tensor, rotary: Rotary) -> None:
        self.decoding, self.rotary = decoding, rotary
        self.positions = [positions if by is None else positions - by for by in decoding.offsets]
        self._ropes: dict[Any, Any] = {}
        self._masks: dict[Any, list[torch.Tensor]] = {}
        self._memos: list[dict[str, Any]] = [{} for _ in range(decoding.rows)] if decoding.asked else []
        self._kept: list[torch.Tensor | None] = [None] * len(decoding.layers)

    def arguments(self) -> dict[str, Any]:
        """What the text model gets with its tokens."""
        decoding = self.decoding
        at = self.positions[decoding.layers[0].stage]
        given = {"position_ids": at, "attention_mask": decoding.no_mask, "vtr_plan": self}
        if decoding.stages > 1 or decoding.spread or decoding.asked:  # something is to be done in front of every layer
            given["vtr_session"] = self
        return given

    def layer(self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Put the layer's positions into ``kwargs``, ask what it remembers. hidden: [rows, 1, D]."""
        frozen = self.decoding.layers[index]
        device = frozen.keys.device
        if hidden.device != device:
            hidden = hidden.to(device)
            self._memos = [memo_on(memo, device) for memo in self._memos]
        if self.decoding.stages > 1:
            kind = self.rotary.kinds[index]
            if (frozen.stage, kind) not in self._ropes:
                at = self.positions[frozen.stage].to(device)
                self._ropes[frozen.stage, kind] = self.rotary.of(kind, hidden, at)
            if kwargs["position_embeddings"] is not None:
                kwargs["position_embeddings"] = moved(self._ropes[frozen.stage, kind], device)
            kwargs["position_ids"] = self.positions[frozen.stage]
        if self.decoding.asked:
            self._kept[index] = self._remembered(index, hidden)
        return hidden

    def attend(
        self, base: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        """[rows, heads, 1, d], [rows, kv_heads, 1, d] → [rows, 1, heads, d]."""
        frozen = self.decoding.layers[module.layer_idx]
        cell = self.decoding.next[frozen.on][frozen.lengths]
        if self.decoding.latents is not None:
            (key, value), self.decoding.latents = self.decoding.latents, None
        frozen.keys.index_copy_(1, cell, key[:, :, 0].transpose(0, 1))
        frozen.values.index_copy_(1, cell, value[:, :, 0].transpose(0, 1))
        at = None
        if frozen.positions is not None:
            at = self.positions[frozen.stage].to(cell.device)[:, 0].expand(len(cell))
            frozen.positions.index_copy_(0, cell, at)
        outs = []
        masks = self._masks_of(frozen, cell, at, base, query.dtype)
        blocks = frozen.blocks(frozen.keys), frozen.blocks(frozen.values)
        for part, mask, k, v in zip(frozen.parts, masks, *blocks, strict=True):
            k, v = expanded(module, k, v)
            outs.append(attend_filled(base, module, part.pick(query), k, v, mask, kwargs))
        if len(outs) == 1:
            return outs[0]
        joined = torch.cat(outs)
        return joined if frozen.order is None else joined.index_select(0, frozen.order)

    def _masks_of(
        self, frozen: Frozen, cell: torch.Tensor, at: torch.Tensor | None, base: str, dtype: torch.dtype
    ) -> list[torch.Tensor]:  # fmt: skip
        """By part, [b, 1, 1, capacity]: what its rows see. Layers that lie alike share it, but for windows."""
        key, parts = (frozen.on, frozen.lengths), frozen.parts
        if frozen.window is None and key in self._masks:
            return self._masks[key]
        seen = [part.cells <= part.pick(cell)[:, None] for part in parts]
        if frozen.window is not None and frozen.positions is not None and at is not None:
            seen = [
                one & near(part.pick(at)[:, None], stands, frozen.window)
                for one, part, stands in zip(seen, parts, frozen.blocks(frozen.positions), strict=True)
            ]
        masks = [as_numbers(one, base, dtype)[:, None, None] for one in seen]
        if frozen.window is None:
            self._masks[key] = masks
        return masks

    def _remembered(self, index: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """bool [rows]; None for all."""
        said, flops = [], 0
        for policy, rows in self.decoding.asked:
            tokens = [Token(hidden[row, 0], self._memos[row]) for row in rows]
            said.append(policy.remember_all(index, tokens))
            flops += sum(token.flops for token in tokens)
        self.decoding.flops = flops if index == 0 else self.decoding.flops + flops
        found = each_row(self.decoding.asked, said, self.decoding.rows)
        if isinstance(found, torch.Tensor):
            return found
        if all(each is True for each in found):
            return None
        return torch.stack([as_tensor(each, hidden.device) for each in found])

    def finish(self) -> None:
        """Move on: what was remembered counts as cached."""
        decoding = self.decoding
        if decoding.said is None or decoding.steps is None:
            for cells in decoding.next:
                cells.add_(1)
            return
        for on, cells in enumerate(decoding.next):
            decoding.attended[on].add_(cells - decoding.first[on] + 1)
            ones = torch.ones_like(cells[0])
            kept = [self._kept[i] for i, layer in enumerate(decoding.layers) if layer.on == on]
            cells.add_(torch.stack([ones if k is None else k.to(cells) for k in kept]))
        device = decoding.said.device
        every = torch.ones(decoding.rows, dtype=torch.bool, device=device)
        said = torch.stack([every if k is None else k.to(device) for k in self._kept])
        decoding.said.index_copy_(2, decoding.steps, said[..., None])
        decoding.steps.add_(1)


def decoding_of(cache: Any) -> Decoding | None:
    """What goes on in a cache while it decodes with constant shapes; else None."""
    if not isinstance(cache, StaticRaggedCache) or not cache.layers:
        return None
    state = getattr(cache.layers[0], "state", None)
    found: Decoding | None = None if state is None else state.decoding
    return found


def takes_static_step(cache: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward is a decoded token of each row of a cache that decodes with constant shapes."""
    if decoding_of(cache) is None or kwargs.get("position_ids") is None or "policy" in kwargs:
        return False
    return kwargs["position_ids"].shape[-1] == 1 and all(kwargs.get(name) is None for name in PIXELS)


def freeze(layers: list[RaggedLayer], trace: Trace) -> None:
    """From now on the rows of these layers get one token a step, ``room`` of them at most."""
    layers[0].state.decoding = Decoding(layers, trace)
