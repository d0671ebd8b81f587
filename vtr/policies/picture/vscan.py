"""VScan, stage 1 (Zhang et al., TMLR 2026, arXiv 2505.22654): what is seen at a glance and what in a closer look."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtr.base import Policy
from vtr.checks import check_tower_layer
from vtr.image import Image, Layout, Pooled, tokens_at
from vtr.keep import keep_count
from vtr.policies.picture._merge import (
    flops_of_likeness,
    in_place,
    into_most_similar,
    members,
    of_patches,
    summed,
)
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import Tilewise, available, best_of, check_official
from vtr.settings import register_policy

SIDE = 4
"""Windows along each side of a tile."""


def windows(grid: tuple[int, int]) -> torch.Tensor:
    """int64 [h * w]: the window of each patch. A tile has 4 × 4 of them, as equal as whole patches allow, fewer where
    its side is short."""
    h, w = grid
    down, across = (torch.arange(n) // -(-n // SIDE) for n in (h, w))
    return (down[:, None] * SIDE + across).flatten()


def local_scan(scores: torch.Tensor, window: torch.Tensor, each: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """bool [tiles, n]: of every window of a tile the ``each`` largest scores; the lower index wins a tie.

    Args:
        scores: float32 [tiles, n]. window: int64 [n]. each: int64 [tiles]. there: bool [tiles, n], who can be chosen.
    """
    order = scores.masked_fill(~there, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, window[order].argsort(dim=1, stable=True))
    sizes = window.bincount()
    rank = torch.arange(len(window)) - (sizes.cumsum(0) - sizes)[window.sort().values]
    first = (rank[None] < each[:, None]).expand_as(there)
    return torch.zeros_like(there).scatter(1, order, first) & there


def two_scans(
    local: torch.Tensor, whole: torch.Tensor, window: torch.Tensor, counts: list[int], there: torch.Tensor,
    fill: bool = True,
) -> torch.Tensor:  # fmt: skip
    """bool [tiles, n]: who stays. Half of the budget goes to the windows, the rest to the largest scores of all.

    Args:
        local, whole: float32 [tiles, n] scores of the closer look and of the glance. counts: tokens of each tile.
        fill: what the windows cannot share evenly goes to the second scan; False: it is lost, as in the published code.
    """
    halves = torch.tensor(counts) // 2
    near = local_scan(local, window, halves // len(window.unique()), there)
    lost = torch.zeros_like(halves) if fill else halves - near.sum(1)
    rest = (torch.tensor(counts) - near.sum(1) - lost).tolist()
    return near | best_of(whole, rest, there & ~near)


def merged(patches: torch.Tensor, chosen: torch.Tensor, there: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every patch that is ``there`` into the chosen one of its tile that it is most like.

    Args:
        patches: [tiles, n, channels]. chosen, there: bool [tiles, n] on the CPU.

    Returns:
        float32 [k, channels], the mean of all that went into each of the chosen; int64 [tiles, n], where to.
    """
    into = into_most_similar(patches, chosen, there & ~chosen)
    sums, sizes = summed(patches, into, chosen.flatten().nonzero().squeeze(1).to(into.device, non_blocking=True))
    return sums / sizes, into


@register_policy("vscan")
@dataclass
class VScan(Tilewise):
    """Keep what an early and a late layer of the vision tower look at, and merge the rest into what is most like it.

    Stage 1 of VScan (Zhang et al., TMLR 2026, arXiv 2505.22654). Half of a tile's budget is shared by 4 × 4 windows,
    where an early layer's CLS attention ranks, the other half goes to what the late layer's CLS attention ranks first.
    Every other patch goes into the kept token of largest cosine; a token is the mean of all that went into it. Stage 2,
    the cut inside the decoder, is ``+ pyramid``. Towers without a CLS token: attention that patches receive ranks.

    The published code has windows of 6 × 6 patches, for tiles of 24 × 24 alone, and loses what 16 windows cannot share
    evenly; here that goes to the second scan. It keeps all newline tokens, so both placements do.

    Args:
        keep: tokens of each tile that stay: a ratio (float) of those that are there, or a count (int).
        placement: "official" lets patches that show padding take part, and loses the tokens that the code loses.
        local_layer: the tower's layer whose attention the windows rank by: an int counts as transformers counts
            ``attentions``, a float in (0, 1] is a share of the tower's depth (0.25 of 24 layers: ``attentions[5]``, as
            published).

    Raises:
        TypeError, ValueError: settings out of range.
    """

    local_layer: int | float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tower_layer(self.local_layer, "local_layer")

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        tiles = ("tiles",) if self.placement == "official" else ()
        return (f"attentions[{self.local_layer}]", "attentions", *tiles)

    def choose(self, image: Image, counts: list[int], there: torch.Tensor) -> torch.Tensor:
        rows = [saliency(image.tower, layer, layer) for layer in (self.local_layer, None)]
        local, whole = torch.stack(rows).cpu()
        fill = self.placement != "official"
        return two_scans(local, whole, windows(image.layout.grid), counts, there, fill)

    def compress(self, image: Image) -> Pooled:
        layout, official = image.layout, self.placement == "official"
        check_official(layout, self.placement)
        there = available(layout, self.placement)
        chosen = self.choose(image, self.counts(there), there)
        patches = of_patches(image, official)
        image.flops += flops_of_likeness(patches, chosen)
        means, into = merged(patches, chosen, there)
        made = members(into.cpu())
        stands = chosen.flatten().nonzero().squeeze(1)
        left = (tokens_at(layout)[stands] >= 0).nonzero().squeeze(1)  # padding is cut away afterwards
        stands, means = stands[left], means.index_select(0, left.to(means.device, non_blocking=True))
        return in_place(image, stands, means, [made[at] for at in stands.tolist()])

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included.

        Raises:
            ValueError: placement="official" of a picture whose padding is cut away: what it shows decides.
        """
        if self.placement != "official":
            return super().kept_of(layout)
        if not layout.has_all_patches:
            return Policy.kept_of(self, layout)
        n = layout.grid[0] * layout.grid[1]
        total, parts = keep_count(self.keep, n), windows(layout.grid)
        share = parts.bincount().clamp(max=total // 2 // len(parts.unique()))
        return layout.tiles * (int(share.sum()) + total - total // 2) + int(layout.newline.sum())
