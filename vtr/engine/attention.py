"""The attention functions ``vtr_sdpa``, ``vtr_eager``, …: the model's own function, called row by row on packed tokens.

They are registered once per base with transformers, hold no state, and without a plan in their keyword arguments they
are the base function itself. On a GPU one varlen kernel takes all rows of a prefill at once where torch or flash-attn
brings one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtr.base import UnsupportedError
from vtr.engine.asked import Asked, AskedNorms
from vtr.engine.attending import Taking, row_masks
from vtr.engine.bucket import Bucket
from vtr.engine.cache import RaggedLayer
from vtr.engine.once import Once
from vtr.engine.scores import Look, Queries, expanded
from vtr.engine.sight import OwnMask, WindowMask, near
from vtr.engine.temperature import by_position
from vtr.engine.trace import Clock
from vtr.engine.varlen import packed_attention

BASES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
PREFIX = "vtr_"
_registered: dict[str, str] = {}
"""Base → the name of our function over it, where it is registered."""

mlp_scale: ContextVar[torch.Tensor | None] = ContextVar("vtr_mlp_scale", default=None)
"""Weights the running layer's MLP output is multiplied by. Set by the attention function, which runs before the MLP in
the same layer and thread, also when gradient checkpointing replays the layer; taken by the MLP's hook."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Which attention scores are wanted: of all rows that ask for the same, or of one with cached tokens."""

    asked: Queries | Asked | AskedNorms
    row: int | None = None
    """The only row asked for, where rows have cached tokens; its scores are then of its own tokens [n]."""
    later: bool = False
    """Worked out only if somebody asks: what goes into the sink is then a function that does it."""


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
    sink: dict[int, Any] = field(default_factory=dict)
    """Where scores go: which probe → float32 [t], or [row's tokens] of a probe for one row; see ``Probe.later``."""
    clock: Clock | None = None
    scale: torch.Tensor | None = None
    """[1, t, 1] weights of the MLP output, or None."""
    routing: Routing | None = None
    remember: torch.Tensor | None = None
    """bool [rows] on the device: whether the decoded token is cached; None for all."""
    said: tuple[bool, ...] | None = None
    """``remember``, where the host knows it."""
    trace: Any = None
    """Of a decode step: where it is noted."""
    positions: torch.Tensor | None = None
    """int64 [t] ([rows] in decode): positions of the tokens, where the layer has a window or chunks, or its
    module scales queries by them; else None."""
    window: int | None = None
    """The layer's sliding window or chunk, where its attention module does not name one itself."""
    own: OwnMask | None = None
    """What the model's own mask says of the tokens; None where it is plainly causal."""
    max_distance: int = 0
    """No token of this forward is farther than this from any key: a window at least as long hides nothing."""
    masked_keys: torch.Tensor | None = None
    """bool [t]: tokens that no other token sees (forgotten words of a given answer); None for none."""
    taking: Taking | None = None
    """Who takes part in the attention, where not all tokens do."""
    once: Once = field(default_factory=Once)
    """Shared by the layers of the forward."""


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
    _registered[base] = name
    return name


class AttentionConfig:
    """What an attention module of a patched model has for its config: it names our function over the model's own.

    All else, also what is set, is the config's; the config itself never says that the model is patched.
    """

    def __init__(self, config: Any) -> None:
        self.__dict__["own"] = config

    @property
    def _attn_implementation(self) -> str:
        base = self.own._attn_implementation
        return _registered.get(base) or (attention_name(base) if base in BASES else base)

    def __getattr__(self, name: str) -> Any:
        if name == "own" or name.startswith("__"):  # asked by copy and pickle before there is a config
            raise AttributeError(name)
        return getattr(self.own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own, name, value)


