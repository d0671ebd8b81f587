"""Attention that vision tokens get from text queries: from q and k of the rows asked for, never from a full matrix."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from vtr.base import UnsupportedError
from vtr.engine.sight import OwnMask, near
from vtr.engine.trace import Sizes

CHUNK = 1 << 24
"""Scores of many queries are taken in parts of about so many logits."""


@dataclass(frozen=True, eq=False)
class Queries:
    """The text tokens by whose attention some rows are ranked.

    Attributes:
        rows: which rows. places: int64 [rows, q], where the queries stand in the packed sequence; a row of fewer than q
            queries is filled up with any of its tokens.
        weight: float32 [rows, 1, q], 0 where it is filled up; None where nothing is. With ``behind`` they sum up to 1.
        behind: all queries see all vision tokens of their row, so that the mean over queries is a weighted sum.
        open: so many tokens, the first ones of each row, are seen by all of its queries: nothing masks them.
        starts: int64 [rows], places at which the rows begin. longest: tokens of the longest of them.
        run: the place at which the first of them begins, where they follow each other and are all as long; else None.
        strongest: of each query the largest over heads counts, not the mean.
    """

    rows: tuple[int, ...]
    places: torch.Tensor
    weight: torch.Tensor | None
    starts: torch.Tensor
    longest: int
    run: int | None
    behind: bool = False
    open: int = 0
    strongest: bool = False

    def alone(self, past: int) -> Queries:
        """Of a single row, counted from its ``past`` cached tokens on, which come first."""
        places = self.places - self.starts[:, None] + past
        return replace(
            self, places=places, starts=self.starts * 0, longest=self.longest + past, open=self.open + past, run=0
        )

    def flops(self, heads: int, head_dim: int, past: int = 0) -> int:
        """Matrix products of :func:`scores`, those of filled-up rows included, over so many cached tokens."""
        products = len(self.places) * self.places.shape[1] * (self.longest + past)
        weighted = 0 if self.weight is None else 1 if self.behind else 2
        return 2 * products * (heads * head_dim + weighted)

    def found(
        self, query: torch.Tensor, key: torch.Tensor, scaling: float | None, positions: torch.Tensor | None,
        window: int | None, own: OwnMask | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """float32 [T]: see :func:`scores`."""
        return scores(query, key, self, scaling, positions, window, own)

    def columns(self) -> torch.Tensor:
        """int64 [rows, longest]: the places of each row's tokens; behind a shorter row's end those of the next."""
        rows = len(self.places)
        if self.run is not None:
            end = self.run + rows * self.longest
            return torch.arange(self.run, end, device=self.starts.device).view(rows, self.longest)
        return self.starts[:, None] + torch.arange(self.longest, device=self.starts.device)


def scores(
    query: torch.Tensor, key: torch.Tensor, asked: Queries, scaling: float | None,
    positions: torch.Tensor | None = None, window: int | None = None, own: OwnMask | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention that tokens get from some queries of their row: mean over heads, and over queries that can see them.

    Args:
        query: [heads, rows * q, d], those of ``asked`` after rope. key: [kv_heads, T, d], of all packed tokens.
        scaling: of the logits; None for d ** -0.5.
        positions: int64 [T], where a sliding ``window`` hides what is that far behind a query.
        own: what the model's own mask says of the T tokens; nothing is ``open`` then.

    Returns:
        float32 [T]; 0 for a token that none of the queries can see, and in rows that are not asked. With
        ``asked.behind``, of vision tokens only.
    """
    rows, most = asked.places.shape
    tokens, n = key.shape[1], asked.longest
    if most == 0:
        return torch.zeros(tokens, device=key.device)
    columns = asked.columns()
    # [rows, q, columns that are not open]; what stands behind a row's end is hidden too
    hidden = columns[:, None, asked.open :] > asked.places[..., None]
    inside = columns if asked.run is not None else columns.clamp(max=tokens - 1)
    if asked.run is None:
        keys = key.index_select(1, inside.flatten())
    else:
        keys = key[:, asked.run : asked.run + rows * n]
    if window is not None and positions is not None:
        at = positions.index_select(0, inside.flatten()).view_as(columns)
        now = positions.index_select(0, asked.places.flatten()).view_as(asked.places)
        hidden = hidden | ~near(now[..., None], at[:, None, asked.open :], window)
    if own is not None:
        hidden = ~own.over(~hidden, asked.places, inside)
    paid = _paid(query.unflatten(1, (rows, most)), keys.unflatten(1, (rows, n)), hidden, asked, scaling)
    if not asked.behind:
        seen = ~hidden
        seen_by = seen.sum(1) if asked.weight is None else torch.matmul(asked.weight, seen.to(paid.dtype))[:, 0]
        paid = paid / seen_by.clamp_(min=1)
    elif most > 1 and asked.weight is None:
        paid = paid / most
    paid = paid.flatten()
    if asked.run is None:  # what stands behind a row's end was hidden, so that the next row gets zeros added
        return paid.new_zeros(tokens + n).index_add(0, columns.flatten(), paid)[:tokens]
    return paid if len(paid) == tokens else pad(paid, (asked.run, tokens - asked.run - len(paid)))


