"""VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818): some patches that matter, and some that differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from vtr.checks import check_number
from vtr.image import Image
from vtr.policies.picture._greedy import products
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import Tilewise, best_of
from vtr.settings import register_policy

CUT = 8
"""So many patches a round are dropped for being like others."""


def unlike(alike: torch.Tensor, rest: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [B, count]: what is left of ``rest`` when patches that are like others have gone, a few a round.

    In every round each second patch, from the first on, is compared with the others; the most alike of them go, and
    those that stay stand in front, by similarity, in the next round.

    Args:
        alike: [B, n, n], how alike two patches are, symmetric. rest: int64 [B, r], patches, the most salient first.
    """
    tiles, n = alike.shape[:2]
    rows, first = alike.flatten(0, 1), torch.arange(tiles, device=rest.device)[:, None] * n
    while rest.shape[1] > count > 0:
        a, b = rest[:, 0::2], rest[:, 1::2]
        cut = min(CUT, rest.shape[1] - count, a.shape[1])
        others = rows.index_select(0, (first + b).flatten()).view(tiles, -1, n)
        order = others.amax(1).gather(1, a).argsort(dim=1, descending=True, stable=True)
        rest = torch.cat([a.gather(1, order[:, cut:]), b], 1)
    return rest[:, :count]


@register_policy("vispruner")
@dataclass
class VisPruner(Tilewise):
    """Keep the patches of every tile at which the CLS token looks most, and others that are least like each other.

    VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818): the CLS token's attention after the softmax, in the layer
    whose output the model uses, mean over heads, picks the first. Of the others, by the cosines of the tower's states,
    the most alike go, 8 a round. The published code forces pictures into 2 × 2 crops, drops newline tokens, keeps
    patches of padding, and fails where the rest is odd or few are to differ; here such a rest loses as many. Towers
    without CLS token: the attention that a patch gets from all in the last layer, as in the published code for SigLIP.

    Args:
        keep: patches of each tile that stay: a ratio (float) of those that are there (above 0 at least one of each
            tile), or a count (int).
        placement: "true" leaves every token where it was. "official" repeats the published code for pictures with
            crops: every crop is whole (patches that show padding take part), and no newline token stays.
        important_ratio: share of those that stay, in [0, 1], that the attention picks.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    important_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= check_number(self.important_ratio, "important_ratio") <= 1:
            raise ValueError(f"important_ratio={self.important_ratio} must lie in [0, 1]")

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        wished = ("hidden_states", "attentions", "attentions[-1]")
        return (*wished, "tiles") if self.placement == "official" else wished

    def choose(self, image: Image, counts: list[int], there: torch.Tensor) -> torch.Tensor:
        assert image.tower is not None
        scores, sizes = saliency(image.tower, without_cls=-1), there.sum(1).tolist()
        important = [int(count * self.important_ratio) for count in counts]
        chosen = best_of(scores, important, there)
        if important == counts or counts == sizes:
            return best_of(scores, counts, there)
        unit = normalize(image.tower.hidden_states().detach().float(), dim=-1)
        alike, flops = products(unit)
        image.flops += flops
        order = scores.masked_fill(~there.to(scores.device), -torch.inf).argsort(dim=1, descending=True, stable=True)
        for n, count in set(zip(sizes, counts, strict=True)):  # tiles of equal size together
            first = int(count * self.important_ratio)
            same = [i for i, size in enumerate(zip(sizes, counts, strict=True)) if size == (n, count)]
            at = torch.tensor(same, device=order.device)
            others = unlike(alike[at], order[at, first:n], count - first)
            chosen[at[:, None], others] = True
        return chosen
