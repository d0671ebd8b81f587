"""Greedy choices of few tokens among many: far apart, covering the others, of large determinant, relevant and new.

All of them take tiles at once ([tiles, n, …], float32), never choose a token twice, and let the lower index win a tie.
Tokens that are not ``there`` come last, so that the first picks of each tile are its own. No step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import threshold

LOWEST = torch.finfo(torch.float32).min
"""The score of a token that is not there: above that of one already chosen."""
DEARER = 12
"""A row of cosines alone takes so many times as long as one of all rows in one product (one CPU thread)."""
SPENT = 1e-6
"""Share of itself below which what is left of a token is rounding noise."""

Row = Callable[[torch.Tensor], torch.Tensor]
"""A token of each tile (int64 [tiles, 1]) → its cosines with all, [tiles, n]."""


def unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors [..., width] made float32 and of length 1; zero stays zero."""
    x = x.float()
    lengths: torch.Tensor = x.norm(dim=-1, keepdim=True)
    return x / lengths.clamp(min=1e-8)


def barred(there: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    """A new [tiles, n] like ``scores``: 0, and :data:`LOWEST` for tokens that are not there (None: all are)."""
    out = torch.zeros_like(scores)
    return out if there is None else out.masked_fill_(~there.to(scores.device, non_blocking=True), LOWEST)


def only(there: torch.Tensor) -> torch.Tensor | None:
    """``there`` (on the CPU), or None if all tokens are."""
    return None if bool(there.all()) else there


def rows_of(table: torch.Tensor) -> Row:
    """The rows of [tiles, n, n], each by its token."""
    tiles, n, _ = table.shape
    flat, first = table.flatten(0, 1), torch.arange(0, tiles * n, n, device=table.device)[:, None]
    return lambda j: flat.index_select(0, (first + j)[:, 0])


def products(units: torch.Tensor) -> tuple[torch.Tensor, int]:
    """All products of ``units`` [tiles, n, width] with each other, [tiles, n, n], and the FLOPs they took.

    On a CPU most of what lies below the diagonal is copied from above it.
    """
    tiles, n, width = units.shape
    step = -(-n // 3) if units.device.type == "cpu" and n >= 192 else n
    if step == n:
        return torch.bmm(units, units.transpose(1, 2)), 2 * tiles * n * n * width
    out, flops = units.new_empty(tiles, n, n), 0
    for a in range(0, n, step):
        block = torch.bmm(units[:, a : a + step], units[:, a:].transpose(1, 2))
        out[:, a : a + step, a:] = block
        out[:, a + step :, a : a + step] = block[:, :, step:].transpose(1, 2)
        flops += 2 * width * block.numel()
    return out, flops


def cosines(units: torch.Tensor, rows: int) -> tuple[Row, int]:
    """Cosines of ``units`` [tiles, n, width], of which so many rows will be asked for; and the FLOPs they take."""
    tiles, n, width = units.shape
    if rows * DEARER >= n:
        table, flops = products(units)
        return rows_of(table), flops
    one = rows_of(units)
    return lambda j: torch.bmm(units, one(j)[:, :, None])[..., 0], 2 * tiles * rows * n * width


@torch.no_grad()
def farthest(units: torch.Tensor, count: int, there: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """Tokens far from each other: first the one whose nearest neighbour is farthest, then whoever is farthest from all
    chosen ones. The distance is 1 − cosine.

    Args:
        units: [tiles, n, width], of length 1. there: bool [tiles, n], or None for all.

    Returns:
        int64 [tiles, count], in the order of choice (count at most n); the FLOPs of the products.
    """
    if not count:
        return torch.empty(len(units), 0, dtype=torch.int64, device=units.device), 0
    table, flops = products(units)
    apart = table.neg_().add_(1)
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    if there is not None:
        apart.masked_fill_(~there.to(apart.device, non_blocking=True)[:, None], torch.inf)
    bar, row = barred(there, apart[:, 0]), rows_of(apart)
    scores = torch.where(bar < 0, bar, apart.amin(2))
    far, picks = torch.where(bar < 0, bar, torch.inf), []
    for _ in range(count):
        picks.append(scores.argmax(1, keepdim=True))
        far = torch.minimum(far, row(picks[-1])).scatter_(1, picks[-1], -torch.inf)
        scores = far
    return torch.cat(picks, 1), flops


@torch.no_grad()
def marginal(
    units: torch.Tensor, importance: torch.Tensor, count: int, trade: float = 0.5, parallel: int = 1,
    there: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """Tokens that are important and unlike those already chosen: maximal marginal relevance.

    First the most important; then by ``trade · importance − (1 − trade) · largest cosine with a chosen one``, the best
    ``parallel`` ones at a time.

    Args:
        units: [tiles, n, width], of length 1. importance: float32 [tiles, n]. there: bool [tiles, n], or None for all.

    Returns:
        int64 [tiles, count], in the order of choice (count at most n); the FLOPs of the products.
    """
    bar = barred(there, importance)
    if not count:
        return torch.empty(len(units), 0, dtype=torch.int64, device=units.device), 0
    row, flops = cosines(units, count - 1 - (count - 1) % parallel)  # all but the last ones chosen are asked about
    scores, weighed = importance + bar, trade * importance + bar
    near, picks, left = torch.full_like(scores, -2.0), [], count
    while left:
        k = min(parallel, left)
        best = scores.argmax(1, keepdim=True) if k == 1 else scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        picks.append(best)
        weighed.scatter_(1, best, -torch.inf)
        left -= k
        if left:
            for i in range(k):
                near = torch.maximum(near, row(best[:, i : i + 1]))
            scores = torch.sub(weighed, near, alpha=1 - trade)
    return torch.cat(picks, 1), flops


@torch.no_grad()
def covering(
    table: torch.Tensor, count: int, there: torch.Tensor | None = None, factor: torch.Tensor | None = None,
    bonus: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Tokens that together cover what is to be covered: who adds most to ``Σ rows max over chosen of table``.

    Args:
        table: float32 [tiles, rows, n], how well each token covers each row; what is negative counts as 0.
        there: bool [tiles, n], or None for all. factor, bonus: [tiles, n], what the gain is multiplied by, and what is
            added to it.

    Returns:
        int64 [tiles, count], in the order of choice (count at most n); float32 [tiles, rows], how well each row is
        covered.
    """
    if not count:
        return torch.empty(len(table), 0, dtype=torch.int64, device=table.device), torch.zeros_like(table[..., 0])
    bar = barred(there, table[:, 0])
    if table.device.type != "cpu":
        return _covering_all(table, count, bar, factor, bonus)
    done = [
        _covering_one(table[t], count, bar[t], *(None if x is None else x[t].double() for x in (factor, bonus)))
        for t in range(len(table))
    ]
    return torch.stack([picks for picks, _ in done]), torch.stack([covered for _, covered in done])


def _covering_all(
    table: torch.Tensor, count: int, bar: torch.Tensor, factor: torch.Tensor | None, bonus: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`covering` of all tiles together, every gain summed anew: which rows change, only the device knows."""
    covered, picks = torch.zeros_like(table[..., :1]), []
    for _ in range(count):
        gain = (table - covered).clamp_(min=0).sum(1)
        picks.append((_worth(gain, factor, bonus) + bar).argmax(1, keepdim=True))
        covered = torch.maximum(covered, table.gather(2, picks[-1][:, None].expand(-1, table.shape[1], 1)))
        bar.scatter_(1, picks[-1], -torch.inf)
    return torch.cat(picks, 1), covered[..., 0]


def _worth(gain: torch.Tensor, factor: torch.Tensor | None, bonus: torch.Tensor | None) -> torch.Tensor:
    gain = gain if factor is None else gain * factor
    return gain if bonus is None else gain + bonus


def _covering_one(
    table: torch.Tensor, count: int, bar: torch.Tensor, factor: torch.Tensor | None, bonus: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`covering` of one tile: gains are kept, and corrected by the rows that a pick covers better (in float64, or
    the corrections' noise would outgrow late gains)."""
    gain, covered = table.clamp(min=0).sum(0, dtype=torch.float64), torch.zeros_like(table[:, 0])
    picks, noise = [], float(gain.max()) * 1e-12
    for _ in range(count):
        score = _worth(threshold(gain, noise, 0.0), factor, bonus)
        picks.append((score + bar).argmax(0, keepdim=True))
        column = table.index_select(1, picks[-1])[:, 0]
        better = (column > covered).nonzero()[:, 0]
        was = covered.index_select(0, better)[:, None]
        gained = torch.minimum(table.index_select(0, better), column.index_select(0, better)[:, None])
        gained = torch.maximum(gained, was, out=gained)
        gain -= gained.sum(0, dtype=torch.float64) - was.sum(dtype=torch.float64)
        covered = torch.maximum(covered, column)
        bar.index_fill_(0, picks[-1], -torch.inf)
    return torch.cat(picks), covered


@torch.no_grad()
def determinant(
    units: torch.Tensor, relevance: torch.Tensor, count: int, there: torch.Tensor | None = None
) -> tuple[torch.Tensor, int]:
    """Tokens whose kernel ``L = diag(r) cosines diag(r)`` has a large determinant: greedy MAP of a conditional DPP.

    Each step takes the token of which most is left when what the chosen ones explain is taken away, and appends a row
    to the Cholesky factor. If nothing but rounding noise is left of all (more tokens than the kernel has rank), the
    most relevant of the others follow.

    Args:
        units: [tiles, n, width], of length 1. relevance: float32 [tiles, n], at least 0. there: bool [tiles, n], or
            None for all.

    Returns:
        int64 [tiles, count], in the order of choice (count at most n); the FLOPs of the products.
    """
    tiles, n, _ = units.shape
    if not count:
        return torch.empty(tiles, 0, dtype=torch.int64, device=units.device), 0
    row, flops = cosines(units, count - 1)
    bar = barred(there, relevance)
    spare = relevance / relevance.amax(1, keepdim=True).clamp(min=1e-30) - 2 + bar  # below what is left of any
    left = (units * units).sum(-1) * relevance.square() + bar
    least = left * SPENT
    factor, picks = units.new_zeros(tiles, count, n), []
    for t in range(count):
        alive = left > least
        j = torch.where(alive, left, spare).argmax(1, keepdim=True)
        picks.append(j)
        if t + 1 == count:
            break
        new = row(j).mul(relevance).mul_(relevance.gather(1, j))
        if t:
            mine = factor[:, :t].gather(2, j[:, None].expand(-1, t, 1))
            new -= torch.bmm(mine.transpose(1, 2), factor[:, :t])[:, 0]
        scale = torch.where(alive.gather(1, j), left.gather(1, j).clamp(min=1e-38).rsqrt(), 0.0)
        torch.mul(new, scale, out=factor[:, t])
        left = left.addcmul(factor[:, t], factor[:, t], value=-1).scatter_(1, j, -torch.inf)
        spare = spare.scatter_(1, j, -torch.inf)
    return torch.cat(picks, 1), flops + tiles * n * (count - 1) * (count - 2)
