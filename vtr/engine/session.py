"""One packed forward: pack the rows, ask their policies at every layer, unpack.

A session lives from the text model's pre-hook to its post-hook and travels in keyword arguments; nothing of it is kept
on the model. It makes one immutable :class:`~vtr.engine.attention.Plan` per decoder layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.attention import Plan, Probe, Routing
from vtr.engine.cache import CacheState, RaggedLayer
from vtr.engine.call import Generation
from vtr.engine.captures import Captures
from vtr.engine.forgetting import Forgetting
from vtr.engine.layer_features import add_features, compress_features, take_features
from vtr.engine.positions import Positions
from vtr.engine.request import Request, check_rows, rows_of
from vtr.engine.rows import Passing, Row, check_route, checked_keep, packed_indices
from vtr.engine.scores import WindowMask, ahead
from vtr.engine.trace import Clock, Trace


class Session:
    """The rows of one forward. ``rows`` in, ``layer()`` at each decoder layer, ``unpack()`` out.

    Args:
        request: None where a ragged cache goes on with text only. embeds: [B, L, D], merged embeddings.
        valid: [B, L] bool on the CPU, or None (no padding). layers, state: of the ragged cache, or None.
        rotary: the text model's rotary embedding. windows: the sliding window of each decoder layer.
    """

    def __init__(
        self,
        request: Request | None,
        embeds: torch.Tensor,
        valid: torch.Tensor | None,
        layers: list[RaggedLayer] | None,
        state: CacheState | None,
        trace: Trace,
        rotary: Any,
        windows: Sequence[int | None],
    ) -> None:
        self.batch, self.logical = embeds.shape[:2]
        self.layers, self.state, self.trace, self.depth = layers, state, trace, len(windows)
        self.clock, self.device, self.windows = Clock(embeds.device), embeds.device, windows
        self.rows = rows_of(request, self.batch, self.logical, valid)
        check_rows(self.rows, layers is not None, self.depth, rotary)
        self.positions = Positions(rotary, self.batch)
        self._scores: dict[int, torch.Tensor] = {}
        self._max_distance = self.logical + (state.logical if state is not None else 0)
        self.generation: Generation | None = None
        self.lengths: list[list[int]] = []
        self.past: list[list[int]] = []
        self._offset = request.offset if request else 0
        given = request is not None and request.generation is None
        self._forgetting = None if layers is not None else Forgetting.from_rows(self.rows, given, trace)
        self.is_vision = request.prompt.is_vision if request else None
        self._adding = 0
        """Behind how many of the first layers something is added to vision tokens."""

    # -- into the decoder ------------------------------------------------------------------------------------------
    def pack(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, captures: Captures | None,
        layer_features: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """[B, L, D], [B or 1, L] → packed [1, T, D] and [1, T], compressed where a policy says so.

        Positions of several axes, [axes, B or 1, L] → [axes, 1, T], are kept by a compressed row: what stays has its
        own, a pooled token the mean of its sources'. Others close up.

        Args:
            layer_features: [vision tokens of the batch, D] each, to be added to them behind the first layers.
        """
        device, parts, positions = embeds.device, [], []
        axes = position_ids.dim() == 3
        position_ids = position_ids.expand(*([-1] if axes else []), self.batch, -1)
        if layer_features:
            take_features(self.rows, layer_features, self.is_vision, self.depth)
            self._adding = len(layer_features)
        for row in self.rows:
            slots = row.slots.to(device, non_blocking=True)
            here = embeds[row.index].index_select(0, slots)
            at = position_ids[..., row.index, :].index_select(-1, slots)
            if row.layouts and row.policy is not None and row.policy.asks("compress"):
                here, at = self._compress(row, here, at, captures)
            if self.state is not None:
                at = at - self.state.dropped[row.index]
            parts.append(here)
            positions.append(at)
            row.first = at[..., :1]
            row.to(device)
        if self.state is not None:
            self.state.dropped = [
                before + row.dropped for before, row in zip(self.state.dropped, self.rows, strict=True)
            ]
        if captures is not None:
            self.trace.selector_flops += captures.flops
            captures.flops = 0
        self.noted = [row.trace(self._offset) for row in self.rows]
        where = torch.cat(positions, -1)
        self.positions.ids = where if axes else where[None]
        return torch.cat(parts)[None], where[:, None] if axes else where[None]

    def _compress(
        self, row: Row, embeds: torch.Tensor, at: torch.Tensor, captures: Captures | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A row's embeddings [n, D] and positions [n] or [axes, n] → those of the row with its images shrunk."""
        device, vision = embeds.device, row.vision
        with self.clock:
            row.compress(embeds, captures)
        compress_features(row, vision)
        embeds = embeds.index_select(0, row.kept.to(device, non_blocking=True))
        for local, features in row.pieces or []:
            embeds = embeds.index_copy(0, local.to(device, non_blocking=True), features)
        if at.dim() == 2:
            at, row.dropped = row.carried(at.T).T, 0
        else:
            at = at[:1] + torch.arange(row.length, device=device)  # a really shorter prompt
        return embeds, at

    # -- at each layer ---------------------------------------------------------------------------------------------
    def layer(self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Ask every row what enters decoder layer ``index``; puts rope, positions and the plan into ``kwargs``."""
        self.positions.take_rope(kwargs)
        if hidden.device != self.device:
            self._move(hidden.device)
        if 0 < index <= self._adding:
            hidden = add_features(self.rows, index - 1, hidden)
        if self.state is not None and self.state.shift[index] != self.positions.shift:
            self.positions.step_down(self.state.shift[index], [row.length for row in self.rows], hidden)
        masked_keys = None
        if self._forgetting is not None:
            with self.clock:
                remembered = self._forgetting.drop(index, self.rows, hidden)
                masked_keys = self._forgetting.masked_keys(index, self.rows, hidden)
            hidden = self._select(hidden, remembered)
        with self.clock:
            kept = self._prune(index, layer, hidden)
        hidden = self._select(hidden, kept)
        masked_keys = masked_keys if masked_keys is None or kept is None else masked_keys.index_select(0, kept)
        if kept is not None and any(row.lost for row in self.rows):
            self.positions.close_up(self.rows, hidden)
        if self.state is not None:
            self.state.shift[index] = [old + row.lost for old, row in zip(self.positions.shift, self.rows, strict=True)]
        with self.clock:
            passes = self._route(index, hidden)
        rope, positions, scale, routing = self.positions.rope, self.positions.ids, None, None
        lengths = [row.length for row in self.rows]
        counts, alive = [row.count for row in self.rows], [row.alive for row in self.rows]
        if passes is not None:
            through, lengths, counts, alive, weights = passes
            around = hidden
            if weights is not None:
                _check_weights_learn(layer)
                around, scale = hidden * weights[None, :, None], weights.index_select(0, through)[None, :, None]
            routing = Routing(around, through)
            hidden = hidden.index_select(1, through)
            rope = tuple(t.index_select(1, through) for t in rope)
            positions = positions.index_select(1, through)
            masked_keys = None if masked_keys is None else masked_keys.index_select(0, through)
        positions = positions[:1]  # of several axes, which rope has seen already, the first
        self._note(index, lengths, counts, alive)
        plan = self._plan(index, lengths, positions, scale, routing, masked_keys)
        if self.layers is not None:
            self.layers[index].staged = plan
        kwargs.update(vtr_plan=plan, position_embeddings=rope, position_ids=positions)
        return hidden

    def _select(self, hidden: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """[1, T, D] of the packed tokens that are kept, positions likewise; None: all."""
        if kept is None:
            return hidden
        self.positions.select(kept)
        return hidden.index_select(1, kept)

    def _move(self, device: torch.device) -> None:
        """The layers from here on are on another device: bring what indexes their tokens."""
        self.device = device
        self.positions.to(device)
        self._scores = {row: found.to(device) for row, found in self._scores.items()}
        for row in self.rows:
            row.to(device)

    def _note(self, index: int, lengths: list[int], counts: list[int], alive: list[torch.Tensor | None]) -> None:
        for noted, count, kept in zip(self.noted, counts, alive, strict=True):
            noted.counts.append(count)
            noted.alive.append(kept)
        self.lengths.append(lengths)
        self.past.append(self._cached(index) or [0] * self.batch)

    def _plan(
        self, index: int, lengths: list[int], positions: torch.Tensor, scale: torch.Tensor | None,
        routing: Routing | None, masked_keys: torch.Tensor | None,
    ) -> Plan:  # fmt: skip
        past = self._cached(index)
        return Plan(
            decode=False,
            lengths=tuple(lengths),
            past=tuple(past),
            layers=self.layers,
            probes=self._probes(index, past),
            sink=self._scores,
            clock=self.clock,
            scale=scale,
            routing=routing,
            positions=None if self.windows[index] is None else positions[0],
            max_distance=self._max_distance,
            masked_keys=masked_keys,
        )

    def _prune(self, index: int, layer: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        kept: list[torch.Tensor | None] = []
        before, start = [row.length for row in self.rows], 0
        for row, n in zip(self.rows, before, strict=True):
            keep = None
            p = row.policy
            if row.count and p is not None and p.asks("prune"):
                here = slice(start, start + n)
                look = partial(self._ahead, row, index, layer, hidden, here)
                tokens = row.tokens(index, self.depth, hidden[0, here], self._scores.get(row.index), look)
                answer = p.prune(index, tokens)
                tokens._field.check(p, "prune", "tokens")  # type: ignore[attr-defined]
                self.trace.selector_flops += tokens.flops
                if answer is not None:
                    vision = checked_keep(answer, row.count, "prune", p, hidden.device)
                    keep = row.cut(vision) if len(vision) < row.count else None
                    row.lost += n - row.length if p.renumbers else 0
            kept.append(keep)
            start += n
        self._scores = {}
        return None if all(keep is None for keep in kept) else packed_indices(kept, before, hidden.device)

    def _ahead(self, row: Row, index: int, layer: Any, hidden: torch.Tensor, here: slice) -> torch.Tensor:
        """What ``Tokens.ahead`` gives: float32 [vision tokens of the row]."""
        query, n, keys = row.queries("last"), row.length, None
        positions = self.positions.ids[0, here]
        window, known = self.windows[index], positions
        if past := self._cached(index):
            keys = self.layers[index].row(row.index, past[row.index])[0]  # type: ignore[index]
            if window is not None:
                known = torch.cat([self.layers[index].positions(row.index, past[row.index]), positions])  # type: ignore[index]
        sliding = None if window is None else WindowMask(positions.index_select(0, query), known, window)
        rope = tuple(t[:, here] for t in self.positions.rope)
        found = ahead(layer, hidden[0, here], rope, query, keys, sliding)
        g, width = self.trace.geometry, hidden.shape[-1]
        self.trace.selector_flops += 2 * g.head_dim * (width * (n * g.kv_heads + g.heads) + g.heads * len(found))
        return found[-n:].index_select(0, row.vision)

    def _route(self, index: int, hidden: torch.Tensor) -> Passing | None:
        if not any(row.count and row.policy is not None and row.policy.asks("route") for row in self.rows):
            return None
        through: list[torch.Tensor | None] = []
        weights: list[torch.Tensor] = []
        weighted, start = False, 0
        before = [r.length for r in self.rows]
        lengths, counts, alive = before[:], [r.count for r in self.rows], [r.alive for r in self.rows]
        for i, row in enumerate(self.rows):
            here, n, p = hidden[0, start : start + row.length], row.length, row.policy
            start += n
            passes, scale = None, hidden.new_ones(n)
            if row.count and p is not None and p.asks("route"):
                tokens = row.tokens(index, self.depth, here, None, _no_look_ahead)
                answer = p.route(index, tokens)
                tokens._field.check(p, "route", "tokens")  # type: ignore[attr-defined]
                self.trace.selector_flops += tokens.flops
                if answer is not None:
                    check_route(answer, row.count, p)
                    keep = checked_keep(answer.keep, row.count, "route", p, hidden.device)
                    passes = row.passing(keep)
                    lengths[i], counts[i] = len(passes), len(keep)
                    alive[i] = row.alive_of(keep)
                    if answer.weights is not None:
                        weighted = True
                        scale = scale.index_copy(0, row.vision, answer.weights.to(scale))
            through.append(passes)
            weights.append(scale)
        if all(p is None for p in through):
            return None
        packed = packed_indices(through, before, hidden.device)
        return Passing(packed, lengths, counts, alive, torch.cat(weights) if weighted else None)

    def _cached(self, index: int) -> list[int]:
        """Tokens each row already has in this layer's cache; empty when there are none."""
        if self.layers is None or not self.layers[index].place:
            return []
        return self.layers[index].lengths()

    def _probes(self, index: int, past: list[int]) -> tuple[Probe, ...]:
        """The attention rows of this layer that rank tokens for the next one."""
        if index + 1 >= self.depth:
            return ()
        probes = []
        for row in self.rows:
            kind = row.policy.needs(index + 1) if row.policy is not None and row.count else None
            if kind is not None:
                queries = row.queries(kind)
                probes.append(Probe(row.index, queries, kind.endswith("-max")))
                g, keys = self.trace.geometry, row.length + (past[row.index] if past else 0)
                self.trace.selector_flops += 2 * g.heads * g.head_dim * len(queries) * keys
        return tuple(probes)

    # -- the same rows again ---------------------------------------------------------------------------------------
    def fork(self, picks: Sequence[tuple[int, Policy | None]]) -> tuple[Session, torch.Tensor]:
        """A session that goes on from where this one is, with rows of its own.

        Args:
            picks: for each new row, which of this session's rows it continues, and under which policy.

        Returns:
            The new session, and int64 [T']: which packed token of this one each of its tokens is. This one stays as it
            is and can be forked again.

        Raises:
            UnsupportedError: the rows have a cache.
        """
        if self.state is not None:
            raise UnsupportedError("rows that fill a cache cannot be forked: call the model with use_cache=False")
        starts = [0, *accumulate(row.length for row in self.rows)]
        chosen = [torch.arange(starts[old], starts[old + 1]) for old, _ in picks]
        index = torch.cat(chosen).to(self.device, non_blocking=True)
        made = copy.copy(self)
        made.rows = [self.rows[old].again(new, policy) for new, (old, policy) in enumerate(picks)]
        made.batch, made.positions = len(picks), self.positions.fork(index, len(picks))
        made.clock, made.trace = Clock(self.device), Trace(self.trace.geometry)
        made._forgetting = Forgetting.from_rows(made.rows, True, made.trace)
        made.lengths, made.past, made.noted = [], [], [row.trace(self._offset) for row in made.rows]
        made._scores = {new: self._scores[old] for new, (old, _) in enumerate(picks) if old in self._scores}
        check_rows(made.rows, False, made.depth, made.positions.rotary)
        return made, index

    # -- out of the decoder ----------------------------------------------------------------------------------------
    def unpack(self, hidden: torch.Tensor) -> torch.Tensor:
        """Packed [1, T, D] → [B, L, D]. A dropped slot carries the last surviving state before it; padding is zero."""
        slots, sources, start = [], [], 0
        for row in self.rows:
            at, source = row.carriers(hidden.device)
            slots.append(at + row.index * self.logical)
            sources.append(source + start)
            start += row.length
        states = hidden[0].index_select(0, torch.cat(sources))
        if len(states) < self.batch * self.logical:
            padded = hidden.new_zeros(self.batch * self.logical, hidden.shape[-1])
            states = padded.index_copy(0, torch.cat(slots), states)
        return states.view(self.batch, self.logical, -1)

    def finish(self) -> None:
        """Note what the whole forward cost."""
        self.trace.note_packed(self.noted, self.lengths, self.past)
        self.trace.clocks.append(self.clock)
        if self.state is not None:
            self.state.logical += self.logical
            in_step = all(n == self.logical for lengths in self.lengths for n in lengths)
            self.state.tail = self.state.tail + self.logical if in_step else self._appended()

    def _appended(self) -> int:
        """How many columns at the end hold decoded (or drafted) text in every row: what ``crop`` may take back."""
        runs = []
        for slots in (row.answer_slots for row in self.rows):
            last = torch.arange(self.logical - len(slots), self.logical)
            runs.append(int((slots == last).flip(0).cumprod(0).sum()))
        return min(runs)


def _check_weights_learn(layer: Any) -> None:
    """Refuse weights in a layer whose checkpoint sees gradients of its first argument only."""
    call = getattr(layer, "_gradient_checkpointing_func", None)
    reentrant = call is not None and getattr(call, "keywords", {}).get("use_reentrant")
    if reentrant and layer.training and layer.gradient_checkpointing:
        raise UnsupportedError(
            "a policy that weighs routed tokens cannot learn under reentrant gradient checkpointing: call "
            'model.gradient_checkpointing_enable({"use_reentrant": False})'
        )


def _no_look_ahead() -> torch.Tensor:
    raise UnsupportedError("tokens.ahead() is there for prune, not for route: rank by hidden states instead")
