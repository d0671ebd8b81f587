"""Attention that vision tokens get from text queries: from q and k of the rows asked for, never from a full matrix."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from vtr.base import UnsupportedError

CHUNK = 1 << 24
"""Scores of many queries are taken in parts of about so many logits."""


@dataclass(frozen=True, eq=False)
class WindowMask:
    """A sliding window: queries ([n] positions) see keys ([m] positions) less than ``window`` before them."""

    queries: torch.Tensor
    keys: torch.Tensor
    window: int

    def seen(self) -> torch.Tensor:
        """bool [n, m]: which keys the queries may see."""
        distance, (n, m) = self.queries[:, None] - self.keys[None], (len(self.queries), len(self.keys))
        causal = torch.ones(n, m, dtype=torch.bool, device=distance.device).tril(m - n)  # merged tokens share positions
        return causal & (distance < self.window)


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
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """float32 [T]: see :func:`scores`."""
        return scores(query, key, self, scaling, positions, window)

    def columns(self) -> torch.Tensor:
        """int64 [rows, longest]: the places of each row's tokens; behind a shorter row's end those of the next."""
        rows = len(self.places)
        if self.run is not None:
            end = self.run + rows * self.longest
            return torch.arange(self.run, end, device=self.starts.device).view(rows, self.longest)
        return self.starts[:, None] + torch.arange(self.longest, device=self.starts.device)


def scores(
    query: torch.Tensor, key: torch.Tensor, asked: Queries, scaling: float | None,
    positions: torch.Tensor | None = None, window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention that tokens get from some queries of their row: mean over heads, and over queries that can see them.

    Args:
        query: [heads, rows * q, d], those of ``asked`` after rope. key: [kv_heads, T, d], of all packed tokens.
        scaling: of the logits; None for d ** -0.5.
        positions: int64 [T], where a sliding ``window`` hides what is that far behind a query.

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
        hidden = hidden | (now[..., None] - at[:, None, asked.open :] >= window)
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


def projections(layer: Any) -> Any:
    """The attention module of a decoder layer whose queries and keys can be taken before the layer runs.

    Raises:
        UnsupportedError: the layer is not built of ``input_layernorm`` and ``self_attn.{q,k}_proj``.
    """
    attn = getattr(layer, "self_attn", None)
    if attn is None or not all(hasattr(attn, name) for name in ("q_proj", "k_proj", "head_dim")):
        raise UnsupportedError(
            f"{type(layer).__name__} has no self_attn.q_proj and k_proj to rank tokens by before the layer runs: use a "
            "policy that ranks by the layer before (FastV, GSearch)"
        )
    return attn


@torch.no_grad()
def ahead(
    layer: Any, hidden: torch.Tensor, rope: tuple[torch.Tensor, ...], asked: Any, past: torch.Tensor | None,
    positions: torch.Tensor | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Attention that some tokens are about to pay in ``layer``, from the layer's own norm and projections.

    Args:
        hidden: [1, T, D], tokens entering the layer; rope: cos and sin, [1, T, d] each, of their positions.
        asked: :class:`Queries` with one query a row, or one row's :class:`~vtr.engine.asked.Asked`; places among the T.
        past: [1, kv_heads, p, d] cached keys, of a single row; or None.
        positions: int64 [p + T], where there is a sliding ``window``.

    Returns:
        float32 [T], mean over heads; of an ``Asked`` what its reduction makes, [1, …, T].
    """
    attn = projections(layer)
    rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb
    x, places = layer.input_layernorm(hidden), asked.places.flatten()
    q, k = _heads(attn, "q", x.index_select(1, places)), _heads(attn, "k", x)
    at = [t.index_select(1, places) for t in rope]
    q, k = rotate(q, q, *at)[0], rotate(k, k, *rope)[1]
    if past is not None:
        k, asked = torch.cat([past, k], 2), asked.alone(past.shape[2])
    found: torch.Tensor = asked.found(q[0], k[0], getattr(attn, "scaling", None), positions, window)
    return found[..., -hidden.shape[1] :]


def _heads(attn: Any, kind: str, x: torch.Tensor) -> torch.Tensor:
    """[1, n, D] → [1, heads, n, head_dim], normalised where the family does so (Qwen3's q_norm and k_norm)."""
    states = getattr(attn, f"{kind}_proj")(x).view(1, x.shape[1], -1, attn.head_dim)
    norm = getattr(attn, f"{kind}_norm", None)
    normed: torch.Tensor = states if norm is None else norm(states)
    return normed.transpose(1, 2)
