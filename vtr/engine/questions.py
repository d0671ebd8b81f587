"""What the rows' policies are asked at each decoder layer of a packed forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from vtr.base import UnsupportedError
from vtr.engine.attention import Probe
from vtr.engine.cache import RaggedLayer
from vtr.engine.checks import check_route, checked_keep
from vtr.engine.decoder import Decoder
from vtr.engine.positions import Positions
from vtr.engine.rows import Row, packed_indices, spans
from vtr.engine.scores import WindowMask, ahead
from vtr.engine.trace import Trace


class Passing(NamedTuple):
    """Who of all rows passes a layer.

    Attributes:
        lengths, counts, alive: per row, the tokens that pass, the vision tokens among them, and which ones these are.
        through: int64 [t], packed indices of those that pass; None: all do.
        weights: float [T] of all tokens, or None.
    """

    lengths: list[int]
    counts: list[int]
    alive: list[torch.Tensor | None]
    through: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class Questions:
    """Asks ``prune`` and ``route``, row by row, and says which attention scores they need.

    Args:
        rows, positions: of the packed tokens as they are now. layers: of the ragged cache, or None.

    Attributes:
        scores: row → float32 [tokens of the row], from the layer before. The attention function fills it.
        pruned, routed: per row, whether its policy answers ``prune`` and ``route``.
    """

    def __init__(
        self, rows: list[Row], positions: Positions, layers: list[RaggedLayer] | None, decoder: Decoder, trace: Trace
    ) -> None:
        self.rows, self.positions, self.layers = rows, positions, layers
        self.decoder, self.trace = decoder, trace
        self.scores: dict[int, torch.Tensor] = {}
        self.pruned = [row.asks("prune") for row in rows]
        self.routed = [row.asks("route") for row in rows]

    def to(self, device: torch.device) -> None:
        self.scores = {row: found.to(device) for row, found in self.scores.items()}

    def prune(self, index: int, layer: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        """Cut the rows; packed indices of the tokens that enter layer ``index``, None for all. hidden: [1, T, D]."""
        if not any(self.pruned):
            self.scores = {}
            return None
        kept: list[torch.Tensor | None] = []
        before = [row.length for row in self.rows]
        for i, (row, here) in enumerate(spans(self.rows)):
            keep = None
            if self.pruned[i] and row.vision.count:
                assert row.policy is not None
                look = partial(self._ahead, row, index, layer, hidden, here)
                answer = self._ask("prune", row, index, hidden[0, here], self.scores.get(row.index), look)
                if answer is not None:
                    vision = checked_keep(answer, row.vision.count, "prune", row.policy, hidden.device)
                    keep = row.cut(vision) if len(vision) < row.vision.count else None
                    self.positions.lost[i] += before[i] - row.length if row.policy.renumbers else 0
            kept.append(keep)
        self.scores = {}
        return None if all(keep is None for keep in kept) else packed_indices(kept, before, hidden.device)

    def route(self, index: int, hidden: torch.Tensor) -> Passing:
        """Who passes layer ``index``; the rows stay as they are. hidden: [1, T, D]."""
        rows = self.rows
        passing = Passing([r.length for r in rows], [r.vision.count for r in rows], [r.vision.alive for r in rows])
        if not any(self.routed):
            return passing
        lengths, counts, alive = passing[:3]
        before, through, weights, weighted = lengths[:], [], [], False
        for i, (row, here) in enumerate(spans(rows)):
            passes, scale = None, hidden.new_ones(row.length)
            answer = self._ask("route", row, index, hidden[0, here]) if self.routed[i] and row.vision.count else None
            if answer is not None:
                assert row.policy is not None
                vision = row.vision
                check_route(answer, vision.count, row.policy)
                keep = checked_keep(answer.keep, vision.count, "route", row.policy, hidden.device)
                passes = row.with_text(vision.index.index_select(0, keep))
                lengths[i], counts[i], alive[i] = len(passes), len(keep), vision.alive_after(keep)
                if answer.weights is not None:
                    weighted, scale = True, scale.index_copy(0, vision.index, answer.weights.to(scale))
            through.append(passes)
            weights.append(scale)
        if all(passes is None for passes in through):
            return passing
        packed = packed_indices(through, before, hidden.device)
        return passing._replace(through=packed, weights=torch.cat(weights) if weighted else None)

    def probes(self, index: int, past: Sequence[int]) -> tuple[Probe, ...]:
        """The attention rows of layer ``index`` that rank tokens for the next one. past: cached tokens of each row."""
        if index + 1 >= self.decoder.depth:
            return ()
        probes = []
        for row in self.rows:
            kind = row.policy.needs(index + 1) if row.policy is not None and row.vision.count else None
            if kind is not None:
                queries = row.text.ranking(kind)
                probes.append(Probe(row.index, queries, kind.endswith("-max")))
                g, keys = self.decoder.geometry, row.length + (past[row.index] if past else 0)
                self.trace.selector_flops += 2 * g.heads * g.head_dim * len(queries) * keys
        return tuple(probes)

    def _ask(
        self, question: str, row: Row, index: int, hidden: torch.Tensor, scores: torch.Tensor | None = None,
        look_ahead: Callable[[], torch.Tensor] | None = None,
    ) -> Any:  # fmt: skip
        """What the row's policy answers about its tokens entering layer ``index``. hidden: [n, D], the row's."""
        tokens = row.tokens(index, self.decoder.depth, hidden, scores, look_ahead or _no_look_ahead)
        answer = getattr(row.policy, question)(index, tokens)
        tokens._field.check(row.policy, question, "tokens")  # type: ignore[attr-defined]
        self.trace.selector_flops += tokens.flops
        return answer

    def _ahead(self, row: Row, index: int, layer: Any, hidden: torch.Tensor, here: slice) -> torch.Tensor:
        """What ``Tokens.ahead`` gives: float32 [vision tokens of the row]."""
        query, n, keys = row.text.ranking("last"), row.length, None
        positions = self.positions.ids[0, here]
        window, known = self.decoder.windows[index], positions
        if self.layers is not None and (past := self.layers[index].lengths()):
            cache = self.layers[index]
            keys = cache.row(row.index, past[row.index])[0]
            if window is not None:
                known = torch.cat([cache.positions(row.index, past[row.index]), positions])
        sliding = None if window is None else WindowMask(positions.index_select(0, query), known, window)
        rope = tuple(t[:, here] for t in self.positions.rope)
        found = ahead(layer, hidden[0, here], rope, query, keys, sliding)
        g, width = self.decoder.geometry, hidden.shape[-1]
        self.trace.selector_flops += 2 * g.head_dim * (width * (n * g.kv_heads + g.heads) + g.heads * len(found))
        return found[-n:].index_select(0, row.vision.index)


def _no_look_ahead() -> torch.Tensor:
    raise UnsupportedError("tokens.ahead() is there for prune, not for route: rank by hidden states instead")
