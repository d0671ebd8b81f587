"""TOPS: the set builder against the paper's loop written out, and the policy's counts. (No code is published.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout

import vtr
from tests.policies.stages import tokens_of
from tests.seen import GivenTower, seen
from vtr.policies.decoder import _preserve
from vtr.policies.decoder._preserve import preserving
from vtr.policies.picture._greedy import unit


def written_out(
    states: Tensor, relevance: Tensor, count: int, diversity: float, coverage: float, how: str
) -> list[int]:
    """The paper's algorithm, one token at a time, in float64."""
    units, r = unit(states).double(), relevance.double()
    table, n = units @ units.T, len(relevance)

    def normal(x: Tensor, among: list[int]) -> Tensor:
        few = x[among]
        return x / few.mean() if how == "mean" else (x - few.min()) / (few.max() - few.min())

    chosen = [int(r.argmax())]
    while len(chosen) < count:
        out = [i for i in range(n) if i not in chosen]
        nearest = table[:, chosen].amax(1)
        div = 1 - nearest
        cov = torch.stack([(table[i, out] - nearest[out]).clamp(min=0).sum() for i in range(n)])
        score = normal(r, list(range(n))) + diversity * normal(div, out) + coverage * normal(cov, out)
        chosen.append(max(out, key=lambda i: (float(score[i]), -i)))
    return chosen


@pytest.mark.parametrize("how", ["mean", "minmax"])
@pytest.mark.parametrize("seed", range(4))
def test_the_set_is_the_papers(seed: int, how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(seed)
    states, relevance = torch.randn(2, 30, 12, generator=g), torch.rand(2, 30, generator=g)
    want = [written_out(s, r, 20, 0.5, 0.4, how) for s, r in zip(states, relevance, strict=True)]
    picks, _ = preserving(unit(states), relevance, 20, 0.5, 0.4, how)
    assert picks.tolist() == want
    monkeypatch.setattr(_preserve, "_less", lambda gain, table, was, now: _preserve._gains(table, now))
    assert preserving(unit(states), relevance, 20, 0.5, 0.4, how)[0].tolist() == want  # as on an accelerator


def test_shorter_sets_are_filled_up() -> None:
    g = torch.Generator().manual_seed(5)
    states, relevance = torch.randn(2, 12, 6, generator=g), torch.rand(2, 12, generator=g)
    there = torch.arange(12) < torch.tensor([[12], [7]])
    picks, _ = preserving(unit(states * there[..., None]), relevance * there, 9, there=there)
    assert picks[0].tolist() == written_out(states[0], relevance[0], 9, 0.5, 0.5, "mean")
    assert picks[1, :7].tolist() == written_out(states[1, :7], relevance[1, :7], 7, 0.5, 0.5, "mean")


def test_equal_tokens_are_chosen_once_each_the_first_first() -> None:
    picks, _ = preserving(unit(torch.ones(1, 5, 3)), torch.ones(1, 5), 5)
    assert picks.tolist() == [[0, 1, 2, 3, 4]]
    assert preserving(unit(torch.ones(1, 5, 3)), torch.zeros(1, 5), 0)[0].shape == (1, 0)


def test_counts_are_the_papers() -> None:
    policy = vtr.TOPS()
    for target in (0.2223, 128):
        assert vtr.TOPS(target).kept_of(tile_layout(24, 24)) == 256
    g = torch.Generator().manual_seed(0)
    n = 576
    tower = GivenTower(from_cls={None: torch.rand(1, 2, n, generator=g)})
    image = seen(torch.randn(1, n, 8, generator=g), tower=tower)
    kept = policy.compress(image)
    assert kept is not None and len(kept.unique()) == 256
    for layer, left in ((12, 128), (24, 32)):
        fields = {"place": torch.arange(len(kept)), "hidden": torch.randn(len(kept), 8, generator=g)}
        tokens = tokens_of(layer, 32, fields, torch.rand(len(kept), generator=g), image.memo, total=256)
        kept = policy.prune(layer, tokens)
        assert kept is not None and len(kept.unique()) == left == policy.entering_of(32, tile_layout(24, 24))[layer]
    assert policy.cuts(32) == [12, 24] and policy.cuts(40) == [15, 30]


def test_newline_tokens_stay_and_are_not_counted() -> None:
    g = torch.Generator().manual_seed(1)
    newline = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1])
    fields = {"place": torch.arange(8), "hidden": torch.randn(8, 4, generator=g), "newline": newline}
    short = {"place": torch.arange(5), "hidden": torch.randn(5, 4, generator=g)}
    policy = vtr.TOPS(3)
    memos: list[dict[str, Any]] = [{"tops": {0: (3, 2)}}, {"tops": {0: (3, 0)}}]
    rows = [
        tokens_of(12, 32, f, torch.rand(len(f["place"]), generator=g), m)
        for f, m in zip((fields, short), memos, strict=True)
    ]
    together = policy.prune_all(12, rows)
    for row, answer in zip(rows, together, strict=True):
        alone = policy.prune(12, row)
        assert alone is not None and answer is not None and answer.tolist() == alone.tolist()
    assert together[0] is not None and together[1] is not None
    assert len(together[0]) == 5 and {3, 7} < set(together[0].tolist()) and len(together[1]) == 3


@pytest.mark.parametrize("share", [0.05, 0.264, 0.6])
def test_a_mean_budget(share: float) -> None:
    policy = vtr.TOPS(**vtr.TOPS.settings_at(share, 32, 24))
    total = 100_000
    target = int(policy.target * total)
    counts = [policy.count(step, target, total) for step in range(3)]
    assert (12 * counts[0] + 12 * counts[1] + 8 * counts[2]) / 32 / total == pytest.approx(share, rel=5e-3)