class UnpatchedAttention:
    """An attention module as its base function knows it: flash wrappers look up their kernel by the config's name."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def config(self) -> Any:
        return self.module.config.own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def base_function(base: str, module: Any) -> Callable[..., Any]:
    """The model's own attention function ("eager" lives in the module's own file, the others in a table)."""
    if base == "eager":
        return partial(sys.modules[type(module).__module__].eager_attention_forward, module)
    return partial(ALL_ATTENTION_FUNCTIONS[base], UnpatchedAttention(module) if base.startswith("flash") else module)


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
    plan: Any = kwargs.pop("vtr_plan", None)
    if plan is None:
        as_ever: tuple[torch.Tensor, Any] = base_function(base, module)(query, key, value, attention_mask, **kwargs)
        return as_ever
    if isinstance(plan, Look):  # the attention of a layer that is about to run: queries and keys are all
        query = by_position(module, query, plan.positions, 0, plan.last)
        return plan.take(query, key, kwargs.get("scaling"), value), None
    if not isinstance(plan, Plan):  # a step of constant shapes
        return plan.attend(base, module, query, key, value, kwargs), None
    # rope is applied already; a flash wrapper would read gaps between kept positions as separate sequences
    kwargs.pop("position_ids", None)
    if plan.scale is not None:
        mlp_scale.set(plan.scale)
    if plan.positions is not None:
        past = 0 if plan.layers is None else plan.layers[module.layer_idx].get_seq_length()
        query = by_position(module, query, plan.positions, past, plan.max_distance)
    if "sliding_window" in kwargs:
        window = kwargs["sliding_window"]
    else:  # this family's modules leave it to the mask
        window = plan.layers[module.layer_idx].window if plan.decode else plan.window
    if window is not None and plan.max_distance <= window:
        window = None
    if plan.decode:
        return _decode(base, module, query, plan.layers[module.layer_idx], plan, window, kwargs), None
    _rank(plan, module, query, key, window, kwargs.get("scaling"))
    if plan.taking is not None:
        return _attend(base, module, query, key, value, plan, plan.taking, window, kwargs), None
    return _packed(base, module, query, key, value, plan, window, kwargs), None


def _packed(
    base: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan,
    window: int | None, kwargs: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """All rows of a prefill, every token of which takes part. [1, heads, T, d] → [1, T, heads, d]."""
    plain = plan.masked_keys is None and plan.own is None
    one_kernel = packed_attention(base, query, key, value, plan, window, kwargs) if plain else None
    if one_kernel is not None:
        return one_kernel(query, key, value)
    rows, n = len(plan.lengths), plan.lengths[0]
    if plain and rows > 1 and min(plan.lengths) == max(plan.lengths) and not any(plan.past) and window is None:
        # rows of one length are a batch as they lie
        q, k, v = (t[0].unflatten(1, (rows, n)).transpose(0, 1) for t in (query, key, value))
        return _one_row(base, module, q, k, v, None, None, kwargs).flatten(0, 1)[None]
    outs, start = [], 0
    for row, n in enumerate(plan.lengths):
        here = slice(start, start + n)
        start += n
        q, k, v = query[:, :, here], key[:, :, here], value[:, :, here]
        past = plan.past[row] if plan.past else 0
        if past:
            k, v = _cached(module, plan.layers[module.layer_idx], row, past + n)
        seen = _seen(plan, module, row, here, past + n, window)
        masked_keys = None if plan.masked_keys is None else plan.masked_keys[here]
        outs.append(_one_row(base, module, q, k, v, seen, masked_keys, kwargs))
    if window is not None and plan.past and not plan.layers[module.layer_idx].record_past:
        plan.layers[module.layer_idx].tidy(max(plan.lengths))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _attend(
    base: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, now: Taking,
    window: int | None, kwargs: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """A prefill in which only some tokens ask, and some are seen; the others get zeros."""
    query, key, value = query.index_select(2, now.asks), *(t.index_select(2, now.seen) for t in (key, value))
    if all(now.causal) and plan.masked_keys is None and plan.own is None and window is None and not plan.past:
        return now.scattered(
            _packed(base, module, query, key, value, replace(plan, lengths=now.ask_lengths), None, kwargs)
        )
    cache: Any = None if plan.layers is None else plan.layers[module.layer_idx]
    outs: list[torch.Tensor] = []

    def positions(row: int, before: int) -> torch.Tensor:
        assert plan.positions is not None
        asks, seen = (plan.positions.index_select(0, t) for t in (q_at[row], k_at[row]))
        return torch.cat([*([cache.positions(row, before)] if before else []), seen, asks])

    q_at, k_at = now.asks.split(now.ask_lengths), now.seen.split(now.seen_lengths)
    queries, keys, values = (
        query.split(now.ask_lengths, 2),
        key.split(now.seen_lengths, 2),
        value.split(now.seen_lengths, 2),
    )
    for row, mask in enumerate(row_masks(now, plan.past, positions, window, plan.masked_keys, plan.own)):
        k, v, past = keys[row], values[row], plan.past[row] if plan.past else 0
        if past:
            k, v = _cached(module, cache, row, past + k.shape[2])
        if mask is None:
            outs.append(_one_row(base, module, queries[row], k, v, None, None, kwargs))
            continue
        of = "sdpa" if base.startswith("flash") else base
        seen_by = _as_mask(of, mask[None, None], query.dtype)
        out = base_function(of, module)(queries[row], k, v, seen_by, **kwargs)[0]
        outs.append(out.masked_fill(~mask.any(1)[None, :, None, None], 0.0))  # who sees nobody gets nothing
    if window is not None and plan.past and not cache.record_past:
        cache.tidy(max(now.seen_lengths))
    return now.scattered(torch.cat(outs, 1))


@torch.no_grad()
def _rank(
    plan: Plan, module: Any, query: torch.Tensor, key: torch.Tensor, window: int | None, scaling: float | None
) -> None:
    """Take the scores that are wanted of this layer, once (gradient checkpointing runs it again)."""
    for number, probe in enumerate(plan.probes):
        if number in plan.sink:
            continue
        with nullcontext() if plan.clock is None else plan.clock:
            if isinstance(probe.asked, AskedNorms):
                norms = probe.asked.found(key[0], query.shape[1], module)
                plan.sink[number] = norms if probe.row is None else norms.split(plan.lengths)[probe.row]
                continue
            picked = query[0].index_select(1, probe.asked.places.flatten())
            found = partial(_paid, plan, module, probe, probe.asked, picked, key[0], window, scaling)
            plan.sink[number] = found if probe.later else found()


@torch.no_grad()
def _paid(
    plan: Plan, module: Any, probe: Probe, asked: Queries | Asked, query: torch.Tensor, keys: torch.Tensor,
    window: int | None, scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    """What a probe's queries [heads, q, d] pay to the packed tokens, whose keys are [kv_heads, t, d]."""
    at, own = None if window is None else plan.positions, plan.own
    if probe.row is None:
        return asked.found(query, keys, scaling, at, window, own)
    row, past = probe.row, plan.past[probe.row]
    start = sum(plan.lengths[:row])
    here = slice(start, start + plan.lengths[row])
    keys, at, asked = keys[:, here], None if at is None else at[here], asked.alone(past)
    if past:
        cache = plan.layers[module.layer_idx]
        keys = torch.cat([_cached(module, cache, row, past)[0][0], keys], 1)
        at = None if at is None else torch.cat([cache.positions(row, past), at])
    own = None if own is None else own.within(here, past)
    return asked.found(query, keys, scaling, at, window, own)[..., -plan.lengths[row] :]


