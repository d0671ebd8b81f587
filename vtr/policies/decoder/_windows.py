"""Windows of patches that look alike become one token each (MustDrop's first stage): arithmetic on states alone."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize

SIDE = 3
"""Patches in a window's row and column."""


def merged_windows(states: torch.Tensor, threshold: float = 0.8) -> torch.Tensor:
    """Average the windows of 3 × 3 patches whose mean cosine is at least ``threshold``.

    As many windows of each tile as the tile with fewest has, those most alike. Waits for the device.

    Args:
        states: [tiles, side * side, width], patches row by row, ``side`` a multiple of 3.

    Returns:
        [tiles, n, width]: the means, the most alike window first, then all other patches in their order.

    Raises:
        ValueError: the patches are no square of whole windows.
    """
    tiles, n, width = states.shape
    side = math.isqrt(n)
    if side * side != n or side % SIDE:
        raise ValueError(f"{n} patches are no square of whole {SIDE} × {SIDE} windows")
    per_row, size = side // SIDE, SIDE * SIDE
    place = torch.arange(n, device=states.device).view(per_row, SIDE, per_row, SIDE).transpose(1, 2).reshape(-1, size)
    members = states[:, place]  # [tiles, windows, 9, width]
    units = normalize(members.float(), dim=-1)
    pairs = units @ units.transpose(2, 3)
    alike = (pairs.sum((2, 3)) - pairs.diagonal(dim1=2, dim2=3).sum(-1)) / (size * (size - 1))
    count = int((alike >= threshold).sum(1).min())
    best = alike.argsort(dim=1, descending=True, stable=True)[:, :count]
    means = members.gather(1, best[..., None, None].expand(-1, -1, size, width)).mean(2)
    alone = torch.ones(tiles, n, dtype=torch.bool, device=states.device).scatter(1, place[best].flatten(1), False)
    return torch.cat([means, states[alone].view(tiles, n - size * count, width)], 1)
