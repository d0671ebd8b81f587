"""A set of tokens that is relevant, diverse and covers the rest (TOPS, arXiv 2606.27161), built greedily."""

from __future__ import annotations

from typing import Literal

import torch

from vtr.policies.picture._greedy import barred, products, rows_of

Normalise = Literal["mean", "minmax"]
OWN = 2.0
"""How well a chosen token is covered: better than by any cosine, so that it adds to nobody's gain."""


@torch.no_grad()
def preserving(
    units: torch.Tensor, relevance: torch.Tensor, count: int, diversity: float = 0.5, coverage: float = 0.5,
    normalise: Normalise = "mean", there: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """First the most relevant token; then always that of the largest relevance + diversity + coverage.

    Diversity is 1 − the largest cosine with a chosen one; coverage is how much nearer the tokens not chosen, itself
    included, come to a chosen one. Each is divided by its mean (or brought to [0, 1]): relevance over all tokens,
    the others over those not chosen yet. The lower index wins a tie.

    Args:
        units: [sets, n, width], of length 1 (zero where there is no token). relevance: float32 [sets, n], at least 0.
        diversity, coverage: how much they count. there: bool [sets, n], or None for all.

    Returns:
        int64 [sets, count], in the order of choice; of a set with fewer tokens, whatever stands behind these is
        nothing. The FLOPs of the products.
    """
    if not count:
        return torch.empty(len(units), 0, dtype=torch.int64, device=units.device), 0
    table, flops = products(units)
    row, free = rows_of(table), barred(there, relevance) == 0
    worth = _normal(relevance.float(), free, normalise)
    picks = [relevance.masked_fill(~free, -torch.inf).argmax(1, keepdim=True)]
    covered = row(picks[0]).scatter(1, picks[0], OWN)
    gain = _gains(table, covered)
    for _ in range(1, count):
        free = free.scatter(1, picks[-1], False)
        score = worth + diversity * _normal(1 - covered, free, normalise)
        score += coverage * _normal(gain.float(), free, normalise)
        picks.append(score.masked_fill_(~free, -torch.inf).argmax(1, keepdim=True))
        nearer = torch.maximum(covered, row(picks[-1])).scatter_(1, picks[-1], OWN)
        gain = _less(gain, table, covered, nearer) if gain.device.type == "cpu" else _gains(table, nearer)
        covered = nearer
    return torch.cat(picks, 1), flops


def _gains(table: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """[sets, n]: by how much each token would cover all others better, in sum."""
    gains = (table - covered[:, :, None]).clamp_(min=0)
    return gains.sum(1, dtype=torch.float64 if gains.device.type == "cpu" else None)


def _less(gain: torch.Tensor, table: torch.Tensor, was: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """:func:`_gains` at ``now``, from those at ``was``: only rows that are covered better change (float64)."""
    for i in range(len(table)):
        better = (now[i] > was[i]).nonzero()[:, 0]
        rows = table[i].index_select(0, better)
        gone = (rows - was[i, better, None]).clamp_(min=0) - (rows - now[i, better, None]).clamp_(min=0)
        gain[i] -= gone.sum(0, dtype=torch.float64)
    return gain.clamp_(min=0)


def _normal(x: torch.Tensor, free: torch.Tensor, how: Normalise) -> torch.Tensor:
    """[sets, n] over its mean among the ``free`` ones, or brought to [0, 1] by their smallest and largest."""
    if how == "mean":
        mean = (x * free).sum(1, keepdim=True) / free.sum(1, keepdim=True).clamp(min=1)
        return x / mean.clamp(min=1e-12)
    low = x.masked_fill(~free, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(~free, -torch.inf).amax(1, keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-12)
