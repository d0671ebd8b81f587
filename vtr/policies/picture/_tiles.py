"""What policies share that choose among the patches of every tile: budgets, places, and the published layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vtr.base import Policy, UnsupportedError
from vtr.checks import check_placement
from vtr.image import Image, Layout, Pooled, remembered, tokens_at
from vtr.keep import Keep, check_keep, keep_count

Placement = Literal["true", "official"]


@dataclass
class Tilewise(Policy):
    """Base of policies that keep some patches of every tile, each tile with the same budget. Newline tokens all stay.

    A method is a subclass with a :meth:`choose`.

    Args:
        keep: patches of each tile that stay: a ratio (float) of those that are there (above 0 at least one of each
            tile), or a count (int).
        placement: "true" leaves every token where it was. "official" repeats the published code for pictures with
            crops: every crop is whole (patches that show padding take part), and no newline token stays.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.25
    placement: Placement = "true"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_placement(self.placement)

    def choose(self, image: Image, counts: list[int], there: torch.Tensor) -> torch.Tensor:
        """bool [tiles, h * w]: the patches that stay.

        Args:
            counts: how many of each tile stay. there: bool [tiles, h * w] on the CPU, the patches there are to choose
                from (unpadding has taken the others).
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose()")

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included."""
        counts = self.counts(available(layout, self.placement))
        drops = self.placement == "official" and layout.crops != (0, 0)
        return sum(counts) + (0 if drops else int(layout.newline.sum()))

    def counts(self, there: torch.Tensor) -> list[int]:
        """How many patches of each tile stay, of those that are ``there``: bool [tiles, h * w]."""
        return [keep_count(self.keep, n) for n in there.sum(1).tolist()]

    def compress(self, image: Image) -> torch.Tensor | Pooled:
        layout = image.layout
        check_official(layout, self.placement)
        there = available(layout, self.placement)
        chosen = self.choose(image, self.counts(there), there).cpu()
        if self.placement == "official" and layout.crops != (0, 0):
            return in_published_layout(image, chosen)
        return torch.cat([tokens_at(layout)[chosen.flatten()], layout.newline.nonzero().squeeze(1)])


def check_official(layout: Layout, placement: Placement) -> None:
    """Raise UnsupportedError if a published layout is asked for that such an image has not."""
    if placement == "official" and layout.scaled is not None:
        raise UnsupportedError(
            "placement='official' is the published code for LLaVA-1.5 and LLaVA-NeXT, whose crops are not scaled down; "
            "for this image use placement='true'"
        )


def image_count(keep: Keep, patches: int, placement: Placement) -> int:
    """How many of an image's patches one budget for all of them leaves; "official" cuts off."""
    return keep_count(keep, patches, slack=0.0 if placement == "official" else 1e-9)


@remembered(1024)
def available(layout: Layout, placement: str = "true") -> torch.Tensor:
    """bool [tiles, h * w] on the CPU: the patches of each tile that are among an image's tokens; all, if "official"."""
    there = (tokens_at(layout) >= 0).unflatten(0, (layout.tiles, -1))
    return torch.ones_like(there) if placement == "official" else there


@remembered(1024)
def published_order(layout: Layout) -> torch.Tensor:
    """int64 [tiles * h * w]: all patches as the published codes line them up: thumbnail, then the whole canvas."""
    (rows, columns), (h, w) = layout.crops, layout.grid
    crops = torch.arange(h * w, layout.tiles * h * w)
    canvas = crops.view(rows, columns, h, w).transpose(1, 2).flatten()
    return torch.cat([torch.arange(h * w), canvas])


def in_published_layout(image: Image, chosen: torch.Tensor) -> Pooled:
    """The ``chosen`` patches (bool [tiles, h * w] on the CPU) of an image with crops: in the published order, without
    newline tokens; of patches that show padding too."""
    assert image.tiles is not None
    layout, order = image.layout, published_order(image.layout)
    cells = order[chosen.flatten()[order]]
    features = image.tiles.flatten(0, 1).index_select(0, cells.to(image.tiles.device))
    return Pooled(features, sources_of(layout, cells), layout_of(layout, cells))


def sources_of(layout: Layout, cells: torch.Tensor) -> list[list[int]]:
    """For each patch ([n], counted tile by tile) the token that stands there, or none."""
    return [[token] if token >= 0 else [] for token in tokens_at(layout)[cells].tolist()]


def layout_of(layout: Layout, cells: torch.Tensor) -> Layout:
    """The layout of an image of which these patches are left, in this order; no newline tokens."""
    h, w = layout.grid
    tile, at = cells // (h * w), cells % (h * w)
    none = torch.zeros_like(cells)
    return Layout(tile, at // w, at % w, none, layout.grid, layout.crops, layout.window, groups=layout.groups)


def best_of(scores: torch.Tensor, counts: list[int], there: torch.Tensor) -> torch.Tensor:
    """bool [tiles, n]: of each tile so many of the largest ``scores`` ([tiles, n]); the lower index wins a tie.

    Args:
        counts, there: as :meth:`Tilewise.choose` gets them.
    """
    if not bool(there.all()):
        scores = scores.masked_fill(~there.to(scores.device), -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return first_of(order, counts, scores.shape[1])


def first_of(picks: torch.Tensor, counts: list[int], n: int) -> torch.Tensor:
    """bool [tiles, n]: of each tile's ``picks`` (int64 [tiles, k], best first, k at least every count) the first."""
    stays = torch.arange(picks.shape[1]) < torch.tensor(counts)[:, None]
    chosen = torch.zeros(len(picks), n, dtype=torch.bool, device=picks.device)
    return chosen.scatter(1, picks, stays.to(picks.device, non_blocking=True))


def first_of_groups(order: torch.Tensor, group: torch.Tensor, quotas: torch.Tensor) -> torch.Tensor:
    """int64 [k]: of each group so many of its members as ``quotas`` ([groups]) says, group by group.

    Args:
        order: int64 [n], all members, best first. group: int64 [n], the group of each member.
    """
    order = order[group[order].argsort(stable=True)]
    sizes, mine = group.bincount(minlength=len(quotas)), group[order]
    place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[mine]
    return order[place < quotas[mine]]
