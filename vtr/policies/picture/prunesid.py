"""PruneSID (arXiv 2603.09480): patches in groups of a meaning, and of each group those that do not repeat another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from vtr.base import UnsupportedError
from vtr.image import Image, Layout, Pooled
from vtr.policies.picture._greedy import products
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import Tilewise, first_of_groups, layout_of
from vtr.settings import register_policy


def loadings(states: torch.Tensor, there: torch.Tensor, groups: int) -> tuple[torch.Tensor, int]:
    """float32 [tiles, n, groups]: what part each patch has in a tile's first principal components, without sign; and
    the FLOPs of the products.

    Patches are the variables and channels the samples: ``sigmoid(states)``, each patch centred over its channels.

    Args:
        states: float32 [tiles, n, C]. there: bool [tiles, n]; other patches have no part.
    """
    values = states.sigmoid()
    values = (values - values.mean(2, keepdim=True)) * there[..., None]
    table, flops = products(values)
    vectors: torch.Tensor = torch.linalg.eigh(table if table.is_cuda else table.cpu())[1]  # (MPS has none)
    return vectors.flip(2)[:, :, :groups].abs(), flops


def threshold(units: torch.Tensor, there: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """float32 [tiles]: patches more alike than this repeat each other: the mean cosine of pairs, times count / 32.

    Args:
        units: float32 [tiles, n, C], of length 1. there: bool [tiles, n]. counts: [tiles].
    """
    mine, sizes = units * there[..., None], there.sum(1)
    both = mine.sum(1).square().sum(1) - mine.square().sum((1, 2))  # every pair twice
    return both / (sizes * (sizes - 1)).clamp(min=1) * (counts / 32)


def survivors(
    units: torch.Tensor, order: torch.Tensor, group: torch.Tensor, limit: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Who is left if everyone, in ``order``, takes out those of its group behind it that are more alike than ``limit``.

    Args:
        units: float32 [n, C], of length 1. order: int64 [n], all of them. group: int64 [n]; both on the CPU.

    Returns:
        bool [n] on the CPU; the FLOPs of the products.
    """
    members = order[group[order].argsort(stable=True)].split(group.bincount().tolist())
    mine = [units[at.to(units.device, non_blocking=True)] for at in members]
    repeats = torch.cat([(one @ one.T > limit).flatten() for one in mine]).cpu()  # one wait for the device
    alive = torch.ones(len(order), dtype=torch.bool)
    for at, table in zip(members, repeats.split([len(at) ** 2 for at in members]), strict=True):
        earlier, left = table.view(len(at), len(at)).tril(-1), alive[at]  # [i, j]: j stands before i
        while not torch.equal(again := ~(earlier & left).any(1), left):
            left = again
        alive[at] = left
    return alive, sum(2 * len(one) * one.numel() for one in mine)


def quotas_of(sizes: torch.Tensor, alive: torch.Tensor, budget: int, count: int) -> torch.Tensor:
    """int64 [groups]: how many of each group stay, of ``sizes`` members, ``alive`` of which repeat nobody.

    One of each, the others by survivors; no more than a limit, which is raised until ``budget`` fits; what is missing
    goes to the groups of most survivors. Together ``count`` of them, at most ``budget``.
    """
    lower = sizes.clamp(max=1)
    upper = torch.minimum(sizes, alive).clamp(max=5 * math.ceil(budget / 64))
    while int(upper.sum()) < min(budget, int(sizes.sum())):
        upper = torch.minimum(upper + 1, sizes)
    other = max(count - int(lower.sum()), 0)
    ends = (alive.cumsum(0) / alive.sum() * other).round().long()
    quotas = torch.minimum(ends.diff(prepend=ends.new_zeros(1)) + lower, upper)
    for group in alive.argsort(descending=True, stable=True).tolist():
        missing = count - int(quotas.sum())
        quotas[group] += max(min(missing, int(upper[group] - quotas[group])), 0)
    return quotas


