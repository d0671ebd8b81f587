"""What a call kept and what it cost: tokens per layer, FLOPs, KV bytes, selector time.

FLOPs are those of the decoder's matrix products (2 · in · out a token for each Linear, 4 · n · m · head_dim a head for
n queries over m keys, attention counted in full), prefill and decode. Vision tower, projector, language-model head and
the selectors are not in it; the selectors' score products stand apart in ``selector_flops``. Decoding counts the keys
a row really has; rows that share a cache bucket compute up to an eighth more of the (small) attention part, and those
of a static cache attend to the room for tokens to come as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from vtr.engine.call import last_traces
from vtr.engine.install import patch_of
from vtr.engine.trace import DenseTrace, Geometry, RowTrace, Trace, Tried
from vtr.markup import stairs, table


@dataclass(frozen=True)
class RowReport:
    """One prompt of the call.

    Attributes:
        policy: its spec string, or None for no reduction.
        vision_tokens: per decoder layer, how many vision tokens entered it (were routed through it).
        total: vision tokens of the prompt before any reduction.
        asked, seen: per decoder layer, how many of those that entered were queries and keys of its attention.
        cached: per decoder layer, how many its cache got; 0 without a cache.
        tries: (policy, vision tokens that entered layer 0) of what was tried to choose the policy, in order.
    """

    policy: str | None
    vision_tokens: list[int]
    total: int
    _kept: list[list[int]] = field(repr=False, default_factory=list)
    _sources: list[list[list[int]]] = field(repr=False, default_factory=list)
    tries: list[tuple[str, int]] = field(default_factory=list)
    _remembered: list[list[bool]] = field(repr=False, default_factory=list)
    asked: list[int] = field(repr=False, default_factory=list)
    seen: list[int] = field(repr=False, default_factory=list)
    cached: list[int] = field(repr=False, default_factory=list)

    def kept(self, layer: int) -> list[int]:
        """Slots in the ``input_ids`` row as passed of the vision tokens that entered ``layer``, ascending.

        Pooled tokens have no slot of their own; see :meth:`sources`.
        """
        return self._kept[layer]

    def sources(self, layer: int) -> list[list[int]]:
        """For each vision token that entered ``layer``: the slots it was made from (one for a token merely kept)."""
        return self._sources[layer]

    def remembered(self, layer: int) -> list[bool]:
        """For each token decoded into the cache, in order: whether ``layer`` remembers it.

        The last token of an answer never gets there. Empty where no policy of the call forgets, without a cache, and
        for beams.
        """
        return self._remembered[layer] if self._remembered else []

    @property
    def mean_keep(self) -> float:
        """Mean over layers of the share of the prompt's vision tokens that entered; 1.0 without vision tokens."""
        return sum(self.vision_tokens) / (len(self.vision_tokens) * self.total) if self.total else 1.0


@dataclass(frozen=True)
class Report:
    """What the last call kept and cost. Plain numbers; holds no reference to the model.

    Attributes:
        rows: one per prompt (beams share one).
        flops: decoder prefill + decode. prefill_flops, decode_flops: its parts. What was tried to choose the policies
            is in prefill_flops.
        selector_flops: score products of the selectors, not in ``flops``.
        kv_bytes: keys and values live when the call ended; kv_bytes_allocated: the storage that held them.
        selector_ms: time spent on choosing tokens, tries included.
        steps: forwards after the prompt's.
        path: "packed", or "padded" for a decoder that cannot run packed rows: policies act before it, and rows are
            padded to the longest.
    """

    rows: list[RowReport]
    flops: int
    prefill_flops: int
    decode_flops: int
    selector_flops: int
    kv_bytes: int
    kv_bytes_allocated: int
    selector_ms: float
    steps: int
    path: str = "packed"

    def table(self) -> str:
        """A plain-text table: a line a row."""
        lines = [f"{'row':>3}  {'policy':<32} {'vision tokens':>13}  {'mean keep':>9}  per layer"]
        for i, row in enumerate(self.rows):
            per_layer = " ".join(map(str, row.vision_tokens))
            lines.append(f"{i:>3}  {row.policy or 'none':<32} {row.total:>13}  {row.mean_keep:>9.1%}  {per_layer}")
            for word, counts in (("asked", row.asked), ("seen", row.seen)):
                if counts and counts != row.vision_tokens:
                    lines.append(f"{word:>62}  {' '.join(map(str, counts))}")
        return "\n".join([*lines, self._costs()])

    def _costs(self) -> str:
        return (
            f"decoder {self.flops / 1e9:.3f} GFLOPs (prefill {self.prefill_flops / 1e9:.3f}), "
            f"KV {self.kv_bytes / 1024:.1f} KiB live, {self.kv_bytes_allocated / 1024:.1f} KiB allocated, "
            f"selector {self.selector_ms:.2f} ms{'' if self.path == 'packed' else f', {self.path} rows'}"
        )

    def _repr_html_(self) -> str:
        """A line a row, with its staircase of tokens, for notebooks."""
        head = ("row", "policy", "vision tokens", "mean keep", "into each layer", "")
        lines: list[tuple[object, ...]] = []
        for i, row in enumerate(self.rows):
            here, counts = stairs(row.vision_tokens, row.total), _runs(row.vision_tokens)
            lines.append((i, row.policy or "none", row.total, f"{row.mean_keep:.1%}", here, counts))
            for word, some in (("asked", row.asked), ("seen", row.seen)):
                if some and some != row.vision_tokens:
                    lines.append(("", word, "", "", stairs(some, row.total), _runs(some)))
        return table(head, lines, note=self._costs())


