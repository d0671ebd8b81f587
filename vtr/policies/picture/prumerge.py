"""LLaVA-PruMerge and PruMerge+ (Shang et al., ICCV 2025, arXiv 2403.15388): as many tokens as stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vtr.base import Policy
from vtr.checks import check_placement
from vtr.image import Image, Layout, Pooled, Tower
from vtr.keep import Keep, best, check_keep, keep_count
from vtr.policies.picture._merge import in_place, outliers, tokens_of
from vtr.policies.picture._tiles import Placement, available, check_official, layout_of
from vtr.settings import register_policy

NEIGHBOURS = 32
"""How many patches go into each token that stays."""


def cls_row(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float32 [tiles, n]: softmax over all tokens of query · key / sqrt(width), heads not split, no CLS column.

    Args:
        query: [tiles, width], the CLS token's. keys: [tiles, 1 + n, width].
    """
    products = torch.bmm(keys.float(), query.float()[..., None])[..., 0]
    row: torch.Tensor = (products * query.shape[-1] ** -0.5).softmax(-1)
    return row[:, 1:]


def with_samples(picked: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """``picked`` and, behind it, those of the ``samples`` that are not in it."""
    return torch.cat([picked, samples[~torch.isin(samples, picked)]])


def completed(picked: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """``picked``, then the ``candidates`` (int64 [n], ascending) that are not; altogether as many as candidates.

    If ``picked`` has some twice, as many of the first others are missing (as in the published code).
    """
    others = candidates[~torch.isin(candidates, picked)]
    return torch.cat([picked, others[len(others) + len(picked) - len(candidates) :]])


def merged(
    states: torch.Tensor, keys: torch.Tensor, scores: torch.Tensor, order: list[torch.Tensor], sizes: list[int],
    has_rest: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, int]:  # fmt: skip
    """The tokens that stay, each with its nearest neighbours added to it, and one of all that do not.

    A token is its state plus the neighbours' states times their scores; neighbours are the 32 patches of largest cosine
    of keys, whether they stay or not. The last one is the sum of the others' states times their scores.

    Args:
        states: [tiles, n, width]. keys: [tiles, n, key_width]. scores: float32 [tiles, n].
        order: per tile int64 [k] on the CPU, its patches, those that stay in front. sizes: how many stay.
        has_rest: whether a token of the others is wanted; without one, tokens stay as they are.

    Returns:
        float32 [tiles, max(sizes) + 1, width]: of each tile so many tokens and the one of the rest; int64 [tiles,
        max(sizes), neighbours] on the CPU, the patches that are added, -1 for none; FLOPs of the products.
    """
    rows = max(sizes)
    lists = torch.nn.utils.rnn.pad_sequence(order, batch_first=True, padding_value=-1)
    device = states.device
    at = lists.clamp(min=0).to(device, non_blocking=True)
    size = torch.tensor(sizes).to(device, non_blocking=True)[:, None, None]
    real = (lists >= 0).to(device, non_blocking=True)
    place, row = torch.arange(at.shape[1], device=device), torch.arange(rows + 1, device=device)[:, None]
    weights = scores.to(device).gather(1, at) * real
    unit, own = normalize(keys.float(), dim=-1), row[:rows] == place
    products = torch.bmm(_at(unit, at[:, :rows]), unit.transpose(1, 2))
    likeness = products.gather(2, at[:, None].expand(-1, rows, -1)).masked_fill(own | ~real[:, None], -torch.inf)
    near = best(likeness, NEIGHBOURS)
    merges = torch.tensor(has_rest).to(device, non_blocking=True)[:, None, None]
    is_there = (likeness.gather(2, near) > -torch.inf) & merges
    some = weights[:, None].expand_as(likeness).gather(2, near) * is_there
    mix = torch.zeros_like(likeness).scatter(2, near, some).masked_fill(own, 1.0)
    mix = torch.cat([mix, mix.new_zeros(len(at), 1, at.shape[1])], 1)
    rest = weights[:, None] * (place >= size)
    mix = torch.where(row < size, mix, torch.where(row == size, rest, 0.0))
    shares = mix.new_zeros(len(at), rows + 1, states.shape[1]).scatter_add(2, at[:, None].expand_as(mix), mix)
    made = torch.bmm(shares, states.float())
    patches = at[:, None].expand_as(likeness).gather(2, near)
    flops = 2 * len(at) * states.shape[1] * (rows * keys.shape[-1] + (rows + 1) * states.shape[-1])
    return made, torch.where(is_there, patches, -1).cpu(), flops


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


@register_policy("prumerge")
@dataclass
class PruMerge(Policy):
    """Keep as many tokens of a tile as stand out for the CLS token, add their like to them, and sum up the rest in one.

    LLaVA-PruMerge (Shang et al., ICCV 2025, arXiv 2403.15388). The CLS query of the tower's last layer scores patches;
    outliers of these scores (above Q3 + 1.5 · IQR) stay, so the number depends on the picture. To each, its 32 nearest
    patches by key are added, weighted by score; one more token is the weighted sum of all others. Merged in front of
    the projector. Without training the model for it, the paper's numbers are not to be had. Towers without a CLS token:
    attention that patches receive in the last layer scores.

    Here each tile counts its own outliers, and tokens stay at their places, with all newline tokens; the sum of the
    rest stands at the last patch in it. A tile of which every patch stays is left as it is.

    Args:
        keep: tokens of each tile, the sum of the rest included: None for as many as stand out, a ratio (float) of
            those that are there, or a count (int).
        placement: "official" repeats the published code: tile after tile, tokens best first, the sum of the rest last;
            all tiles of an image count outliers together, padding takes part, and no newline token stays.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep | None = None
    placement: Placement = "true"

    wants: ClassVar[tuple[str, ...]] = ("hidden_states", "attentions[-1]", "projector")

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        check_placement(self.placement)

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included.

        Raises:
            ValueError: keep is None, so it depends on the picture.
        """
        if self.keep is None:
            return super().kept_of(layout)
        official = self.placement == "official"
        sizes = available(layout, self.placement).sum(1).tolist()
        return sum(self._budgeted(keep_count(self.keep, n), n) for n in sizes) + (
            0 if official else int(layout.newline.sum())
        )

    def _budgeted(self, count: int, n: int) -> int:
        """How many tokens become of a tile of n patches that is to have ``count``."""
        return count

    def picked(self, scores: torch.Tensor, all_scores: torch.Tensor) -> torch.Tensor | None:
        """int64 [k]: which of a tile's patches stay, in their order; None: it keeps nothing, not even the sum.

        Args:
            scores: float32 [n] on the CPU, of the patches there are. all_scores: of the whole image.
        """
        n = len(scores)
        if not n:  # padding, all of it
            return None
        if self.keep is not None:
            count = keep_count(self.keep, n)
            whole = count == n and self.placement != "official"
            return None if not count else best(scores, n) if whole else self._of_budget(scores, count)
        if self.placement != "official":
            return self._of_outliers(scores, found := outliers(scores), n // max(found, 1))
        share = outliers(all_scores) / all_scores.numel()
        return self._of_outliers(scores, int(n * share), int(1 / share) if share else n)

    def _of_budget(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        return best(scores, count - 1)

    def _of_outliers(self, scores: torch.Tensor, found: int, inverse: int) -> torch.Tensor:
        """inverse: how many patches there are for each outlier."""
        return best(scores, found)

    def compress(self, image: Image) -> Pooled:
        layout, tower, official = image.layout, image.tower, self.placement == "official"
        assert tower is not None
        check_official(layout, self.placement)
        there = available(layout, self.placement)
        n = there.shape[1]
        keys, states = tower.keys(-1).flatten(2), tower.hidden_states()
        scores = self._scores(image, tower, keys)
        known = scores.cpu()
        order, sizes, has_rest = [], [], []
        for tile, mask in enumerate(there):
            mine = mask.nonzero().squeeze(1)
            some = self.picked(known[tile, mine], known[there])
            order.append(completed(mine[:0] if some is None else mine[some], mine))
            sizes.append(0 if some is None else len(some))
            has_rest.append(some is not None and (official or len(some) < len(mine)))
        values, near, flops = merged(states, keys[:, -n:], scores, order, sizes, has_rest)
        image.flops += flops
        at: list[int] = []
        rows: list[int] = []
        sources: list[list[int]] = []
        for tile, (mine, size, some) in enumerate(zip(order, sizes, near.tolist(), strict=True)):
            patches = (mine + tile * n).tolist()
            kept, rest = patches[:size], patches[size:]
            sources += [[p, *(tile * n + q for q in more if q >= 0)] for p, more in zip(kept, some, strict=False)]
            at += kept
            if has_rest[tile]:
                sources.append(rest[::-1])
                at += rest[-1:] or [tile * n]
            rows += range(tile * values.shape[1], tile * values.shape[1] + size + has_rest[tile])
        made = values.flatten(0, 1).index_select(0, torch.tensor(rows, dtype=torch.int64).to(values.device))
        features, cells = tower.project(made.to(states.dtype)), torch.tensor(at, dtype=torch.int64)
        if not official:
            return in_place(image, cells, features, sources)
        return Pooled(features, tokens_of(layout, sources), layout_of(layout, cells))

    def _scores(self, image: Image, tower: Tower, keys: torch.Tensor) -> torch.Tensor:
        if not tower.has_cls:
            return tower.attention_received(-1)
        image.flops += 2 * keys.numel()
        return cls_row(tower.cls_query(-1).flatten(1), keys)


@register_policy("prumerge-plus")
@dataclass
class PruMergePlus(PruMerge):
    """As PruMerge, and patches spread evenly over the tile stay as well: more where fewer stand out.

    PruMerge+ (in the same paper): between outliers every so many patches are sampled, a third as far apart as if the
    outliers themselves were spread evenly; where more than a sixth stand out, nearly all are. With a ``keep``, half of
    the tokens are spread evenly, and the others are those of largest score among the rest.

    "official" with a ``keep`` is the published code for training: samples that stand out too are there twice, as many
    of the first other patches are lost, and of an even number of tokens one is missing.

    Args:
        keep, placement: as PruMerge has them.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    def _budgeted(self, count: int, n: int) -> int:
        if self.placement != "official" or not count:
            return count
        half = (count - 1) // 2
        return half + len(_samples(half, n)) + 1

    def _of_budget(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        half, n = (count - 1) // 2, len(scores)
        if self.placement == "official":
            return torch.cat([best(scores, half), _samples(half, n)])
        samples = _samples(half, n)
        open_ = scores.index_fill(0, samples, -torch.inf)
        return torch.cat([best(open_, count - 1 - len(samples)), samples])

    def _of_outliers(self, scores: torch.Tensor, found: int, inverse: int) -> torch.Tensor:
        samples = torch.arange(0, max(len(scores) - 1, 1), max(inverse // 3, 1))
        return with_samples(best(scores, found), samples)


def _samples(count: int, n: int) -> torch.Tensor:
    """int64: about ``count`` of n patches at even steps from half a step on; the last patch is never one."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    step = int(1 / (count / n))
    return torch.arange(step // 2, n - 1, step)
