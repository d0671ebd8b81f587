"""One forward in which prompts are being cut: vLLM's flat batch is what the engine calls a packed sequence.

A request's policy is asked exactly as on transformers (:class:`~vtr.engine.questions.Questions`). vLLM carries a hidden
state and what is still to be added to it (the residual) apart; what a policy sees is their sum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vtr.integrations.llava import tile_layout
from vtr.integrations.vllm import guard
from vtr.integrations.vllm.inside.asked import Promise
from vtr.integrations.vllm.inside.segments import Segments
from vtr.integrations.vllm.inside.served import PlainPositions, ServedDecoder, ServedQuestions

from vtr.base import Policy, Token
from vtr.chain import policy
from vtr.engine.decode import answers
from vtr.engine.forgetting import Forgetting
from vtr.engine.packed import Packed
from vtr.engine.positions import Positions
from vtr.engine.rows import Row, RowInput
from vtr.engine.trace import Trace
from vtr.learned import Learned, differing, fingerprint
from vtr.parts import members

logger = logging.getLogger(__name__)
MORE = "keeps more tokens than it promised"


@dataclass(eq=False)
class Held:
    """A request under a policy, as the worker knows it.

    Attributes:
        limits: vision tokens that may enter each layer: as many as its part of the depth has cache blocks for.
        dropped: int64 [layers], of the tokens computed so far, those that each layer does not hold.
        why: what is wrong with its policy, from then on; the request ends in an error.
    """

    promise: Promise
    policy: Policy
    prompt: int
    features: Sequence[Any]
    limits: list[int]
    dropped: np.ndarray
    why: str | None = None

    @classmethod
    def of(cls, promise: Promise, state: Any, decoder: ServedDecoder, parts: Sequence[int]) -> Held:
        """Of a runner's request state."""
        each = decoder.depth // len(parts)
        limits = [n for n in promise.held(parts) for _ in range(each)]
        prompt = state.num_prompt_tokens
        made = cls(promise, _policy(promise.spec), prompt, state.mm_features, limits, np.zeros(decoder.depth, np.int64))
        made.why = _unlike(promise.spec, decoder)
        return made

    def acts(self, start: int) -> bool:
        """Whether its policy has something to do in a step that begins at token ``start``."""
        return start < self.prompt or self.policy.renumbers or self.policy.asks("remember")


def past(held: Sequence[Held | None], starts: Sequence[int], layer: int) -> list[int]:
    """How many tokens of each request a layer holds already. starts: how many were computed."""
    return [n if one is None else n - int(one.dropped[layer]) for one, n in zip(held, starts, strict=True)]


@lru_cache(maxsize=256)
def _policy(spec: str) -> Policy:
    return policy(spec)


