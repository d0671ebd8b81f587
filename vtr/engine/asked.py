"""Attention of any rows under any reduction (:class:`vtr.Attention`), of all rows of a batch at once, in parts."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from vtr.answers import Attention
from vtr.engine.scores import CHUNK, attention_logits
from vtr.engine.sight import OwnMask, near


@dataclass(frozen=True, eq=False)
class Asked:
    """Tokens of some rows whose attention is asked for, all under one reduction.

    Attributes:
        request: how heads and tokens are reduced. number: which of these rows' requests it is.
        rows: which rows of the batch. sizes: how many tokens each asks with.
        places: int64 [rows, most], where they stand in the packed sequence, filled up with any place of the row.
        counted: bool [rows, most], False where it is filled up; None where nothing is.
        starts: int64 [rows], places at which the rows begin. lengths: how many tokens each has.
    """

    request: Attention
    number: int
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    places: torch.Tensor
    counted: torch.Tensor | None
    starts: torch.Tensor
    lengths: tuple[int, ...]

    def alone(self, past: int) -> Asked:
        """Of a single row, counted from its ``past`` cached tokens on, which come first."""
        places = self.places - self.starts[:, None] + past
        return replace(self, places=places, starts=self.starts * 0, lengths=(self.lengths[0] + past,))

    def flops(self, heads: int, head_dim: int, past: int = 0) -> int:
        """Matrix products of :meth:`found`, over so many cached tokens."""
        return 2 * self.places.numel() * (max(self.lengths) + past) * heads * head_dim

    def found(
        self, query: torch.Tensor, key: torch.Tensor, scaling: float | None, positions: torch.Tensor | None,
        window: int | None, own: OwnMask | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """float32 [rows, …, longest]: attention that each row's tokens get; 0 behind the end of a shorter row.

        Args:
            query: [heads, rows * most, d], those at ``places`` after rope. key: [kv_heads, T, d], of all packed tokens.
            scaling: of the logits; None for d ** -0.5.
            positions: int64 [T], where a sliding ``window`` hides what is that far behind a query.
            own: what the model's own mask says of the T tokens.
        """
        rows, most = self.places.shape
        longest, heads = max(self.lengths), query.shape[0]
        if most == 0:
            return query.new_zeros(rows, *self._kept(heads, most), longest, dtype=torch.float32)
        columns = self.starts[:, None] + torch.arange(longest, device=self.starts.device)
        hidden = columns[:, None] > self.places[..., None]
        inside = columns.clamp(max=key.shape[1] - 1).flatten()
        if window is not None and positions is not None:
            at = positions.index_select(0, inside).view_as(columns)
            now = positions.index_select(0, self.places.flatten()).view_as(self.places)
            hidden = hidden | ~near(now[..., None], at[:, None], window)
        if own is not None:
            hidden = ~own.over(~hidden, self.places, inside.view_as(columns))
        queries = query.unflatten(1, (rows, most))
        keys = key.index_select(1, inside).unflatten(1, (rows, longest))
        some_rows = max(CHUNK // (heads * most * longest), 1)
        some_queries = max(CHUNK // (heads * longest), 1) if some_rows == 1 else most
        parts = []
        for row in range(0, rows, some_rows):
            here = slice(row, row + some_rows)
            several = [
                self._reduced(
                    queries[:, here, those], keys[:, here], hidden[here, those], self._counted(here, those), scaling
                )
                for those in (slice(q, q + some_queries) for q in range(0, most, some_queries))
            ]
            parts.append(self._together(several))
        total = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.request.over != "mean":
            return total
        seen = ~hidden if self.counted is None else ~hidden & self.counted[..., None]
        times = seen.sum(1).clamp_(min=1)
        return total / (times[:, None] if self.request.heads == "each" else times)

    def _counted(self, rows: slice, queries: slice) -> torch.Tensor | None:
        return None if self.counted is None else self.counted[rows, queries]

    def _kept(self, heads: int, most: int) -> tuple[int, ...]:
        """The dimensions between rows and tokens."""
        return (heads,) * (self.request.heads == "each") + (most,) * (self.request.over == "each")

    def _reduced(
        self, query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor, counted: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor:  # fmt: skip
        """[heads, rows, q, d], [kv_heads, rows, n, d] → [rows, (heads,) (q,) n]; sums where the mean is asked for."""
        paid = attention_logits(query, key, hidden, scaling).softmax(-1)  # [kv_heads, rows, group, q, n]
        if counted is not None:
            paid = paid * counted[:, None, :, None]
        if self.request.heads == "each":
            paid = paid.permute(1, 0, 2, 3, 4).flatten(1, 2)
        else:
            paid = paid.amax((0, 2)) if self.request.heads == "max" else paid.mean((0, 2))
        if self.request.over == "each":
            return paid
        return paid.amax(-2) if self.request.over == "max" else paid.sum(-2)

    def _together(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """What several parts of the queries found, as one."""
        if len(parts) == 1:
            return parts[0]
        if self.request.over == "each":
            return torch.cat(parts, -2)
        stacked = torch.stack(parts)
        return stacked.amax(0) if self.request.over == "max" else stacked.sum(0)

    def of_rows(self, found: torch.Tensor) -> dict[int, torch.Tensor]:
        """row → [(heads,) (its q,) its tokens]."""
        out = {}
        for row, one, size, length in zip(self.rows, found, self.sizes, self.lengths, strict=True):
            mine = one[..., -length:] if len(self.rows) == 1 else one[..., :length]
            out[row] = mine[..., :size, :] if self.request.over == "each" else mine
        return out


@dataclass(frozen=True, eq=False)
class AskedNorms:
    """Rows that ask for the L1 norms of their keys, as their ``number``-th request.

    A norm depends on how far rope has turned a key, so keys are turned back by the position of their row's first token:
    where padding shifts positions, norms are those of the row alone.

    Attributes:
        back: cosine and minus sine of that position, [1, T, d] each.
    """

    number: int
    rows: tuple[int, ...]
    back: tuple[torch.Tensor, torch.Tensor]

    def flops(self, heads: int, head_dim: int, past: int = 0) -> int:
        """No matrix products."""
        return 0

    def found(self, key: torch.Tensor, heads: int, attn: Any) -> torch.Tensor:
        """float32 [T] of keys [kv_heads, T, d] after rope, of which each counts for ``heads // kv_heads``."""
        cos, sin = self.back
        turned = sys.modules[type(attn).__module__].apply_rotary_pos_emb(key[None], key[None], cos, sin)[1][0]
        scale = (cos.float().square() + sin.float().square()).mean(-1).sqrt()  # 1, unless rope scales attention
        return turned.float().abs().sum((0, 2)) / scale[0] * (heads // key.shape[0])


def as_attention(request: Any) -> Any:
    """The short forms written out; others as they are."""
    if not isinstance(request, str):
        return request
    rows, _, strongest = request.partition("-")
    return Attention(rows, "max" if strongest else "mean")
