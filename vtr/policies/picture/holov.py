"""HoloV (Zou et al., NeurIPS 2025, arXiv 2510.02912): every part of the picture gets a share of the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtr.base import Policy
from vtr.checks import check_count, check_number, check_placement
from vtr.image import Image, Layout, Pooled, cell
from vtr.keep import Keep, check_keep
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import Placement, check_official, first_of_groups, image_count, layout_of
from vtr.settings import register_policy

EPS = 1e-6
SCALE = 1000.0
"""What attention is multiplied by."""


def run_sizes(n: int, runs: int) -> list[int]:
    """How many tokens each of so many runs of n tokens has, the first ones one more; none is empty."""
    return [n // runs + (i < n % runs) for i in range(min(runs, n))]


def run_weights(attention: torch.Tensor, sizes: list[int], alpha: float, official: bool = False) -> torch.Tensor:
    """float32 [runs]: each run's mean attention, as a share of their sum.

    ``official``: a run of one token counts 1000 · (1 + alpha) times less.
    The published score adds a variance that is scaled to the attention's mean, so in a run's mean it cancels.
    """
    scales = [1.0 if official and size == 1 else SCALE * (1 + alpha) for size in sizes]
    scores = torch.stack([part.mean() for part in attention.split(sizes)]) * torch.tensor(scales)
    return scores / (scores.sum() + EPS)


def quotas_of(weights: torch.Tensor, total: int) -> torch.Tensor:
    """int64 [runs]: ``total`` by weights, rounded down; the rest goes to those of largest weight, one each."""
    quotas = (weights * total).floor().long().clamp(min=0)
    largest = weights.argsort(descending=True, stable=True)[: max(total - int(quotas.sum()), 0)]
    return quotas.index_add(0, largest, torch.ones_like(largest))


def within(weights: torch.Tensor, sizes: list[int], total: int) -> torch.Tensor:
    """int64 [runs]: as :func:`quotas_of`, at most ``sizes``; what is too much for a run is divided among the others.

    ``total`` must not exceed the sum of sizes.
    """
    room, quotas = torch.tensor(sizes), torch.zeros(len(sizes), dtype=torch.int64)
    while (left := total - int(quotas.sum())) > 0:
        free = quotas < room
        shares = torch.where(free, weights, 0.0)
        shares = torch.where(free, shares / (shares.sum() + EPS), -1.0) if int(quotas.sum()) else weights
        quotas = torch.minimum(quotas + quotas_of(shares, left) * free, room)
    return quotas


def holistic(features: torch.Tensor, attention: torch.Tensor, sizes: list[int], alpha: float) -> torch.Tensor:
    """float32 [n]: 1000 · attention + alpha · gamma · variance of a token's cosines with the others of its run.

    gamma scales a run's variances to its attention. features: float32 [n, D].
    """
    size = torch.tensor(sizes, device=features.device)[:, None]
    place = torch.arange(max(sizes), device=features.device)
    real = place < size
    at = (size.cumsum(0) - size + place).clamp(max=len(features) - 1)
    a = SCALE * attention[at] * real
    x = features[at]
    x = x / (x.norm(dim=-1, keepdim=True) + EPS) * real[..., None]
    alike = (x @ x.transpose(1, 2)).masked_fill(torch.eye(len(place), device=x.device).bool(), 0.0)
    others = (size - 1).clamp(min=1)
    spread = (alike - alike.sum(2, keepdim=True) / others[..., None]) * (real[:, None] & real[..., None])
    variance = spread.square().sum(2) / others * (size > 1)
    gamma = a.sum(1, keepdim=True) / size / (variance.sum(1, keepdim=True) / size + EPS)
    score: torch.Tensor = a + alpha * gamma * variance
    return score[real]


@register_policy("holov")
@dataclass
class HoloV(Policy):
    """Keep patches from all over the picture: each stretch of it gets a share, which its best patches take.

    HoloV (Zou et al., NeurIPS 2025, arXiv 2510.02912): an image's patches (thumbnail, then crops) are cut into runs,
    one behind the other. The mean attention of a run, from the vision tower's CLS token in the layer whose output the
    model uses (after the softmax, mean over heads), says how many of its patches stay. The published code ranks them by
    that attention alone, and fills what a full run cannot take with tokens of zeros, where here the other runs take it
    (as in the paper). Towers without CLS token: the attention that a patch gets from all. Newline tokens all stay.

    Args:
        keep: patches of each image that stay: a ratio (float), above 0 at least one, or a count (int).
        runs: so many runs the patches of an image are cut into.
        select: what ranks the patches of a run: "attention" (the published code), or "holistic": attention plus the
            variance of a patch's similarities with the others of its run (the paper).
        alpha: weight of the variance in "holistic": 0.09 in the code, 1.0 in the paper.
        placement: "true" leaves every token where it was. "official" repeats the published code: run by run, each by
            attention; no newline tokens; tokens of zeros; a run of a single patch counts 1000 times less.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.25
    runs: int = 16
    select: Literal["attention", "holistic"] = "attention"
    alpha: float = 0.09
    placement: Placement = "true"

    wants: ClassVar[tuple[str, ...]] = ("attentions",)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count(self.runs, "runs", 1, 1_000_000)
        check_placement(self.placement)
        if check_number(self.alpha, "alpha") < 0:
            raise ValueError(f"alpha={self.alpha} cannot be negative")
        if self.select not in ("attention", "holistic"):
            raise ValueError(f"select={self.select!r}: choose 'attention' or 'holistic'")

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included."""
        newlines = int(layout.newline.sum())
        total = image_count(self.keep, len(layout) - newlines, self.placement)
        return total + (0 if self.placement == "official" else newlines)

    def compress(self, image: Image) -> torch.Tensor | Pooled:
        layout, official = image.layout, self.placement == "official"
        check_official(layout, self.placement)
        patches = (layout.newline == 0).nonzero().squeeze(1)
        total, ends = image_count(self.keep, len(patches), self.placement), layout.newline.nonzero().squeeze(1)
        if not total:
            return ends[:0] if official else ends
        attention, sizes = saliency(image.tower).flatten(), run_sizes(len(patches), self.runs)
        at = cell(layout)[patches]
        key = scores = attention.cpu()[at]
        if self.select == "holistic":
            key = self._holistic(image, patches, attention[at.to(attention.device)], sizes).cpu()
        run = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        weights = run_weights(scores, sizes, self.alpha, official)
        quotas = quotas_of(weights, total) if official else within(weights, sizes, total)
        full = quotas >= torch.tensor(sizes)  # a run that stays whole stays as it is
        order = key.masked_fill(full[run], 0.0).argsort(descending=True, stable=True)
        kept = patches[first_of_groups(order, run, quotas)]
        return zero_filled(image, kept, total) if official else torch.cat([kept, ends])

    def _holistic(self, image: Image, patches: torch.Tensor, attention: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        features = image.features.detach().index_select(0, patches.to(image.features.device)).float()
        image.flops += 2 * len(sizes) * max(sizes) ** 2 * features.shape[1]
        return holistic(features, attention.to(features.device), sizes, self.alpha)


def zero_filled(image: Image, kept: torch.Tensor, total: int) -> Pooled:
    """The tokens ``kept``, in this order, and behind them so many of zeros that there are ``total``."""
    features = image.features.index_select(0, kept.to(image.features.device))
    missing = total - len(kept)
    features = torch.cat([features, features.new_zeros(missing, features.shape[1])])
    cells = cell(image.layout)[torch.cat([kept, kept[-1:].expand(missing)])]
    return Pooled(features, [[i] for i in kept.tolist()] + [[]] * missing, layout_of(image.layout, cells))
