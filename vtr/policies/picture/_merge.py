"""What policies share that make one token out of several: who stands out, who goes where, sums, and the order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn.functional import normalize

from vtr.image import Image, Layout, Pooled, tokens_at

STAYS_ALONE = -1
"""Into no token: a patch that is not there, or that is dropped."""


def of_patches(image: Image, official: bool = False) -> torch.Tensor:
    """[tiles, h * w, hidden_size]: the token at each patch (where none is left: some other one); the whole tiles, which
    a policy must then want, if ``official``."""
    if official:
        assert image.tiles is not None
        return image.tiles
    at = tokens_at(image.layout).clamp(min=0).to(image.features.device, non_blocking=True)
    return image.features.index_select(0, at).view(image.layout.tiles, -1, image.features.shape[1])


def outliers(scores: torch.Tensor) -> int:
    """How many of the scores (on the CPU) lie above Q3 + 1.5 · (Q3 − Q1); quartiles by linear interpolation."""
    values = scores.double().flatten()
    if not len(values):
        return 0
    q1, q3 = values.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return int((values > q3 + 1.5 * (q3 - q1)).sum())


def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen of every tile as a padded list, ascending.

    Args:
        chosen: bool [tiles, n] on the CPU.

    Returns:
        int64 [tiles, most], padded with patches that are not chosen; bool [tiles, most], where it is no padding.
    """
    most = int(chosen.sum(1).max()) if chosen.numel() else 0
    places = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return places, chosen.gather(1, places)


def into_most_similar(vectors: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Which target each source goes to: the one of largest cosine, of equal ones the lower.

    Args:
        vectors: [tiles, n, channels]. targets, sources: bool [tiles, n] on the CPU; no patch is both.

    Returns:
        int64 [tiles, n]: a patch of the tile; targets go to themselves, who is neither (and sources of a tile without
        targets) to -1.
    """
    places, real = (t.to(vectors.device, non_blocking=True) for t in listed(targets))
    own = torch.arange(targets.shape[1]).expand_as(targets)
    stay = torch.where(targets, own, STAYS_ALONE).to(vectors.device, non_blocking=True)
    if places.shape[1] == 0:
        return stay
    unit = normalize(vectors.float(), dim=-1)
    wanted = unit.gather(1, places[..., None].expand(-1, -1, unit.shape[-1]))
    likeness = torch.bmm(unit, wanted.transpose(1, 2)).masked_fill(~real[:, None], -torch.inf)
    best = places.gather(1, likeness.argmax(-1))
    moves = (sources & targets.any(1, keepdim=True)).to(vectors.device, non_blocking=True)
    return torch.where(moves, best, stay)


def flops_of_likeness(vectors: torch.Tensor, targets: torch.Tensor) -> int:
    """What the products of :func:`into_most_similar` cost."""
    tiles, n, channels = vectors.shape
    return 2 * tiles * n * int(targets.sum(1).max()) * channels if targets.numel() else 0


def summed(values: torch.Tensor, into: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [k, channels] and [k, 1]: for each patch ``at`` the sum of what goes into it, itself included, and of how
    many patches.

    Args:
        values: [tiles, n, channels]. into: int64 [tiles, n], -1 for nowhere. at: int64 [k], counted through all tiles.
    """
    (tiles, n, channels), k = values.shape, len(at)
    rank = at.new_full((tiles * n + 1,), k).index_copy(0, at, torch.arange(k, device=at.device))
    target = torch.where(into >= 0, into + torch.arange(tiles, device=into.device)[:, None] * n, tiles * n)
    rows, mine = rank[target.flatten()], values.float().flatten(0, 1)
    sums = mine.new_zeros(k + 1, channels).index_add(0, rows, mine)
    sizes = mine.new_zeros(k + 1).index_add(0, rows, mine.new_ones(len(rows)))
    return sums[:k], sizes[:k, None]


def members(into: torch.Tensor) -> dict[int, list[int]]:
    """For each patch that something goes into, ascending: who goes, itself in front. Patches count through all tiles.

    Args:
        into: int64 [tiles, n] on the CPU, -1 for nowhere.
    """
    tiles, n = into.shape
    own = torch.arange(tiles * n)
    flat = torch.where(into >= 0, into + torch.arange(tiles)[:, None] * n, -1).flatten()
    order = (2 * flat + (flat != own)).argsort(stable=True)
    targets, sizes = flat[order].unique_consecutive(return_counts=True)
    patches, ends = order.tolist(), sizes.cumsum(0).tolist()
    found = zip(targets.tolist(), pairwise([0, *ends]), strict=True)
    return {target: patches[first:last] for target, (first, last) in found if target >= 0}


def tokens_of(layout: Layout, patches: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same with the tokens that stand at the patches, where there is one."""
    table = tokens_at(layout).tolist()
    return [[table[p] for p in some if table[p] >= 0] for some in patches]


def in_place(image: Image, stands: torch.Tensor, features: torch.Tensor, sources: list[list[int]]) -> Pooled:
    """New tokens, each where a patch of its own is, between the image's newline tokens, which all stay.

    Args:
        stands: int64 [m] on the CPU, the patch each stands at (counted through all tiles; a token must be there).
        features: [m, hidden_size]. sources: of each new token the patches it is made of, that one in front.
    """
    return among_newlines(image, tokens_at(image.layout)[stands], features, tokens_of(image.layout, sources))


def among_newlines(image: Image, at: torch.Tensor, features: torch.Tensor, sources: list[list[int]]) -> Pooled:
    """As :func:`in_place`, with the image's tokens for patches."""
    lines = image.layout.newline.nonzero().squeeze(1)
    order = torch.cat([at, lines]).argsort(stable=True)
    old = image.features.index_select(0, lines.to(image.features.device, non_blocking=True))
    joined = torch.cat([features.to(old.dtype), old])
    made = sources + [[line] for line in lines.tolist()]
    place = order.to(joined.device, non_blocking=True)
    return Pooled(joined.index_select(0, place), [made[i] for i in order.tolist()])