@register_policy("prunesid")
@dataclass
class PruneSID(Tilewise):
    """Keep of every tile patches of many meanings, none of which repeats another.

    PruneSID (Fang et al., ICLR 2026, arXiv 2603.09480): the principal components of the vision tower's states put
    patches into groups, a quarter of the budget many. In a group the patches at which the CLS token looks most take out
    those like them (attention after the softmax, in the layer whose output the model uses). Groups share the budget by
    what is left of them. The published code approximates the components from torch's global random state; here they are
    exact, so that some patches come into other groups. Towers without CLS token: the attention that a patch gets from
    all.

    Args:
        keep: patches of each tile that stay: a ratio (float) of those that are there (above 0 at least one of each
            tile), or a count (int).
        placement: "true" leaves every token where it was. "official" repeats the published code for images without
            crops: the CLS token comes first and is counted, then group by group. (The patches of crops it puts to wrong
            places; that is refused.)

    Raises:
        TypeError, ValueError: settings out of range.
    """

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        wished = ("hidden_states", "attentions")
        return (*wished, "cls_token", "projector") if self.placement == "official" else wished

    def choose(self, image: Image, counts: list[int], there: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros_like(there)
        for tile, kept in enumerate(self.ranked(image, counts, counts, there)):
            chosen[tile, kept] = True
        return chosen

    def compress(self, image: Image) -> torch.Tensor | Pooled:
        if self.placement != "official":
            return super().compress(image)
        layout, tower = image.layout, image.tower
        if layout.crops != (0, 0) or layout.newline.any():
            raise UnsupportedError(
                "placement='official' is the published code, which puts the patches of crops to wrong places: "
                "for this image use placement='true'"
            )
        assert tower is not None
        there = torch.ones(layout.tiles, layout.grid[0] * layout.grid[1], dtype=torch.bool)
        counts = self.counts(there)
        ranked = self.ranked(image, counts, [max(count - 1, 0) for count in counts], there)
        return with_cls(image, ranked, [count > 0 for count in counts])

    def ranked(self, image: Image, budgets: list[int], counts: list[int], there: torch.Tensor) -> list[torch.Tensor]:
        """Per tile, the patches that stay, group by group: so many of each tile as ``counts`` says."""
        assert image.tower is not None
        states = image.tower.hidden_states().detach().float()
        groups = [max(budget // 4, 1) for budget in budgets]
        here, total = there.to(states.device), torch.tensor(budgets, device=states.device)
        (parts, flops), units = loadings(states, here, max(groups)), normalize(states, dim=-1)
        image.flops += flops
        parts, limits, scores = parts.cpu(), threshold(units, here, total), saliency(image.tower).cpu()
        kept = []
        for tile, count in enumerate(counts):
            at = there[tile].nonzero().squeeze(1)
            if count >= len(at) or not count:
                kept.append(at[:count])
                continue
            group = parts[tile, at, : groups[tile]].argmax(1)
            best = scores[tile, at].argsort(descending=True, stable=True)
            alive, flops = survivors(units[tile, at.to(units.device)], best, group, limits[tile])
            image.flops += flops
            quotas = quotas_of(*_sizes(group, alive, groups[tile]), budgets[tile], count)
            best = best[(~alive[best]).int().argsort(stable=True)]
            kept.append(at[first_of_groups(best, group, quotas)[:count]])
        return kept


def _sizes(group: torch.Tensor, alive: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [groups] each: the members of every group, and the survivors among them."""
    return group.bincount(minlength=groups), group[alive].bincount(minlength=groups)


def with_cls(image: Image, ranked: list[torch.Tensor], cls: list[bool]) -> Pooled:
    """The tiles' patches in this order, in front of each tile's its CLS token (where ``cls`` says so)."""
    assert image.tower is not None
    states, first = image.tower.hidden_states(), image.tower.cls_state()
    n, rows, cells = states.shape[1], [], []
    for tile, (kept, leads) in enumerate(zip(ranked, cls, strict=True)):
        rows += [first[tile : tile + leads], states[tile].index_select(0, kept.to(states.device))]
        cells += [torch.full((int(leads),), -1), tile * n + kept]
    at = torch.cat(cells)
    layout: Layout = layout_of(image.layout, at.clamp(min=0))
    features = image.tower.project(torch.cat(rows)).to(image.features.dtype)
    return Pooled(features, [[int(cell)] if cell >= 0 else [] for cell in at], layout)
