"""ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461) before the decoder: the tokens that are most alike become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from vtr.base import Policy
from vtr.image import Image, Layout, Pooled, remembered
from vtr.keep import Keep, check_keep, keep_count
from vtr.policies.picture._merge import among_newlines
from vtr.settings import register_policy


class Match(NamedTuple):
    """Who merges with whom in one round of t tokens: those at even places (A) go into those at odd places (B).

    Attributes:
        rows: int64 [tiles, t], the row of the result each token goes into. left: rows of the result.
        unmerged, merged: int64 [tiles, a - r] and [tiles, r], places in A; the merged ones best first.
        into: int64 [tiles, r], the places in B they go to. best: float32 [tiles, a], likeness to the nearest of B.
    """

    rows: torch.Tensor
    left: int
    unmerged: torch.Tensor
    merged: torch.Tensor
    into: torch.Tensor
    best: torch.Tensor


def most(t: int, r: int, protected: int = 0) -> int:
    """How many tokens a round takes away that is to take ``r`` of ``t``: at most half of those not protected."""
    return max(min(r, (t - protected) // 2), 0)


def match(metric: torch.Tensor, r: int, class_token: bool = False, distill_token: bool = False) -> Match:
    """One round of bipartite soft matching. Rows of the result are those of A that stay, then all of B.

    Without a protected token those of A that stay come in the order of falling likeness, else in their own.

    Args:
        metric: [tiles, t, channels]. r: how many go, of :func:`most`. class_token: the first token goes nowhere.
            distill_token: nor does anything go into the second one, which then is the second row.
    """
    unit = normalize(metric.float(), dim=-1)
    a, b = unit[:, ::2], unit[:, 1::2]
    likeness = torch.bmm(a, b.transpose(1, 2))
    if class_token:
        likeness = likeness.index_fill(1, torch.zeros(1, dtype=torch.int64, device=metric.device), -torch.inf)
    if distill_token:
        likeness = likeness.index_fill(2, torch.zeros(1, dtype=torch.int64, device=metric.device), -torch.inf)
    best, nearest = likeness.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, unmerged = order[:, :r], order[:, r:]
    if class_token:
        unmerged = unmerged.sort(-1).values
    into = nearest.gather(1, merged)
    stay = unmerged.shape[1]
    of_a, of_b = (torch.arange(n, device=metric.device) for n in (stay, b.shape[1]))
    of_b = of_b + stay
    if distill_token:
        of_a, of_b = of_a + (of_a > 0), torch.where(of_b > stay, of_b, 1)
    to_a = torch.empty_like(order).scatter(1, unmerged, of_a.expand_as(unmerged)).scatter(1, merged, of_b[into])
    rows = torch.empty(metric.shape[:2], dtype=torch.int64, device=metric.device)
    rows[:, ::2], rows[:, 1::2] = to_a, of_b
    return Match(rows, stay + b.shape[1], unmerged, merged, into, best)


def merge(x: torch.Tensor, sizes: torch.Tensor, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the tokens of each row, weighted by how many patches each stands for, and the sums of these.

    Args:
        x: float32 [tiles, t, channels]. sizes: float32 [tiles, t, 1]. rows: int64 [tiles, t], of ``count`` rows.
    """
    at = (rows + torch.arange(len(x), device=x.device)[:, None] * count).flatten()
    total = sizes.new_zeros(len(x) * count, 1).index_add(0, at, sizes.flatten(0, 1))
    sums = x.new_zeros(len(x) * count, x.shape[2]).index_add(0, at, (x * sizes).flatten(0, 1))
    return (sums / total).unflatten(0, (len(x), -1)), total.unflatten(0, (len(x), -1))


def reduced(x: torch.Tensor, target: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Round after round until ``target`` tokens are left; tokens are their own metric, and sizes weigh the means.

    Args:
        x: float32 [tiles, n, channels]. target: in 1…n.

    Returns:
        float32 [tiles, target, channels]; int64 [tiles, n], the row each token went into; FLOPs of the products.
    """
    sizes, flops = x.new_ones(*x.shape[:2], 1), 0
    source = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    while x.shape[1] > target:
        t = x.shape[1]
        flops += 2 * len(x) * (t - t // 2) * (t // 2) * x.shape[2]
        found = match(x, most(t, t - target))
        x, sizes = merge(x, sizes, found.rows, found.left)
        source = found.rows.gather(1, source)
    return x, source, flops


@remembered(1024)
def tiles_of(layout: Layout) -> dict[int, torch.Tensor]:
    """The patch tokens of every tile, tiles of equal size together: how many → int64 [tiles, that many]."""
    mine = [((layout.tile == t) & (layout.newline == 0)).nonzero().squeeze(1) for t in range(layout.tiles)]
    sizes = {len(one): None for one in mine if len(one)}
    return {n: torch.stack([one for one in mine if len(one) == n]) for n in sizes}


@register_policy("tome")
@dataclass
class ToMe(Policy):
    """Merge the tokens of every tile that are most alike, pair by pair, until so many are left.

    Token merging (Bolya et al., ICLR 2023, arXiv 2210.09461) after the projector: in rounds of bipartite soft matching,
    tokens at even places go into the most similar ones at odd places, the most similar first, at most half a round; a
    token is the mean of all patches in it. The paper merges inside the tower, block by block, by attention keys; this
    is the form that comparisons on multimodal models take for any tower. PYRA (Xiong et al., ECCV 2024, arXiv
    2403.09192) merges so too, and learns how to modulate what is merged: untrained, it is this.

    The order in which the matching leaves tokens is not kept: each stands where its first patch is. Newline tokens
    stay. Neither the vision tower's attention nor the question plays a part.

    Args:
        keep: tokens of each tile that are left: a ratio (float) of those that are there, or a count (int).

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.25

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included."""
        some = sum(len(tiles) * keep_count(self.keep, n) for n, tiles in tiles_of(layout).items())
        return some + int(layout.newline.sum())

    def compress(self, image: Image) -> Pooled:
        features = image.features
        made: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        tokens: list[torch.Tensor] = []
        for n, tiles in tiles_of(image.layout).items():
            if not (count := keep_count(self.keep, n)):
                continue
            x = features.index_select(0, tiles.flatten().to(features.device, non_blocking=True))
            x, source, flops = reduced(x.float().unflatten(0, tiles.shape), count)
            image.flops += flops
            first = sum(len(one) for one in made)
            made.append(x.flatten(0, 1))
            rows.append((source + first + torch.arange(len(x), device=x.device)[:, None] * count).flatten())
            tokens.append(tiles.flatten())
        if not made:
            return among_newlines(image, torch.empty(0, dtype=torch.int64), features[:0], [])
        joined = torch.cat(made)
        members: list[list[int]] = [[] for _ in range(len(joined))]
        order = torch.cat(tokens).argsort()
        for token, row in zip(torch.cat(tokens)[order].tolist(), torch.cat(rows).cpu()[order].tolist(), strict=True):
            members[row].append(token)
        return among_newlines(image, torch.tensor([some[0] for some in members]), joined, members)