def _runs(counts: list[int]) -> str:
    """Equal counts of neighboring layers together: "744 × 2, 37 × 8"."""
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    return ", ".join(f"{count} × {times}" if times > 1 else str(count) for count, times in runs)


def report(model: Any) -> Report:
    """What the last call of ``model`` in this context kept and cost.

    A call made by another thread (a streamer's) is reported if this context has made none itself.

    Raises:
        ValueError: the model is not patched, or has not been called since.
    """
    patch = patch_of(model)
    trace = last_traces.get().get(patch.key, patch.last)
    if trace is None:
        raise ValueError(
            "nothing to report yet: call model.generate(**inputs) or model(**inputs) first (with input_ids, which say "
            "where vision tokens are)"
        )
    return report_of(trace)


def report_of(trace: Trace | DenseTrace) -> Report:
    """The report made of what was noted of a call."""
    return _with_tries(_report(trace), trace.tried)


def _report(trace: Trace | DenseTrace) -> Report:
    return _dense(trace) if isinstance(trace, DenseTrace) else _reduced(trace)


def _with_tries(made: Report, tried: Tried | None) -> Report:
    """The report of a call whose policies were chosen by tries: what these cost is added."""
    if tried is None:
        return made
    reports = [(_report(trace), rows) for trace, rows in tried.traces]
    flops = sum(one.flops for one, _ in reports)
    for b, row in enumerate(made.rows):
        mine = [one.rows[b] for one, rows in reports if b in rows]
        row.tries.extend((one.policy or "none", one.vision_tokens[0]) for one in mine)
    return replace(
        made,
        flops=made.flops + flops,
        prefill_flops=made.prefill_flops + flops,
        selector_flops=made.selector_flops + sum(one.selector_flops for one, _ in reports),
        selector_ms=made.selector_ms + tried.clock.ms(),
    )


def _reduced(trace: Trace) -> Report:
    g = trace.geometry
    decode = trace.decode_flops + sum(g.attention(i).pair * int(a) for i, a in enumerate(trace.attended))
    held = sum(g.attention(i).cached * int(n) for i, n in enumerate(trace.kv_tokens)) * trace.kv_itemsize
    return Report(
        rows=[
            _row(row, words, bool(trace.kv_tokens or trace.kv_bytes))
            for row, words in zip(trace.rows[:: trace.beams], _remembered(trace), strict=True)
        ],
        flops=trace.prefill_flops + decode,
        prefill_flops=trace.prefill_flops,
        decode_flops=decode,
        selector_flops=trace.selector_flops,
        kv_bytes=held if trace.kv_bytes is None else trace.kv_bytes,
        kv_bytes_allocated=trace.kv_allocated,
        selector_ms=sum(clock.ms() for clock in trace.clocks),
        steps=trace.decode_steps,
        path=trace.path,
    )


