"""One packed forward: pack the rows, ask their policies at every layer, unpack.

A session lives from the text model's pre-hook to its post-hook and travels in keyword arguments; nothing of it is kept
on the model. It makes one immutable :class:`~vtr.engine.attention.Plan` per decoder layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.attention import Plan, Routing
from vtr.engine.cache import RaggedLayer
from vtr.engine.call import Generation
from vtr.engine.captures import Captures
from vtr.engine.compression import Compression, compress_row, ranked_places, shrinks
from vtr.engine.decoder import Decoder
from vtr.engine.devices import execution_device
from vtr.engine.forgetting import Forgetting
from vtr.engine.layer_features import add_features, compress_features, take_features
from vtr.engine.once import Once, from_host
from vtr.engine.packed import Packed, on_device, sums
from vtr.engine.positions import Positions
from vtr.engine.questions import Passing, Questions
from vtr.engine.request import Request, check_rows, per_token, rows_of
from vtr.engine.rotary import cut
from vtr.engine.rows import Row
from vtr.engine.sight import OwnMasks
from vtr.engine.trace import PackedTrace, RowTrace, Trace


class Session:
    """The rows of one forward: ``pack()``, then ``layer()`` at each decoder layer, then ``unpack()``.

    Args:
        request: None where a ragged cache goes on with text only. shape: rows and logical columns of the batch.
        valid: bool [rows, columns] on the CPU, or None (no padding). layers: of the ragged cache, or None.
        masks: the model's own, where it has made any.

    Attributes:
        packed, questions: of the packed rows; there are none before ``pack()``.
        state: of the ragged cache, or None.
        offset: where this forward's slots start in the rows that the caller passed.
        entered: how many packed tokens entered the text model.
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
        masks: OwnMasks | None = None,
    ) -> None:
        self.masks = masks
        self.decoder, self.layers, self.device = decoder, layers, device
        self.state = None if layers is None else layers[0].state
        self.batch, self.logical = shape
        self.rows = rows_of(request, self.batch, self.logical, valid)
        check_rows(self.rows, layers is not None, decoder.depth, decoder.rotary)
        self.positions = Positions(decoder.rotary, self.batch)
        self.packed: Packed
        self.entered = 0
        self.questions: Questions
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
        if layer_features:
            assert request is not None  # where there are features there are images
            take_features(self.rows, layer_features, request.prompt.is_vision, self.decoder.depth)
        if captures is not None:
            captures.ranked = ranked_places(self.rows)
        compressed = {i: self._compress(row, embeds[i], captures) for i, row in enumerate(self.rows) if shrinks(row)}
        self.packed = Packed(self.rows, self.logical, embeds.device)
        self.questions = Questions(self.rows, self.packed, self.positions, self.layers, self.decoder, self.log.trace)
        self.questions.probes.masks = self.masks
        ids = self._ids(position_ids, compressed)
        self.positions.start(ids, self.packed.slots)
        self.entered = sum(self.packed.lengths)
        if any(row.policy is not None and row.policy.renumbers for row in self.rows):
            self.positions.first = ids[0].index_select(0, self.packed.starts[:-1])
        if self.state is not None and position_ids.dim() == 2:  # positions of one axis have closed up
            lost = [len(row.given.slots) - row.length for row in self.rows]
            self.state.dropped = [old + new for old, new in zip(self.state.dropped, lost, strict=True)]
        self.log.rows = self._traces()
        if captures is not None:
            self.log.trace.selector_flops += captures.flops
            captures.flops = 0
        return self._embeds(embeds, compressed)[None], ids[:, None] if position_ids.dim() == 3 else ids

    def _compress(self, row: Row, embeds: torch.Tensor, captures: Captures | None) -> Compression:
        """Shrink a row's images. embeds: [columns, D]."""
        before = row.vision.index
        with self.log.clock:
            compression = compress_row(row, embeds, captures)
        compress_features(row, compression, before)
        self.log.trace.selector_flops += compression.flops
        return compression

    def _embeds(self, embeds: torch.Tensor, compressed: dict[int, Compression]) -> torch.Tensor:
        """[B, L, D] → [T, D], pooled tokens among them."""
        tokens = embeds.flatten(0, 1)
        if sum(self.packed.lengths) < len(tokens):
            tokens = tokens.index_select(0, self.packed.slots)
        starts = sums(self.packed.lengths)
        pooled = [(at + starts[i], image) for i, made in compressed.items() for at, image in made.pooled]
        if not pooled:
            return tokens
        features = torch.cat([image.pooled.features.to(tokens) for _, image in pooled if image.pooled is not None])
        (places,) = on_device([torch.cat([at for at, _ in pooled])], tokens.device)
        return tokens.index_copy(0, places, features)

    def _ids(self, position_ids: torch.Tensor, compressed: dict[int, Compression]) -> torch.Tensor:
        """int64 [axes, T]. Of one axis they close up over what ``compress`` took; of several, see :meth:`pack`."""
        several, slots = position_ids.dim() == 3, self.packed.slots
        given = position_ids if several else position_ids[None]
        given = given.expand(-1, self.batch, -1)
        less = [0] * self.batch if self.state is None else self.state.dropped
        if not several and (compressed or any(less)):
            wanted = []
            for i, row in enumerate(self.rows):
                first = row.given.slots[:1] + i * self.logical
                wanted.append(first.expand(row.length) if i in compressed else row.slots + i * self.logical)
            plus = [
                (torch.arange(row.length) if i in compressed else torch.zeros(row.length, dtype=torch.int64)) - less[i]
                for i, row in enumerate(self.rows)
            ]
            slots, more = on_device([torch.cat(wanted), torch.cat(plus)], slots.device)
            return given.flatten(1).index_select(1, slots) + more
        ids = given.flatten(1).index_select(1, slots)
        spans = self.packed.spans()
        for i, made in compressed.items():
            if made.pooled:
                mine = given[:, i].index_select(1, self.rows[i].given.slots.to(ids.device, non_blocking=True))
                ids[:, spans[i]] = made.means(mine.T).T
        return ids

    def _traces(self) -> list[RowTrace]:
        """What is noted of each row, before anything is."""
        return [row.trace(self.offset, first) for row, first in zip(self.rows, self.packed.first_vision, strict=True)]

    # -- at each layer ---------------------------------------------------------------------------------------------
    def layer(self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Ask every row what enters decoder layer ``index``; puts rope, positions and the plan into ``kwargs``."""
        hidden = self._arrive(index, layer, hidden, kwargs)
        self.questions.probes.call = kwargs
        hidden, masked_keys = self._cut(index, layer, hidden)
        with self.log.clock:
            passing = self.questions.route(index, hidden)
            taking = self.questions.attend(index, layer, hidden, passing)
        along = self._take_along(kwargs, hidden.device)
        rope, positions, scale, routing = self.positions.rope, self.positions.ids, None, None
        slots = self.positions.slots
        if passing.through is not None:
            routing, scale = _routing(layer, hidden, passing)
            hidden = hidden.index_select(1, passing.through)
            kwargs.update({name: kwargs[name].index_select(1, passing.through) for name in along})
            rope = cut(rope, passing.through)
            positions = positions.index_select(1, passing.through)
            slots = slots if self.masks is None else slots.index_select(0, passing.through)
            masked_keys = None if masked_keys is None else masked_keys.index_select(0, passing.through)
        positions = positions[:1]  # of several axes, which rope has seen already, the first
        past = [] if self.layers is None else self.layers[index].lengths()
        self.log.note(passing.lengths, past, passing.counts, passing.alive, taking, layer)
        probes = self.questions.probes.probes(index, past, passing.lengths, passing.through)
        plan = Plan(
            decode=False,
            lengths=tuple(passing.lengths),
            past=tuple(past),
            layers=self.layers,
            probes=probes,
            sink=self.questions.probes.taken,
            clock=self.log.clock,
            scale=scale,
            routing=routing,
            positions=positions[0] if self.decoder.placed[index] else None,
            window=self.decoder.windows[index],
            own=None if self.masks is None else self.masks.of_layer(index, slots),
            max_distance=self.max_distance,
            masked_keys=masked_keys,
            taking=taking,
            once=self.once,
        )
        if self.layers is not None:
            self.layers[index].staged = plan
        kwargs.update(vtr_plan=plan, position_embeddings=rope, position_ids=positions)
        return hidden

    def pack_along(self, kwargs: dict[str, Any]) -> None:
        """What else the text model is given for each token, [B, L, …], becomes [1, T, …]."""
        for name in per_token(kwargs, self.batch, self.logical):
            kwargs[name] = kwargs[name].flatten(0, 1).index_select(0, self.packed.slots)[None]

    def _take_along(self, kwargs: dict[str, Any], device: torch.device) -> list[str]:
        """Cut what else a layer is given for each token ([1, tokens that entered, …]); returns their names."""
        names = per_token(kwargs, 1, self.entered)
        for name in names:
            kwargs[name] = self.positions.cut(kwargs[name], device)
        return names

    def _arrive(self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Bring everything to the layer's device and positions; add what belongs to the layer before."""
        hidden = hidden.to(execution_device(layer) or hidden.device)
        self._move(hidden.device)
        self.positions.take_rope(index, kwargs, hidden)
        if 0 < index <= len(self.packed.features):
            hidden = add_features(self.packed, index - 1, hidden)
        if self.state is not None and self.state.shift[index] != self.positions.shift:
            self.positions.step_down(self.state.shift[index], self.packed.lengths, hidden)
        return hidden

    def _move(self, device: torch.device) -> None:
        """Everything that goes with the packed tokens, to where they are now."""
        if device == self.device:
            return
        self.device = self.log.clock.device = device
        self.positions.to(device)
        self.packed.to(device)
        self.questions.probes.to(device)
        for row in self.rows:
            row.move_memo(device)
        if self.forgetting is not None:
            self.forgetting.to(device)

    def _cut(self, index: int, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Drop what does not enter the layer. Returns [1, T, D] and which keys are masked (bool [T]; None: none)."""
        masked_keys = None
        self.questions.probes.take_scores()
        if self.forgetting is not None:
            with self.log.clock:
                remembered = self.forgetting.drop(index, self.packed, hidden)
                masked_keys = self.forgetting.masked_keys(index, self.packed, hidden)
            if remembered is not None:
                self.questions.probes.select(remembered)
            hidden = self._select(hidden, remembered)
        with self.log.clock:
            kept, growth = self.questions.prune(index, layer, hidden, self.log.rows)
        hidden = self._select(hidden, kept)
        if growth is not None:
            hidden = growth.applied(hidden)
            self.positions.select(growth.origin)
        if kept is not None:
            masked_keys = None if masked_keys is None else masked_keys.index_select(0, kept)
            if masked_keys is not None and growth is not None:
                masked_keys = masked_keys.index_select(0, growth.origin)
            if self.positions.open:
                self.positions.close_up(self.packed.starts, self.logical, hidden)
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
        old, trace, decoder = [row for row, _ in picks], Trace(self.decoder.geometry), self.decoder
        made = copy.copy(self)
        made.batch = len(picks)
        made.rows = [self.rows[row].forked(new, policy) for new, (row, policy) in enumerate(picks)]
        made.packed, index = self.packed.fork(old, made.rows)
        columns = torch.tensor([(new - row) * self.logical for new, row in enumerate(old)])
        (moved,) = on_device([columns.repeat_interleave(torch.tensor(made.packed.lengths))], self.device)
        made.positions = self.positions.fork(index, moved, old)
        probes = self.questions.probes.fork(made.rows, made.packed, made.positions, index, old, trace)
        made.questions = self.questions.fork(made.rows, probes, made.packed, made.positions, trace)
        made.forgetting = Forgetting.from_rows(made.rows, True, trace)
        made.log = PackedTrace(trace, self.device)
        made.log.rows = made._traces()
        check_rows(made.rows, False, decoder.depth, decoder.rotary)
        return made, index

    # -- out of the decoder ----------------------------------------------------------------------------------------
    def unpack(self, hidden: torch.Tensor) -> torch.Tensor:
        """Packed [1, T, D] → [B, L, D]. A dropped slot carries the last surviving state before it; padding is zero."""
        self._move(hidden.device)
        columns = self.batch * self.logical
        if hidden.shape[1] == columns and not self.packed.grown:
            return hidden.view(self.batch, self.logical, -1)
        there, every = self.positions.slots, self.packed.slots
        if any(len(row.slots) < len(row.given.slots) for row in self.rows):
            given = torch.cat([row.given.slots + i * self.logical for i, row in enumerate(self.rows)])
            (every,) = on_device([given], hidden.device)
        sources = torch.searchsorted(there, every, right=True) - 1
        if self.packed.grown:
            sources = self._own(there, every, sources)
        if any(bool(row.given.is_vision[0]) for row in self.rows):  # what stood first may be gone, and carries the next
            sources = torch.maximum(sources, self.packed.starts.index_select(0, every // self.logical))
        states = hidden[0].index_select(0, sources)
        if len(states) < columns:
            states = hidden.new_zeros(columns, hidden.shape[-1]).index_copy(0, every, states)
        return states.view(self.batch, self.logical, -1)

    def _own(self, there: torch.Tensor, every: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """New tokens share the slot of the one in front of them, which carries that one; the last of a row the last."""
        first = torch.searchsorted(there, every).clamp_(max=len(there) - 1)
        own = there.index_select(0, first) == every
        ends = sums([len(row.given.slots) for row in self.rows])[1:]
        own[from_host([end - 1 for end in ends], every.device)] = False
        return torch.where(own, first, sources)

    def finish(self) -> None:
        """Note what the whole forward cost."""
        self.log.finish()
        if self.state is not None:
            self.state.logical += self.logical
            whole = not self.log.narrowed and not self.packed.grown
            in_step = whole and all(n == self.logical for ns in self.log.lengths for n in ns)
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
    _check_weights_act(layer)
    _check_weights_learn(layer)
    scale = passing.weights.index_select(0, passing.through)[None, :, None]
    return Routing(hidden * passing.weights[None, :, None], passing.through), scale


def _check_weights_act(layer: Any) -> None:
    """Refuse weights where what they weigh is normalised afterwards, or is not all of the layer's MLP."""
    names = [name for name, _ in layer.named_children()]
    behind = [name for name in names if name.startswith(("post_feedforward", "post_mlp", "experts"))]
    if behind:
        raise UnsupportedError(
            f"a policy that weighs routed tokens cannot act on a {type(layer).__name__}, whose MLP is followed by "
            f"{behind[0]}: take one that drops tokens (fastv, pyramid)"
        )


def _check_weights_learn(layer: Any) -> None:
    """Refuse weights in a layer whose checkpoint sees gradients of its first argument only."""
    call = getattr(layer, "_gradient_checkpointing_func", None)
    reentrant = call is not None and getattr(call, "keywords", {}).get("use_reentrant")
    if reentrant and layer.training and layer.gradient_checkpointing:
        raise UnsupportedError(
            "a policy that weighs routed tokens cannot learn under reentrant gradient checkpointing: call "
            'model.gradient_checkpointing_enable({"use_reentrant": False})'
        )
