"""The attention functions ``vtr_sdpa``, ``vtr_eager``, …: the model's own function, called row by row on packed tokens.

They are registered once per base with transformers, hold no state, and without a plan in their keyword arguments they
are the base function itself. Attention scores come from q and k of the rows asked for, never from a full matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtr.base import UnsupportedError
from vtr.engine.cache import RaggedLayer
from vtr.engine.trace import Clock

BASES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
PREFIX = "vtr_"
CHUNK = 64
"""Scores of many text queries are taken so many at a time."""

mlp_scale: ContextVar[torch.Tensor | None] = ContextVar("vtr_mlp_scale", default=None)
"""Weights the running layer's MLP output is multiplied by. Set by the attention function, which runs before the MLP in
the same layer and thread, also when gradient checkpointing replays the layer; taken by the MLP's hook."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Which attention scores of one row are wanted: those of these queries (row-local indices, int64 [q])."""

    row: int
    queries: torch.Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    """A layer that some tokens go around: what to put back after it."""

    around: torch.Tensor
    """[1, T, D]: the hidden states of all tokens, those that go around already scaled."""
    through: torch.Tensor
    """int64 [t]: packed indices of the tokens that pass the layer."""


@dataclass(frozen=True, eq=False)
class Plan:
    """All that one decoder layer needs to know; travels in the layer's keyword arguments and never changes."""

    decode: bool
    lengths: tuple[int, ...] = ()
    """Tokens of each row in the packed sequence (not used in decode, where each row is one token)."""
    past: tuple[int, ...] = ()
    """Tokens each row already has in this layer's cache; empty when there are none."""
    layers: Any = None
    """The cache's layers, or None without cache."""
    probes: tuple[Probe, ...] = ()
    sink: dict[int, torch.Tensor] = field(default_factory=dict)
    """Where scores go: row → float32 [row's tokens]."""
    clock: Clock | None = None
    scale: torch.Tensor | None = None
    """[1, t, 1] weights of the MLP output, or None."""
    routing: Routing | None = None
    remember: torch.Tensor | None = None
    """bool [rows] on the device: whether the decoded token is cached; None for all."""
    trace: Any = None
    """Of a decode step: where it is noted."""


def attention_name(base: str) -> str:
    """The name of our function over ``base``, registered on first use.

    Raises:
        UnsupportedError: a base that cannot be called row by row.
    """
    if base not in BASES:
        raise UnsupportedError(
            f"attention implementation {base!r} is not supported; load the model with attn_implementation='sdpa' "
            f"(or one of: {', '.join(BASES)})"
        )
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, partial(attention, base))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def base_function(base: str, module: torch.nn.Module) -> Callable[..., Any]:
    """The model's own attention function ("eager" lives in the module's own file, the others in a table)."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def attention(
    base: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Attention as transformers asks for it; with a plan, row by row. query [1, heads, T, d] → [1, T, heads, d]."""
    plan: Plan | None = kwargs.pop("vtr_plan", None)
    call = base_function(base, module)
    if plan is None:
        return call(module, query, key, value, attention_mask, **kwargs)
    # rope is applied already; a flash wrapper would read gaps between kept positions as separate sequences
    kwargs.pop("position_ids", None)
    if plan.scale is not None:
        mlp_scale.set(plan.scale)
    if plan.decode:
        return _decode(base, call, module, query, plan.layers[module.layer_idx], plan, kwargs), None
    outs, start = [], 0
    for row, n in enumerate(plan.lengths):
        here = slice(start, start + n)
        start += n
        q, k, v, mask = query[:, :, here], key[:, :, here], value[:, :, here], None
        if plan.past and plan.past[row]:
            k, v = plan.layers[module.layer_idx].row(row, plan.past[row] + n)
            mask = _causal(base, n, k.shape[2], q)
        elif base == "eager" and n > 1:
            mask = _causal(base, n, n, q)
        outs.append(call(module, q, k, v, mask, **kwargs)[0])
        for probe in plan.probes:
            if probe.row == row and row not in plan.sink:
                with torch.no_grad():
                    plan.sink[row] = _timed_scores(plan.clock, q, k, probe.queries, kwargs.get("scaling"))[-n:]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1), None


def _decode(
    base: str, call: Callable[..., Any], module: Any, query: torch.Tensor, cache: RaggedLayer, plan: Plan, kwargs: dict
) -> torch.Tensor:
    """One new token per row, query [rows, heads, 1, d]: one call per bucket of rows of similar length."""
    outs = []
    for bucket in cache.buckets:
        q, n = query if cache.whole else query[bucket.rows], bucket.upper + 1
        mask = None
        if not bucket.equal:
            seen = torch.arange(n, device=q.device)[None] <= bucket.lens[:, None]
            mask = _as_mask(base, seen, q.dtype)
        outs.append(call(module, q, bucket.keys[:, :, :n], bucket.values[:, :, :n], mask, **kwargs)[0])
    cache.attend_done(plan.remember)
    return cache.in_order(outs)


def _as_mask(base: str, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bool [rows, keys], True = may be seen, in the form ``base`` takes for a single query."""
    if base.startswith("flash"):
        return seen
    mask = seen[:, None, None]
    return (
        mask
        if base == "sdpa"
        else torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    )


def _causal(base: str, queries: int, keys: int, like: torch.Tensor) -> torch.Tensor | None:
    """The causal mask of the last ``queries`` of ``keys`` tokens (flash kernels align it so by themselves)."""
    if base.startswith("flash") or queries == 1:
        return None
    seen = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)[None, None]
    if base == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~seen, torch.finfo(like.dtype).min
    )


def _timed_scores(clock: Clock | None, *args: Any) -> torch.Tensor:
    if clock is None:
        return scores(*args)
    with clock:
        return scores(*args)


def scores(query: torch.Tensor, key: torch.Tensor, queries: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Attention that keys get from some queries of one row: mean over heads, and over the queries that can see the key.

    Args:
        query: [1, heads, n, d] after rope; key: [1, kv_heads, m, d], of which the last n belong to the queries.
        queries: int64 [q], indices into the n.
        scaling: of the logits; None for d ** -0.5.

    Returns:
        float32 [m]; 0 for a key that none of the queries can see.
    """
    heads, kv_heads, m = query.shape[1], key.shape[1], key.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    where = queries + (m - query.shape[2])
    total = torch.zeros(m, dtype=torch.float32, device=query.device)
    columns = torch.arange(m, device=query.device)
    for some, at in zip(queries.split(CHUNK), where.split(CHUNK), strict=True):
        q = query[0].index_select(1, some).view(kv_heads, heads // kv_heads * some.shape[0], -1)
        logits = torch.matmul(q, key[0].transpose(1, 2)).float().mul_(scaling).view(heads, some.shape[0], m)
        logits.masked_fill_(columns > at[:, None], float("-inf"))
        total += logits.softmax(-1).mean(0).sum(0)
    seen_by = (columns <= where[:, None]).sum(0).clamp_(min=1)
    return total / seen_by
