"""SparseVLM's official counts, for other budgets and depths than those they were made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from vtr.keep import Keep

TOKENS, DEPTH, LAYERS = 576, 32, (3, 7, 16)
"""What the official lists were made for: LLaVA-1.5-7B, cut on entering these layers."""


def between(lists: Mapping[int, Sequence[int]], retain: Keep) -> list[float]:
    """Counts of each cut, of 576 tokens: the official ones where there are such, between them on straight lines."""
    budget = retain * TOKENS if isinstance(retain, float) else retain
    cuts = len(next(iter(lists.values())))
    known = sorted({0: (0,) * cuts, **lists, TOKENS: (TOKENS,) * cuts}.items())
    (below, few), (above, many) = next((a, b) for a, b in pairwise(known) if budget <= b[0])
    return [a + (b - a) * (budget - below) / (above - below) for a, b in zip(few, many, strict=True)]


def spread(num_hidden_layers: int, parts: int = 1) -> list[int]:
    """Where a model of so many layers is cut, so many times as early; ascending, from 1 on."""
    found: list[int] = []
    for layer in LAYERS:
        at = round(layer * num_hidden_layers / (DEPTH * parts))
        found.append(max(at, found[-1] + 1 if found else 1))
    return found
