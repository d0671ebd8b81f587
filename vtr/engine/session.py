"""One packed forward: pack the rows, ask their policies at every layer, unpack.

A session lives from the text model's pre-hook to its post-hook and travels in keyword arguments; nothing of it is kept
on the model. It makes one immutable :class:`~vtr.engine.attention.Plan` per decoder layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.attention import Plan, Routing
from vtr.engine.cache import RaggedLayer
from vtr.engine.call import Generation
from vtr.engine.captures import Captures
from vtr.engine.compression import compress_row
from vtr.engine.decoder import Decoder
from vtr.engine.devices import execution_device
from vtr.engine.forgetting import Forgetting
from vtr.engine.layer_features import add_features, compress_features, take_features
from vtr.engine.once import Once
from vtr.engine.positions import Positions
from vtr.engine.questions import Passing, Questions
from vtr.engine.request import Request, check_rows, rows_of
from vtr.engine.rows import Row, spans
from vtr.engine.trace import PackedTrace, Trace


class Session:
    """The rows of one forward: ``pack()``, then ``layer()`` at each decoder layer, then ``unpack()``.

    Args:
        request: None where a ragged cache goes on with text only. shape: rows and logical columns of the batch.
        valid: bool [rows, columns] on the CPU, or None (no padding). layers: of the ragged cache, or None.

    Attributes:
        state: of the ragged cache, or None.
        offset: where this forward's slots start in the rows that the caller passed.
        generation: the running ``generate`` that this forward is part of, or None.
    """

    def __init__(
        self,
        decoder: Decoder,
        request: Request | None,
        shape: Sequence[int],
        device: torch.device,
        valid: torch.Tensor | None,
        layers: list[RaggedLayer] | None,
        trace: Trace,
    ) -> None:
        self.decoder, self.layers, self.device = decoder, layers, device
        self.state = None if layers is None else layers[0].state
        self.batch, self.logical = shape
        self.rows = rows_of(request, self.batch, self.logical, valid)
        check_rows(self.rows, layers is not None, decoder.depth, decoder.text.rotary_emb)
        self.positions = Positions(decoder.text.rotary_emb, self.batch)
        self.questions = Questions(self.rows, self.positions, layers, decoder, trace)
        given = request is not None and request.generation is None
        self.forgetting = None if layers is not None else Forgetting.from_rows(self.rows, given, trace)
        self.log, self.once = PackedTrace(trace, device), Once()
        self.offset = request.offset if request else 0
        self.generation: Generation | None = None
        self.max_distance = self.logical + (0 if self.state is None else self.state.logical)

    # -- into the decoder ------------------------------------------------------------------------------------------
    def pack(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, request: Request | None,
        layer_features: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """[B, L, D], [B or 1, L] → packed [1, T, D] and [1, T], compressed where a policy says so.

        Positions of several axes, [axes, B or 1, L] → [axes, 1, T], are kept by a compressed row: what is kept has its
        own, a pooled token the mean of its sources'. Others close up.

        Args:
            layer_features: [vision tokens of the batch, D] each, to be added to them behind the first layers.
        """
        captures = None if request is None else request.captures
        several = position_ids.dim() == 3
        position_ids = position_ids.expand(*([-1] if several else []), self.batch, -1)
        if layer_features:
            assert request is not None  # where there are features there are images
            take_features(self.rows, layer_features, request.prompt.is_vision, self.decoder.depth)
        parts, positions, dropped = [], [], []
        for i, row in enumerate(self.rows):
            slots = row.slots.to(embeds.device, non_blocking=True)
            here, at = embeds[i].index_select(0, slots), position_ids[..., i, :].index_select(-1, slots)
            if row.given.layouts and row.asks("compress"):
                here, at = self._compress(row, here, at, captures)
            dropped.append(0 if several else len(slots) - row.length)  # positions of one axis close up
            at = at if self.state is None else at - self.state.dropped[i]
            parts.append(here)
            positions.append(at)
            self.positions.first.append(at[..., :1])
            row.to(embeds.device)
        if self.state is not None:
            self.state.dropped = [old + new for old, new in zip(self.state.dropped, dropped, strict=True)]
        self.log.rows = [row.trace(self.offset) for row in self.rows]
        if captures is not None:
            self.log.trace.selector_flops += captures.flops
            captures.flops = 0
        where = torch.cat(positions, -1)
        self.positions.ids = where if several else where[None]
        return torch.cat(parts)[None], where[:, None] if several else where[None]

    def _compress(
        self, row: Row, embeds: torch.Tensor, at: torch.Tensor, captures: Captures | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A row's embeddings [n, D] and positions [n] or [axes, n] → those of the row with its images shrunk."""
        before = row.vision.index
        with self.log.clock:
            compression = compress_row(row, embeds, captures)
        compress_features(row, compression, before)
        return compression.embeds(embeds), compression.positions(at)

    # -- at each layer ---------------------------------------------------------------------------------------------
    def layer(self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Ask every row what enters decoder layer ``index``; puts rope, positions and the plan into ``kwargs``."""
        hidden = self._arrive(index, layer, hidden, kwargs)
        hidden, masked_keys = self._cut(index, layer, hidden)
        with self.log.clock:
            passing = self.questions.route(index, hidden)
        rope, positions, scale, routing = self.positions.rope, self.positions.ids, None, None
        if passing.through is not None:
            routing, scale = _routing(layer, hidden, passing)
            hidden = hidden.index_select(1, passing.through)
            rope = tuple(t.index_select(1, passing.through) for t in rope)
            positions = positions.index_select(1, passing.through)
            masked_keys = None if masked_keys is None else masked_keys.index_select(0, passing.through)
        positions = positions[:1]  # of several axes, which rope has seen already, the first
        past = [] if self.layers is None else self.layers[index].lengths()
        self.log.note(passing.lengths, past, passing.counts, passing.alive)
        plan = Plan(
            decode=False,
            lengths=tuple(passing.lengths),
            past=tuple(past),
            layers=self.layers,
            probes=self.questions.probes(index, past),
            sink=self.questions.scores,
            clock=self.log.clock,
            scale=scale,
            routing=routing,
            positions=None if self.decoder.windows[index] is None else positions[0],
            max_distance=self.max_distance,
            masked_keys=masked_keys,
            once=self.once,
        )
        if self.layers is not None:
            self.layers[index].staged = plan
        kwargs.update(vtr_plan=plan, position_embeddings=rope, position_ids=positions)
        return hidden

    def _arrive(self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Bring everything to the layer's device and positions; add what belongs to the layer before."""
        self.positions.take_rope(kwargs)
        hidden = hidden.to(execution_device(layer) or hidden.device)
        self._move(hidden.device)
        if index > 0 and self.rows[0].vision.layer_features[index - 1 : index]:
            hidden = add_features(self.rows, index - 1, hidden)
        if self.state is not None and self.state.shift[index] != self.positions.shift:
            self.positions.step_down(self.state.shift[index], [row.length for row in self.rows], hidden)
        return hidden

    def _move(self, device: torch.device) -> None:
        """Everything that goes with the packed tokens, to where they are now."""
        if device == self.device:
            return
        self.device = self.log.clock.device = device
        self.positions.to(device)
        self.questions.to(device)
        if self.forgetting is not None:
            self.forgetting.to(device)
        for row in self.rows:
            row.to(device)

    def _cut(self, index: int, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Drop what does not enter the layer. Returns [1, T, D] and which keys are masked (bool [T]; None: none)."""
        masked_keys = None
        if self.forgetting is not None:
            with self.log.clock:
                remembered = self.forgetting.drop(index, self.rows, hidden)
                masked_keys = self.forgetting.masked_keys(index, self.rows, hidden)
            hidden = self._select(hidden, remembered)
        with self.log.clock:
            kept = self.questions.prune(index, layer, hidden)
        hidden = self._select(hidden, kept)
        if kept is not None:
            masked_keys = None if masked_keys is None else masked_keys.index_select(0, kept)
            if any(self.positions.lost):
                self.positions.close_up([row.length for row in self.rows], hidden)
        if self.state is not None:
            shift, lost = self.positions.shift, self.positions.lost
            self.state.shift[index] = [old + new for old, new in zip(shift, lost, strict=True)]
        return hidden, masked_keys

    def _select(self, hidden: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """[1, T, D] of the packed tokens that are kept, positions likewise; None: all."""
        if kept is None:
            return hidden
        self.positions.select(kept)
        return hidden.index_select(1, kept)

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
        made, trace, decoder = copy.copy(self), Trace(self.decoder.geometry), self.decoder
        made.batch = len(picks)
        made.rows = [self.rows[old].forked(new, policy) for new, (old, policy) in enumerate(picks)]
        made.positions = self.positions.fork(index, [old for old, _ in picks])
        made.questions = Questions(made.rows, made.positions, None, decoder, trace)
        scores = self.questions.scores
        made.questions.scores = {new: scores[old] for new, (old, _) in enumerate(picks) if old in scores}
        made.forgetting = Forgetting.from_rows(made.rows, True, trace)
        made.log = PackedTrace(trace, self.device)
        made.log.rows = [row.trace(self.offset) for row in made.rows]
        check_rows(made.rows, False, decoder.depth, decoder.text.rotary_emb)
        return made, index

    # -- out of the decoder ----------------------------------------------------------------------------------------
    def unpack(self, hidden: torch.Tensor) -> torch.Tensor:
        """Packed [1, T, D] → [B, L, D]. A dropped slot carries the last surviving state before it; padding is zero."""
        self._move(hidden.device)
        slots, sources = [], []
        for i, (row, here) in enumerate(spans(self.rows)):
            at, source = row.carriers(hidden.device)
            slots.append(at + i * self.logical)
            sources.append(source + here.start)
        states = hidden[0].index_select(0, torch.cat(sources))
        if len(states) < self.batch * self.logical:
            padded = hidden.new_zeros(self.batch * self.logical, hidden.shape[-1])
            states = padded.index_copy(0, torch.cat(slots), states)
        return states.view(self.batch, self.logical, -1)

    def finish(self) -> None:
        """Note what the whole forward cost."""
        self.log.finish()
        if self.state is not None:
            self.state.logical += self.logical
            in_step = all(n == self.logical for lengths in self.log.lengths for n in lengths)
            self.state.tail = self.state.tail + self.logical if in_step else self._appended()

    def _appended(self) -> int:
        """How many columns at the end hold decoded (or drafted) text in every row: what ``crop`` may take back."""
        runs = []
        for slots in (row.text.answer_slots for row in self.rows):
            last = torch.arange(self.logical - len(slots), self.logical)
            runs.append(int((slots == last).flip(0).cumprod(0).sum()))
        return min(runs)


def _routing(layer: Any, hidden: torch.Tensor, passing: Passing) -> tuple[Routing, torch.Tensor | None]:
    """What goes around the layer, and by what its MLP's output is multiplied ([1, t, 1] or None)."""
    assert passing.through is not None
    if passing.weights is None:
        return Routing(hidden, passing.through), None
    _check_weights_learn(layer)
    scale = passing.weights.index_select(0, passing.through)[None, :, None]
    return Routing(hidden * passing.weights[None, :, None], passing.through), scale


def _check_weights_learn(layer: Any) -> None:
    """Refuse weights in a layer whose checkpoint sees gradients of its first argument only."""
    call = getattr(layer, "_gradient_checkpointing_func", None)
    reentrant = call is not None and getattr(call, "keywords", {}).get("use_reentrant")
    if reentrant and layer.training and layer.gradient_checkpointing:
        raise UnsupportedError(
            "a policy that weighs routed tokens cannot learn under reentrant gradient checkpointing: call "
            'model.gradient_checkpointing_enable({"use_reentrant": False})'
        )