def _cached(module: Any, cache: RaggedLayer, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one row, [1, kv_heads, length, head_dim] each; made of latents where these are cached."""
    return expanded(module, *cache.row(row, length))


def _seen(plan: Plan, module: Any, row: int, here: slice, keys: int, window: int | None) -> torch.Tensor | None:
    """bool [n, keys]: which of the row's tokens the queries ``here`` see; None if that is plainly causal."""
    seen, n = None, here.stop - here.start
    if window is not None and plan.positions is not None:
        own = plan.positions[here]
        at = own if keys == len(own) else plan.layers[module.layer_idx].positions(row, keys)
        seen = WindowMask(own, at, window).seen()
    if plan.own is None:
        return seen
    there = torch.arange(here.start, here.stop, device=plan.own.slots.device)
    seen = torch.ones(n, keys, dtype=torch.bool, device=there.device).tril(keys - n) if seen is None else seen
    return torch.cat([seen[:, : keys - n], plan.own.over(seen[:, keys - n :], there, there)], 1)


def _one_row(
    base: str, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None,
    masked_keys: torch.Tensor | None, kwargs: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """One row's queries on all its keys, of which they see those ``seen``. [1, heads, n, d] → [1, n, heads, d]."""
    n, m, mask = q.shape[2], k.shape[2], None
    if seen is not None or masked_keys is not None:
        if base.startswith("flash"):  # its windows count tokens, not positions: gaps need a mask
            base = "sdpa"
        seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n) if seen is None else seen
        if masked_keys is not None:
            seen = seen & (~masked_keys | torch.eye(n, dtype=torch.bool, device=q.device))
        mask = _as_mask(base, seen[None, None], q.dtype)
    elif n > 1 and (n < m or base == "eager") and not base.startswith("flash"):  # flash kernels align it by themselves
        causal = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        mask = _as_mask(base, causal[None, None], q.dtype)
    out: torch.Tensor = base_function(base, module)(q, k, v, mask, **kwargs)[0]
    return out


def _decode(
    base: str,
    module: Any,
    query: torch.Tensor,
    cache: RaggedLayer,
    plan: Plan,
    window: int | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """One new token per row, query [rows, heads, 1, d]: one call per bucket of rows of similar length."""
    now = None if window is None or plan.positions is None else cache.parted(cache.here(plan.positions, query))
    plain, outs = _plain_sdpa(base, query, kwargs), []
    for i, (bucket, q) in enumerate(zip(cache.buckets, cache.parted(query), strict=True)):
        n, of, mask, close = bucket.upper + 1, base, None, None
        if now is not None and bucket.positions is not None and window is not None:
            close = near(now[i][:, None], bucket.positions[:, :n], window)
        if close is not None or bucket.ragged is not None:
            of = "sdpa" if base.startswith("flash") else base  # flash wrappers copy all that a mask lets through
            mask = _decode_mask(plan.once, of, bucket, n, close, query.dtype)
        k, v = expanded(module, bucket.keys.narrow(2, 0, n), bucket.values.narrow(2, 0, n))
        if plain:
            outs.append(_one_token(q, k, v, mask, kwargs.get("scaling")))
        else:
            outs.append(base_function(of, module)(q, k, v, mask, **kwargs)[0])
    cache.attend_done(plan.remember, plan.said)
    return cache.in_order(outs)


def _plain_sdpa(base: str, query: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether transformers' function would do nothing for one token a row that :func:`_one_token` does not."""
    if base != "sdpa" or query.device.type not in ("cpu", "cuda") or kwargs.get("dropout"):
        return False
    said = kwargs.get("softcap"), kwargs.get("position_bias"), kwargs.get("output_attentions")
    return said == (None, None, None) and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def _one_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Of one token a row, [b, heads, 1, d] → [b, 1, heads, d]: heads that share keys are queries of one head."""
    rows, heads, _, size = query.shape
    kv_heads = keys.shape[1]
    if heads != kv_heads:
        query = query.reshape(rows, kv_heads, heads // kv_heads, size)
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, -1)


def _decode_mask(
    once: Once, base: str, bucket: Bucket, n: int, close: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """[b, 1, 1, n] that lets a bucket's rows see what they hold, the token of this step among it, and is ``close``.

    Layers of the same lengths share it.
    """

    def make() -> torch.Tensor:
        wide = -(-n // 16) * 16  # kernels of GPUs take rows that begin at multiples of 16
        seen = torch.arange(wide, device=bucket.keys.device) <= bucket.lens[:, None]
        return as_numbers(seen, base, dtype)[:, None, None, :n]

    if close is None:
        made: torch.Tensor = once.of("mask", bucket.ragged, n, dtype, base, make=make)
        return made
    if bucket.ragged is not None:
        close = close & (torch.arange(n, device=close.device) <= bucket.lens[:, None])
    return as_numbers(close, base, dtype)[:, None, None]


def attend_filled(
    base: str, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor,
    kwargs: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """One token a row over the keys that ``mask`` lets it see, [b, heads, 1, d] → [b, 1, heads, d]."""
    kwargs.pop("position_ids", None)
    of = "sdpa" if base.startswith("flash") else base
    if _plain_sdpa(of, q, kwargs):
        return _one_token(q, k, v, mask, kwargs.get("scaling"))
    out: torch.Tensor = base_function(of, module)(q, k, v, mask, **kwargs)[0]
    return out


def as_numbers(seen: torch.Tensor, base: str, dtype: torch.dtype) -> torch.Tensor:
    """bool, True = may be seen, as numbers to be added to scores, which "sdpa" would make of it in every layer."""
    least = torch.finfo(dtype).min if base == "eager" else float("-inf")
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, least)


def _as_mask(base: str, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bool, True = may be seen, in the form ``base`` takes."""
    return seen if base == "sdpa" else as_numbers(seen, base, dtype)
