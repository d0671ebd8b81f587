"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): the patches that the CLS token looks at, the rest summed up."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtr.checks import check_count
from vtr.image import Image, Layout, Pooled, Tower
from vtr.policies.picture._merge import (
    flops_of_likeness,
    in_place,
    into_most_similar,
    listed,
    members,
    of_patches,
    summed,
    tokens_of,
)
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import Tilewise, available, best_of, check_official, layout_of, published_order
from vtr.settings import register_policy


def share_of(total: int) -> int:
    """How many of so many tokens are contextual in the paper: 10 of 64, 20 of 128, 30 of 192."""
    return total * 5 // 32


def spread(rest: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """bool [tiles, n]: of the ``rest`` of each tile (bool [tiles, n] on the CPU) so many at even steps, from the first.

    The step is ``floor(rest / count)``, as in the published code.
    """
    wanted = torch.tensor(counts)[:, None]
    step = (rest.sum(1, keepdim=True) // wanted.clamp(min=1)).clamp(min=1)
    rank = rest.cumsum(1) - 1
    return rest & (rank % step == 0) & (rank // step < wanted)


def contexts(states: torch.Tensor, into: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """[k, width]: each target's state plus the mean of those that went into it. The sum of both, so about twice as
    large as a state, as published; a target that nobody goes into keeps its own.

    Args:
        states: [tiles, n, width]. into: int64 [tiles, n], as :func:`into_most_similar` gives it. at: int64 [k], the
            targets, counted through all tiles.
    """
    sums, sizes = summed(states, into, at)
    own = states.flatten(0, 1).index_select(0, at).float()
    return (own + (sums - own) / (sizes - 1).clamp(min=1)).to(states.dtype)


@register_policy("visionzip")
@dataclass
class VisionZip(Tilewise):
    """Keep the patches that the vision tower looks at most, and sum up the rest in a few contextual tokens.

    VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467). Dominant tokens have the most attention of the CLS token in
    the layer whose output the model uses. Of the other patches, some at even steps are targets: each of the rest goes
    to the target whose key is most like its own, and a contextual token is the target plus their mean, made in front
    of the projector. Towers without a CLS token: attention that patches receive ranks (the paper's variant).

    The published code hands the CLS token on as the first dominant one. Here its slot goes to one more patch, tokens
    stay at their places (contextual ones at their target's), newline tokens stay, and padding takes no part.

    Args:
        keep: tokens of each tile, contextual ones included: a ratio (float) of those that are there, or a count (int).
            The paper's are 64, 128 and 192.
        placement: "official" repeats the published code: CLS token, dominant patches, contextual tokens; of pictures
            with crops the thumbnail's, then dominant patches of the whole canvas, CLS tokens, contextual tokens.
        contextual: how many of them are contextual, at most all; None: 5 of 32, as in the paper.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    contextual: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual is not None:
            check_count(self.contextual, "contextual", 0, 2**31)
            if not isinstance(self.keep, float) and self.contextual > self.keep:
                raise ValueError(f"contextual={self.contextual}, but keep={self.keep} tokens stay: choose at most that")

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        official = ("cls_token", "tiles") if self.placement == "official" else ()
        return ("hidden_states", "attentions", "projector", *official)

    def split(self, counts: list[int]) -> tuple[list[int], list[int]]:
        """Of each tile's tokens the dominant ones (CLS included where it is handed on) and the contextual ones."""
        most = [count - (count > 0) for count in counts] if self.placement == "official" else counts
        some = [
            min(share_of(count) if self.contextual is None else self.contextual, top)
            for count, top in zip(counts, most, strict=True)
        ]
        return [count - c for count, c in zip(counts, some, strict=True)], some

    def compress(self, image: Image) -> Pooled:
        layout, official, tower = image.layout, self.placement == "official", image.tower
        assert tower is not None
        check_official(layout, self.placement)
        there = available(layout, self.placement)
        dominant, contextual = self.split(self.counts(there))
        picked = [d - (official and d > 0) for d in dominant]
        stays = best_of(saliency(tower, heads="sum"), picked, there).cpu()
        targets = spread(there & ~stays, contextual)
        keys = tower.keys().float().mean(2)[:, -there.shape[1] :]
        image.flops += flops_of_likeness(keys, targets)
        into = into_most_similar(keys, targets, there & ~stays & ~targets)
        at = targets.flatten().nonzero().squeeze(1)
        made = contexts(tower.hidden_states(), into, at.to(into.device, non_blocking=True))
        if official and not any(dominant):
            return Pooled(image.features[:0], [], layout_of(layout, torch.empty(0, dtype=torch.int64)))
        if official:
            return _published(image, tower, stays, targets, made, members(into.cpu()))
        merged = tower.project(made)
        own = stays.flatten().nonzero().squeeze(1)
        kept = of_patches(image).flatten(0, 1).index_select(0, own.to(image.features.device))
        who = members(into.cpu())
        sources = [[i] for i in own.tolist()] + [who[i] for i in at.tolist()]
        return in_place(image, torch.cat([own, at]), torch.cat([kept, merged.to(kept)]), sources)


def _published(
    image: Image, tower: Tower, stays: torch.Tensor, targets: torch.Tensor, made: torch.Tensor,
    who: dict[int, list[int]],
) -> Pooled:  # fmt: skip
    """Tokens as the published code lines them up; every tile has as many.

    Args:
        stays, targets: bool [tiles, n] on the CPU. made: [k, width], contextual states, in the order of the targets.
        who: what went into each target.
    """
    layout, n = image.layout, stays.shape[1]
    own, at = listed(stays)[0], listed(targets)[0]
    states = tower.hidden_states()
    first = torch.arange(layout.tiles)[:, None] * n
    rows = (own + first).flatten().to(states.device, non_blocking=True)
    dominant = states.flatten(0, 1).index_select(0, rows).unflatten(0, own.shape)
    parts = [tower.cls_state()[:, None], dominant, made.unflatten(0, at.shape)]
    cells = torch.cat([first, own + first, at + first], 1).flatten()
    order = lined_up(layout, own, at.shape[1])
    features = tower.project(torch.cat(parts, 1).flatten(0, 1).index_select(0, order.to(states.device)))
    sources = [some for row, last in zip((own + first).tolist(), (at + first).tolist(), strict=True)
               for some in [[], *([i] for i in row), *(who[i] for i in last)]]  # fmt: skip
    flat = tokens_of(layout, sources)
    return Pooled(features, [flat[i] for i in order.tolist()], layout_of(layout, cells[order]))


def lined_up(layout: Layout, own: torch.Tensor, contextual: int) -> torch.Tensor:
    """int64 [tiles * (1 + k + contextual)]: of the tokens of all tiles, tile by tile, the order of the published code.

    Args:
        own: int64 [tiles, k], each tile's dominant patches, ascending. contextual: contextual tokens of each tile.
    """
    tiles, k = own.shape
    number = torch.arange(tiles * (1 + k + contextual)).view(tiles, -1)
    if layout.crops == (0, 0):
        return number.flatten()
    place = torch.empty(tiles * layout.grid[0] * layout.grid[1], dtype=torch.int64)
    place[published_order(layout)] = torch.arange(len(place))
    cells = own + torch.arange(tiles)[:, None] * (layout.grid[0] * layout.grid[1])
    seen, crops = number[1:, 1 : 1 + k].flatten(), number[1:]
    canvas = seen[place[cells[1:].flatten()].argsort()]
    return torch.cat([number[0], canvas, crops[:, 0], crops[:, 1 + k :].flatten()])