def _paid(
    query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor, asked: Queries, scaling: float | None
) -> torch.Tensor:
    """float32 [rows, n]: what the queries [heads, rows, q, d] pay to the keys [kv_heads, rows, n, d], in parts."""
    heads, rows, most, _ = query.shape
    n = key.shape[2]
    some_rows = max(CHUNK // (heads * most * n), 1)
    some_queries = max(CHUNK // (heads * n), 1) if some_rows == 1 else most
    parts = []
    for row in range(0, rows, some_rows):
        here, total = slice(row, row + some_rows), None
        for first in range(0, most, some_queries):
            those = slice(first, first + some_queries)
            weight = None if asked.weight is None else asked.weight[here, :, those]
            part = _paid_at_once(
                query[:, here, those], key[:, here], hidden[here, those], weight, asked.strongest, scaling
            )
            total = part if total is None else total + part
        assert total is not None
        parts.append(total)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _paid_at_once(
    query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor | None, strongest: bool,
    scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    heads = query.shape[0]
    logits = attention_logits(query, key, hidden, scaling)
    paid = logits.softmax(-1)
    by_query = paid.amax((0, 2)) if strongest else paid.sum((0, 2)) if weight is not None else None
    if weight is not None:
        assert by_query is not None
        total = torch.matmul(weight, by_query)[:, 0]
    else:
        total = paid.sum((0, 2, 3)) if by_query is None else by_query.sum(1)
    return total if strongest else total / heads


def attention_logits(
    query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor, scaling: float | None
) -> torch.Tensor:  # fmt: skip
    """Logits of queries [heads, rows, q, d] on keys [kv_heads, rows, n, d], float32 [kv_heads, rows, group, q, n].

    Args:
        hidden: bool [rows, q, h], which of the last h keys a query must not see.
    """
    heads, rows, most, width = query.shape
    kv_heads, n = key.shape[0], key.shape[2]
    scaling = width**-0.5 if scaling is None else scaling
    grouped = query.unflatten(0, (kv_heads, -1)).transpose(1, 2).reshape(kv_heads * rows, -1, width)
    keys = key.reshape(kv_heads * rows, n, width)
    logits = torch.baddbmm(grouped.new_empty(1, 1, 1), grouped, keys.transpose(1, 2), beta=0, alpha=scaling).float()
    logits = logits.view(kv_heads, rows, heads // kv_heads, most, n)
    if hidden.shape[-1]:
        logits[..., n - hidden.shape[-1] :].masked_fill_(hidden[None, :, None], float("-inf"))
    return logits


PLAIN = (
    "LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Qwen2VLAttention", "Qwen2_5_VLAttention",
    "Qwen3VLTextAttention",
)  # fmt: skip
"""Attention modules that do nothing to queries and keys but project, normalise head by head, and turn them by rope."""


class Look:
    """Goes to an attention module in place of a plan, and takes the queries and keys that it makes.

    Attributes:
        query, key: [1, heads, T, d], [1, kv_heads, T, d] after rope. scaling: of the logits, or None.
    """

    taking = None

    def take(
        self, query: torch.Tensor, key: torch.Tensor, scaling: float | None, value: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        """What attention is to return meanwhile: zeros [1, T, heads, value size]."""
        self.query, self.key, self.scaling = query, key, scaling
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


def looked(
    layer: Any, hidden: torch.Tensor, rope: Any, places: torch.Tensor, call: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, float | None]:  # fmt: skip
    """Queries of some tokens and keys of all, as ``layer`` is about to make them, and what scales their products.

    Of modules that are known (:data:`PLAIN`) by their projections alone; others run, their cache and output left out.

    Args:
        hidden: [1, T, D]. places: int64 [q]. call: what else the layer is called with.

    Raises:
        UnsupportedError: the layer's norm or attention is not where it is looked for.
    """
    attn, norm = getattr(layer, "self_attn", None), getattr(layer, "input_layernorm", None)
    if attn is None or norm is None:
        raise UnsupportedError(
            f"{type(layer).__name__} has no self_attn behind an input_layernorm to rank tokens by before the layer "
            "runs: use a policy that ranks by the layer before (FastV, GSearch)"
        )
    x = norm(hidden)
    if type(attn).__name__ in PLAIN and all(hasattr(attn, name) for name in ("q_proj", "k_proj")):
        rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb
        q, k = _heads(attn, "q", x.index_select(1, places)), _heads(attn, "k", x)
        at = [t.index_select(1, places) for t in rope]
        return rotate(q, q, *at)[0], rotate(k, k, *rope)[1], getattr(attn, "scaling", None)
    look, takes = Look(), inspect.signature(type(attn).forward).parameters
    more = {name: value for name, value in call.items() if name in takes and name not in TAKEN}
    attn(hidden_states=x, position_embeddings=rope, attention_mask=None, vtr_plan=look, **more)
    return look.query.index_select(2, places), look.key, look.scaling


TAKEN = (
    "hidden_states", "position_embeddings", "attention_mask", "position_ids", "cache", "past_key_values", "vtr_plan"
)  # fmt: skip


def looking_costs(layer: Any, sizes: Sizes, width: int, tokens: int, queries: int) -> int:
    """FLOPs of the projections of :func:`looked`, for queries of some of so many tokens."""
    attn = layer.self_attn
    if type(attn).__name__ in PLAIN:
        kv_heads = sizes.cached // (2 * sizes.key)
        return 2 * sizes.key * width * (tokens * kv_heads + queries * sizes.heads)
    linears = [m for m in attn.modules() if isinstance(m, torch.nn.Linear)]
    return sum(2 * m.in_features * m.out_features * tokens for m in linears)


def expanded(module: Any, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is cached as keys and values, made into what attention works on (multi-head latent attention)."""
    made: tuple[torch.Tensor, torch.Tensor] = (keys, values)
    return module.expand_kv(keys, values) if hasattr(module, "expand_kv") else made


@torch.no_grad()
def ahead(
    layer: Any, hidden: torch.Tensor, rope: Any, asked: Any, past: tuple[torch.Tensor, torch.Tensor] | None,
    positions: torch.Tensor | None, window: int | None, own: OwnMask | None, call: Mapping[str, Any],
) -> torch.Tensor:  # fmt: skip
    """Attention that some tokens are about to pay in ``layer``, from the layer's own norm and projections.

    Args:
        hidden: [1, T, D], tokens entering the layer; rope: of their positions, in the layer's form.
        asked: :class:`Queries` with one query a row, or one row's :class:`~vtr.engine.asked.Asked`; places among the T.
        past: cached keys and values, [1, kv_heads, p, d] each, of a single row; or None.
        positions: int64 [p + T], where there is a sliding ``window``.
        own: what the model's own mask says of the p + T tokens. call: what else the layer is called with.

    Returns:
        float32 [T], mean over heads; of an ``Asked`` what its reduction makes, [1, …, T].
    """
    q, k, scaling = looked(layer, hidden, rope, asked.places.flatten(), call)
    if past is not None:
        before = expanded(layer.self_attn, *past)[0]
        k, asked = torch.cat([before, k], 2), asked.alone(before.shape[2])
    found: torch.Tensor = asked.found(q[0], k[0], scaling, positions, window, own)
    return found[..., -hidden.shape[1] :]


def _heads(attn: Any, kind: str, x: torch.Tensor) -> torch.Tensor:
    """[1, n, D] → [1, heads, n, head_dim], normalised where the family does so (Qwen3's q_norm and k_norm)."""
    states = getattr(attn, f"{kind}_proj")(x).view(1, x.shape[1], -1, attn.head_dim)
    norm = getattr(attn, f"{kind}_norm", None)
    normed: torch.Tensor = states if norm is None else norm(states)
    return normed.transpose(1, 2)