@lru_cache(maxsize=256)
def _unlike(spec: str, decoder: ServedDecoder) -> str | None:
    """What keeps a trained policy from this model: samples of matrices that vLLM has not fused tell them apart."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    for part in members(_policy(spec)):
        if not isinstance(part, Learned) or not part.base or part.allow_mismatch:
            continue
        if get_tensor_model_parallel_world_size() > 1:
            continue  # a rank has parts of the matrices
        if differing(part.base, fingerprint(SimpleNamespace(get_decoder=lambda: decoder.text))):
            return f"{part.name}'s weights were trained with another model: train them with this one"
    return None


class Step:
    """From the first decoder layer to the norm behind the last.

    Args:
        names: of the requests. held: of each, None for those without a policy. lengths: tokens of each in this step.
        starts: tokens of each that were computed before. layouts: of a request's images, where they are known.

    Attributes:
        through: whether the last layer has run.
    """

    def __init__(
        self, decoder: ServedDecoder, segments: Segments, names: list[str], held: Sequence[Held | None],
        lengths: list[int], starts: list[int], layouts: Callable[[Sequence[Any]], list[Any] | None],
    ) -> None:  # fmt: skip
        self.decoder, self.segments, self.names, self.held = decoder, segments, names, held
        self.starts, self.total = starts, sum(lengths)
        self.given = lengths
        self.begun = [one is not None and start == 0 for one, start in zip(held, starts, strict=True)]
        self.rows = [
            Row(_row(i, one if begun else None, n, layouts))
            for i, (one, n, begun) in enumerate(zip(held, lengths, self.begun, strict=True))
        ]
        for one, begun in zip(held, self.begun, strict=True):
            if one is not None and begun:
                one.dropped[:] = 0
        self.logical = max(lengths)
        self.trace = Trace(decoder.geometry)
        self.forgetting = Forgetting.from_rows(self.rows, False, self.trace)
        self.memos: dict[int, dict[str, Any]] = {
            i: {} for i, one in enumerate(held)
            if one is not None and one.policy.asks("remember") and starts[i] + lengths[i] > one.prompt
        }  # fmt: skip
        self.forgot: dict[int, np.ndarray] = {i: np.zeros(decoder.depth, np.int64) for i in self.memos}
        self.held_here = np.zeros((decoder.depth, len(held)), np.int64)
        self.through = False
        self.around: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.packed: Packed
        self.positions: Positions
        self.questions: ServedQuestions

    # -- into the decoder ------------------------------------------------------------------------------------------
    def _begin(self, positions: torch.Tensor, hidden: torch.Tensor) -> None:
        ids = positions if positions.dim() == 2 else positions[None]
        self.padded = len(hidden)
        plain = PlainPositions(self.decoder.depth, len(ids))
        self.packed = Packed(self.rows, self.logical, hidden.device)
        self.positions = Positions(plain, len(self.rows))  # type: ignore[arg-type]
        self.positions.start(ids[:, : self.total], self.packed.slots)
        self.positions.rope = plain.of(None, hidden, self.positions.ids)
        if any(row.policy is not None and row.policy.renumbers for row in self.rows):
            self.positions.first = self.positions.ids[0].index_select(0, self.packed.starts[:-1])
        self.questions = ServedQuestions(
            self.rows, self.packed, self.positions, self.decoder, self.trace, self._fail
        )  # fmt: skip
        self.traces = [row.trace(0, n) for row, n in zip(self.rows, self.packed.first_vision, strict=True)]
        self.alive = torch.arange(self.total, device=hidden.device)
        for i, one in enumerate(self.held):
            if one is not None and one.why is not None and self.begun[i]:
                self._end([i], one.why)

    # -- at each layer ---------------------------------------------------------------------------------------------
    def enter(
        self, index: int, layer: Any, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Ask every request what enters decoder layer ``index``.

        Args:
            hidden, residual: [tokens, D]. positions: int64 [tokens], or [axes, tokens].

        Returns:
            The layer's positions, hidden states and residual, of those tokens that pass it.
        """
        if index == 0:
            self._begin(positions, hidden)
            hidden, residual = hidden[: self.total], None if residual is None else residual[: self.total]
        self._step_down(index, hidden)
        states = (hidden if residual is None else hidden + residual)[None]
        self.questions.probes.take_scores(hidden.device)
        for cut in (self._forget, self._prune, self._trim):
            hidden, residual, states = cut(index, layer, hidden, residual, states)
        if self.positions.open:
            self.positions.close_up(self.packed.starts, self.logical, states)
        self._remember(index, states[0])
        passing = self.questions.route(index, states)
        if over := self._over(index, passing.counts):  # of those that are routed; others are cut already
            self._end(over, MORE)
            hidden, residual, states = self._trim(index, layer, hidden, residual, states)
            passing = self.questions.route(index, states)
        self.held_here[index] = passing.lengths
        ids = self.positions.ids
        if passing.through is not None:
            ids = ids.index_select(1, passing.through)
            hidden, residual = self._pass(states[0], residual, passing)
        self.segments.enter(index, passing.lengths, past(self.held, self.starts, index))
        self.questions.probes.probes(index, [], passing.lengths, passing.through)
        return ids if len(ids) > 1 else ids[0], hidden, residual

    def _step_down(self, index: int, hidden: torch.Tensor) -> None:
        """Requests that go on under a policy that renumbers: their tokens follow those that the layer holds."""
        shift = [
            int(one.dropped[index]) if one is not None and not begun and one.policy.renumbers else 0
            for one, begun in zip(self.held, self.begun, strict=True)
        ]
        if shift != self.positions.shift:
            self.positions.step_down(shift, self.packed.lengths, hidden)

    def _forget(self, index: int, layer: Any, *tokens: Any) -> Any:
        """Answered words that a request computes anew, and its policy forgets."""
        if self.forgetting is None:
            return tokens
        kept = self.forgetting.drop(index, self.packed, tokens[2])
        if kept is not None:
            self.questions.probes.select(kept)
        return self._select(kept, *tokens)

    def _prune(self, index: int, layer: Any, hidden: Any, residual: Any, states: Any) -> Any:
        kept, growth = self.questions.prune(index, layer, states, self.traces)
        hidden, residual, states = self._select(kept, hidden, residual, states)
        if growth is None:
            return hidden, residual, states
        states = growth.applied(states)
        self.positions.select(growth.origin)
        self.alive = self.alive.index_select(0, growth.origin).index_fill(0, growth.places, -1)
        return states[0], None if residual is None else torch.zeros_like(states[0]), states

    def _over(self, index: int, counts: Sequence[int]) -> list[int]:
        """Requests of which more vision tokens would be cached than there are blocks for."""
        return [
            i for i, one in enumerate(self.held)
            if one is not None and self.begun[i] and counts[i] > one.limits[index]
        ]  # fmt: skip

    def _trim(self, index: int, layer: Any, hidden: Any, residual: Any, states: Any) -> Any:
        """Cut requests that would take more than they promised; they end in an error."""
        counts = self.packed.counts
        over = [i for i in self._over(index, counts) if not self.questions.routed[i]]  # what is routed may go around
        if not over:
            return hidden, residual, states
        self._end(over, MORE)
        left = [self.held[i].limits[index] if i in over else n for i, n in enumerate(counts)]  # type: ignore[union-attr]
        spans = self.packed.vision_spans()
        chosen = torch.cat([torch.arange(span.start, span.start + n) for span, n in zip(spans, left, strict=True)])
        return self._select(self.packed.cut(chosen.to(hidden.device), left), hidden, residual, states)

    def _select(self, kept: torch.Tensor | None, hidden: Any, residual: Any, states: Any) -> Any:
        if kept is None:
            return hidden, residual, states
        self.positions.select(kept)
        self.alive = self.alive.index_select(0, kept)
        if residual is None:
            hidden = hidden.index_select(0, kept)
            return hidden, None, hidden[None]
        return hidden.index_select(0, kept), residual.index_select(0, kept), states.index_select(1, kept)

    def _remember(self, index: int, states: torch.Tensor) -> None:
        """Whether the layer holds each request's newest word from the next step on."""
        for i, memo in self.memos.items():
            one = self.held[i]
            assert one is not None
            if one.why is not None:
                continue
            last = sum(self.packed.lengths[: i + 1]) - 1
            try:
                (stays,) = answers(one.policy, one.policy.remember_all(index, [Token(states[last].clone(), memo)]), 1)
            except Exception as error:  # whatever a policy raises must not end the engine
                self._fail([i], error)
                continue
            self.forgot[i][index] = not bool(stays)

    def _pass(self, states: torch.Tensor, residual: torch.Tensor | None, passing: Any) -> Any:
        """Some tokens go around the layer, and are there again behind it."""
        weights = states.new_ones(len(states)) if passing.weights is None else passing.weights
        through = passing.through
        self.around = (states * weights[:, None], through, weights.index_select(0, through)[:, None])
        mine = states.index_select(0, through)
        return mine, None if residual is None else torch.zeros_like(mine)

    def weighed(self, out: Any) -> Any:
        """Behind a layer's MLP: what routed tokens get of it."""
        return None if self.around is None else out * self.around[2]

    def left(self, index: int, out: Any) -> Any:
        """Behind layer ``index``: with those again that went around it."""
        self.through = index == self.decoder.depth - 1
        if self.around is None:
            return None
        (around, through, _), self.around = self.around, None
        hidden, residual = out
        return around.index_copy(0, through, hidden), torch.zeros_like(around).index_copy(0, through, residual)

    # -- out of the decoder ----------------------------------------------------------------------------------------
    def spread(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens left, D] → [tokens of the step, D]; dropped ones are zero, nobody reads them."""
        if len(hidden) == self.padded:
            return hidden
        there, kept = self.alive, hidden
        if self.packed.grown:
            real = (there >= 0).nonzero().squeeze(1)
            there, kept = there.index_select(0, real), hidden.index_select(0, real)
        return hidden.new_zeros(self.padded, hidden.shape[1]).index_copy(0, there, kept)

    def done(self) -> None:
        """The forward has run: note what each layer holds of each request now."""
        for i, one in enumerate(self.held):
            if one is None:
                continue
            if self.begun[i]:
                one.dropped[:] = self.given[i] - self.held_here[:, i]
            if i in self.forgot:
                one.dropped += self.forgot[i]

    def _fail(self, rows: Sequence[int], error: Exception) -> None:
        """What these requests' policy raised is the matter of these requests alone."""
        logger.error("a policy failed inside the decoder", exc_info=error)
        self._end(rows, f"failed inside the decoder ({type(error).__name__}): the server's log says more")

    def _end(self, rows: Sequence[int], what: str) -> None:
        """These requests' policies have broken: they end in an error, and are computed to the end of this step."""
        for i in rows:
            one = self.held[i]
            assert one is not None
            one.why = one.why or f"{one.promise.spec} {what}"
            guard.failed(self.names[i], one.why)
        self.questions.leave_out(rows)


def _row(i: int, held: Held | None, n: int, layouts: Callable[[Sequence[Any]], list[Any] | None]) -> RowInput:
    """Row ``i`` of the batch. held: of a request whose prompt is computed in this step, else None."""
    is_vision, places = torch.zeros(n, dtype=torch.bool), torch.arange(n)
    if held is None:
        return RowInput(i, None, places, is_vision, [], [], n)
    sizes = []
    for feature in held.features:
        at = feature.mm_position
        mark = at.is_embed if at.is_embed is not None else torch.ones(at.length, dtype=torch.bool)
        is_vision[at.offset : at.offset + at.length] = mark
        sizes.append(int(mark.sum()))
    known = layouts(held.features)
    return RowInput(i, held.policy, places, is_vision, known or _unknown(sizes), [], held.prompt)


def _unknown(sizes: Sequence[int]) -> list[Any]:
    """In place of layouts: so many tokens of each image, without places."""
    return [tile_layout(1, size) for size in sizes]
