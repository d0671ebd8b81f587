"""Which vision tokens stay, of all rows at once: rows that are ranked share their sorts, whatever their lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vtr.engine.once import from_host
from vtr.engine.packed import on_device, sums

Groups = Sequence[tuple[int, int]] | None
"""Stretches of a row's tokens that are ranked each by itself: (tokens, how many stay); None: there is one."""
Kept = tuple[torch.Tensor, int] | tuple[torch.Tensor, int, Groups] | torch.Tensor | None
"""Of one row: (scores [n], how many of the best stay, groups), or int64 indices, ascending; None: all of them."""


def keep(kept: Sequence[Kept], counts: Sequence[int], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """What each row keeps of its ``counts`` vision tokens, as indices into the tokens of all rows, ascending.

    Of equal scores the lower index wins.

    Returns:
        int64 [k]; and how many of them each row has.
    """
    starts = sums(counts)
    left = [n if k is None else k[1] if isinstance(k, tuple) else len(k) for k, n in zip(kept, counts, strict=True)]
    ranked = [row for row, k in enumerate(kept) if isinstance(k, tuple)]
    parts: dict[int, torch.Tensor] = {}
    if ranked:
        scores = _on_one_device([kept[row][0] for row in ranked], device)  # type: ignore[index]
        best = _best(*_grouped([kept[row] for row in ranked], scores, [starts[row] for row in ranked]))
        if len(ranked) == len(kept):
            return best, left
        parts.update(zip(ranked, best.split([left[row] for row in ranked]), strict=True))
    whole = [row for row, k in enumerate(kept) if k is None]
    everything = on_device([torch.arange(starts[row], starts[row] + counts[row]) for row in whole], device)
    parts.update(zip(whole, everything, strict=True))
    for row, k in enumerate(kept):
        if isinstance(k, torch.Tensor):
            parts[row] = k + starts[row] if starts[row] else k
    return torch.cat([parts[row] for row in range(len(kept))]), left


def _grouped(
    kept: Sequence[Kept], scores: list[torch.Tensor], starts: list[int]
) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """What :func:`_best` takes: a row with groups comes as several, which are parts of its scores."""
    apart, most, first = list[torch.Tensor](), list[int](), list[int]()
    for (_, count, *groups), mine, start in zip(kept, scores, starts, strict=True):  # type: ignore[misc]
        several = groups[0] if groups and groups[0] is not None else [(len(mine), count)]
        apart += mine.split([size for size, _ in several]) if len(several) > 1 else [mine]
        most += [stay for _, stay in several]
        first += [start + before for before in sums([size for size, _ in several])[:-1]]
    return apart, most, first


def _on_one_device(scores: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Scores of several rows on ``device``; those from elsewhere come in one copy."""
    away = [s for s in scores if s.device != device]
    if not away:
        return list(scores)
    moved = iter(torch.cat(away).to(device, non_blocking=True).split([len(s) for s in away]))
    return [s if s.device == device else next(moved) for s in scores]


def _best(scores: Sequence[torch.Tensor], keep: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
    """int64 [sum(keep)], ascending: of each row the ``keep`` best, counted from its ``starts``."""
    rows, sizes = len(scores), [len(s) for s in scores]
    longest, flat = max(sizes), scores[0] if len(scores) == 1 else torch.cat(list(scores))
    alike = len(set(sizes)) == 1 and len(set(keep)) == 1
    if alike:
        order = flat.view(rows, longest).sort(dim=1, descending=True, stable=True).indices[:, : keep[0]]
        step = starts[1] - starts[0] if rows > 1 else 1
        if list(starts) == [starts[0] + i * step for i in range(rows)]:
            if rows > 1:
                order = order + torch.arange(starts[0], starts[-1] + 1, step, device=flat.device)[:, None]
            elif starts[0]:
                order = order + starts[0]
        else:
            order = order + from_host(starts, flat.device)[:, None]
        return order.flatten().sort().values
    put = [torch.arange(n) + i * longest for i, n in enumerate(sizes)]
    take = [torch.arange(k) + i * longest for i, k in enumerate(keep)]
    plus = torch.tensor(list(starts)).repeat_interleave(torch.tensor(list(keep)))
    into, out_of, plus = on_device([torch.cat(put), torch.cat(take), plus], flat.device)
    flat = flat if flat.is_floating_point() else flat.double()
    padded = flat.new_full((rows * longest,), float("-inf")).index_copy(0, into, flat).view(rows, longest)
    order = padded.sort(dim=1, descending=True, stable=True).indices.flatten()
    return (order.index_select(0, out_of) + plus).sort().values