def _remembered(trace: Trace) -> list[list[list[bool]]]:
    """Per row and layer the decoded tokens that stay; nothing for beams, whose rows change places."""
    found: list[list[list[bool]]] = [[] for _ in trace.rows[:: trace.beams]]
    if not found or trace.beams > 1:
        return found
    all_kept = torch.ones(len(found), dtype=torch.bool)
    for _, steps in sorted(trace.remembered.items()):
        kept = torch.stack([all_kept if step is None else step.cpu() for step in steps], 1)
        for row, mine in zip(found, kept.tolist(), strict=True):
            row.append(mine)
    return found


def _row(row: RowTrace, remembered: list[list[bool]], cached: bool) -> RowReport:
    slots = row.slots.tolist()
    images = row.sources
    made_of = [[slot] for slot in slots] if images is None else [some for image in images for some in image.lists()]
    named = {row.first + i: (slot, made) for i, (slot, made) in enumerate(zip(slots, made_of, strict=True))}
    for merge in row.merges:
        before = merge.before.tolist()
        for number, some in enumerate(merge.made_of, merge.first):
            named[number] = -1, sorted({slot for i in some for slot in named[before[i]][1]})
    kept, sources = [], []
    last: tuple[torch.Tensor, list[int], list[list[int]]] | None = None
    for alive in row.alive:
        if last is None or alive is not last[0]:  # most layers keep what the layer before kept
            here = [named[i] for i in alive.tolist()]
            last = (alive, [slot for slot, _ in here if slot >= 0], [made for _, made in here])
        kept.append(last[1])
        sources.append(last[2])
    seen = list(row.seen)
    return RowReport(
        row.spec,
        list(row.counts),
        row.original,
        kept,
        sources,
        _remembered=remembered,
        asked=list(row.asked),
        seen=seen,
        cached=seen if cached else [0] * len(seen),
        tries=[(spec or "none", tokens) for spec, tokens in row.tries],
    )


def _dense(trace: DenseTrace) -> Report:
    """An unreduced call: transformers computes every row at the padded length, and every beam."""
    g, steps, past = trace.geometry, trace.steps, trace.past
    rows, n = trace.input_ids.shape[0] * trace.beams, trace.input_ids.shape[1]
    per_token, sizes = sum(g.linear_flops), [g.attention(i) for i in range(g.num_hidden_layers)]
    layers = g.attending(list(zip(sizes, trace.windows or (None,) * g.num_hidden_layers, strict=True)))
    prefill = rows * (n * per_token + n * sum(size.pair * (_held(past, w) + n) for size, w in layers))
    if trace.cached:
        products = sum(size.pair * (_held(past + n + t, w) + 1) for t in range(steps) for size, w in layers)
        decode = rows * (steps * per_token + products)
        held = sum(size.cached * _held(past + n + steps, w) for size, w in layers)
        kv = rows * held * trace.itemsize
    else:
        pairs = sum(size.pair for size, _ in layers)
        decode = rows * sum((n + t + 1) * per_token + pairs * (n + t + 1) ** 2 for t in range(steps))
        kv = 0
    return Report(
        rows=_dense_rows(trace),
        flops=prefill + decode,
        prefill_flops=prefill,
        decode_flops=decode,
        selector_flops=0,
        kv_bytes=kv,
        kv_bytes_allocated=kv,
        selector_ms=0.0,
        steps=steps,
        path=trace.path,
    )


def _held(tokens: int, window: int | None) -> int:
    """How many of a row's tokens transformers' own cache holds: with a sliding window, those the next one can see."""
    return tokens if window is None else min(tokens, window - 1)


def _dense_rows(trace: DenseTrace) -> list[RowReport]:
    vision = torch.isin(trace.input_ids.cpu(), torch.tensor(trace.placeholders))
    out = []
    for row in vision:
        slots = row.nonzero().squeeze(1).tolist()
        depth = trace.geometry.num_hidden_layers
        all_of_them, made = [len(slots)] * depth, [[[s] for s in slots]] * depth
        out.append(
            RowReport(
                None,
                all_of_them,
                len(slots),
                [slots] * depth,
                made,
                asked=[*all_of_them],
                seen=[*all_of_them],
                cached=[n * trace.cached for n in all_of_them],
            )
        )
    return out


__all__ = ["Geometry", "Report", "RowReport", "report"]
