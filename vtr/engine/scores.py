"""Attention that vision tokens get from text queries: from q and k of the rows asked for, never from a full matrix."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from vtr.base import UnsupportedError

CHUNK = 64
"""Scores of many text queries are taken so many at a time."""


@dataclass(frozen=True, eq=False)
class WindowMask:
    """A sliding window: queries ([n] positions) see keys ([m] positions) less than ``window`` before them."""

    queries: torch.Tensor
    keys: torch.Tensor
    window: int

    def seen(self, some: torch.Tensor | None = None) -> torch.Tensor:
        """bool [n or len(some), m]: which keys the queries (all, or ``some`` of them, int64) may see."""
        queries = self.queries if some is None else self.queries.index_select(0, some)
        distance = queries[:, None] - self.keys[None]
        return (distance >= 0) & (distance < self.window)


def scores(
    query: torch.Tensor, key: torch.Tensor, queries: torch.Tensor, scaling: float | None,
    sliding: WindowMask | None = None, strongest: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention that keys get from some queries of one row: mean over heads, and over the queries that can see the key.

    Args:
        query: [1, heads, n, d] after rope; key: [1, kv_heads, m, d], of which the last n belong to the queries.
        queries: int64 [q], indices into the n.
        scaling: of the logits; None for d ** -0.5.
        sliding: what a sliding window hides, or None. strongest: of each query, the largest over heads, not their mean.

    Returns:
        float32 [m]; 0 for a key that none of the queries can see.
    """
    heads, kv_heads, m = query.shape[1], key.shape[1], key.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    total = torch.zeros(m, dtype=torch.float32, device=query.device)
    seen_by = torch.zeros(m, dtype=torch.int64, device=query.device)
    columns = torch.arange(m, device=query.device)
    for some in queries.split(CHUNK):
        seen = columns <= (some + (m - query.shape[2]))[:, None] if sliding is None else sliding.seen(some)
        q = query[0].index_select(1, some).view(kv_heads, heads // kv_heads * some.shape[0], -1)
        logits = torch.matmul(q, key[0].transpose(1, 2)).float().mul_(scaling).view(heads, some.shape[0], m)
        logits.masked_fill_(~seen, float("-inf"))
        paid = logits.softmax(-1)
        total += (paid.amax(0) if strongest else paid.mean(0)).sum(0)
        seen_by += seen.sum(0)
    return total / seen_by.clamp_(min=1)


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
    layer: Any,
    hidden: torch.Tensor,
    rope: tuple[torch.Tensor, ...],
    query: torch.Tensor,
    past: torch.Tensor | None,
    sliding: WindowMask | None,
) -> torch.Tensor:
    """Attention that one query is about to pay in ``layer``, from the layer's own norm and projections.

    Args:
        hidden: [n, D], a row's tokens entering the layer; rope: cos and sin, [1, n, d] each, of their positions.
        query: int64 [1], which of the n asks. past: [1, kv_heads, p, d] cached keys of the row, or None.

    Returns:
        float32 [p + n], mean over heads.
    """
    attn = projections(layer)
    rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb
    x = layer.input_layernorm(hidden)[None]
    q, k = _heads(attn, "q", x.index_select(1, query)), _heads(attn, "k", x)
    at = [t.index_select(1, query) for t in rope]
    q, k = rotate(q, q, *at)[0], rotate(k, k, *rope)[1]
    if past is not None:
        k = torch.cat([past, k], 2)
    last = torch.zeros(1, dtype=torch.int64, device=hidden.device)
    if sliding is None:  # the keys behind the query are its future
        own = k.shape[2] - x.shape[1] + query
        k_seen = torch.arange(k.shape[2], device=hidden.device)
        sliding = WindowMask(own, k_seen, k.shape[2])
    return scores(q, k, last, getattr(attn, "scaling", None), sliding)


def _heads(attn: Any, kind: str, x: torch.Tensor) -> torch.Tensor:
    """[1, n, D] → [1, heads, n, head_dim], normalised where the family does so (Qwen3's q_norm and k_norm)."""
    states = getattr(attn, f"{kind}_proj")(x).view(1, x.shape[1], -1, attn.head_dim)
    norm = getattr(attn, f"{kind}_norm", None)
    normed: torch.Tensor = states if norm is None else norm(states)
    return normed.transpose(1, 2)
