"""Greedy choices that several policies share: batched as alone, absent tokens last, products counted, ties by index."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vtr.policies.picture._greedy import covering, determinant, farthest, marginal, products, unit

Choice = Callable[[Tensor, Tensor, int, Tensor | None], tuple[Tensor, int]]
"""(units, importance, count, there) → (picks, FLOPs)"""


def _farthest(units: Tensor, importance: Tensor, count: int, there: Tensor | None) -> tuple[Tensor, int]:
    return farthest(units, count, there)


def _marginal(units: Tensor, importance: Tensor, count: int, there: Tensor | None, n: int = 1) -> tuple[Tensor, int]:
    return marginal(units, importance, count, 0.5, n, there)


def _determinant(units: Tensor, importance: Tensor, count: int, there: Tensor | None) -> tuple[Tensor, int]:
    return determinant(units, importance, count, there)


def _covering(units: Tensor, importance: Tensor, count: int, there: Tensor | None) -> tuple[Tensor, int]:
    units = units if there is None else units * there[..., None]
    table, flops = products(units) if count else (units.new_zeros(*units.shape[:2], units.shape[1]), 0)
    return covering(table, count, there, importance)[0], flops


CHOICES: dict[str, Choice] = {
    "farthest": _farthest, "marginal": _marginal, "three at once": partial(_marginal, n=3),
    "determinant": _determinant, "covering": _covering,
}  # fmt: skip
choices = pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)


def tokens(tiles: int, n: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    features, importance = torch.randn(tiles, n, width, generator=made), torch.rand(tiles, n, generator=made) + 0.01
    there = torch.rand(tiles, n, generator=made) > 0.4
    there[:, 0] = True
    return unit(features), importance, there


@choices
@pytest.mark.parametrize(("n", "count"), [(30, 7), (30, 2), (30, 1), (30, 0), (200, 9), (200, 20), (12, 12)])
def test_a_tile_is_what_its_own_tokens_are_alone(choose: Choice, n: int, count: int) -> None:
    units, importance, there = tokens(3, n, 16)
    with FlopCounterMode(display=False) as counter:
        picks, flops = choose(units, importance, count, there)
    assert flops == counter.get_total_flops()
    assert picks.shape == (3, count)
    for t in range(3):
        mine = there[t].nonzero()[:, 0]
        k = min(count, len(mine))
        alone, _ = choose(units[t, mine][None], importance[t, mine][None], k, None)
        assert picks[t, :k].tolist() == mine[alone[0]].tolist()
        assert len(set(picks[t].tolist())) == count


@choices
def test_rows_one_by_one_or_all_at_once(choose: Choice) -> None:
    """A few picks need fewer rows than many do; the first are the same."""
    units, importance, _ = tokens(2, 200, 32)
    few, _ = choose(units, importance, 6, None)
    many, _ = choose(units, importance, 60, None)
    assert few.tolist() == many[:, :6].tolist()


@choices
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_tokens(choose: Choice, value: float) -> None:
    picks, _ = choose(unit(torch.full((2, 9, 4), value)), torch.ones(2, 9), 9, None)
    assert picks.tolist() == [list(range(9))] * 2


@choices
def test_nothing_is_written_into(choose: Choice) -> None:
    given = tokens(2, 20, 8)
    before = [t.clone() for t in given]
    units, importance, there = given
    choose(units, importance, 5, there)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_farthest_is_its_definition() -> None:
    units, _, _ = tokens(1, 40, 8)
    apart = 1 - units[0] @ units[0].T
    apart.fill_diagonal_(torch.inf)
    want = [int(apart.amin(1).argmax())]
    for _ in range(11):
        far = apart[:, want].amin(1)
        far[want] = -1
        want.append(int(far.argmax()))
    assert farthest(units, 12)[0][0].tolist() == want


def test_determinant_is_its_definition() -> None:
    """Each step takes the token with which the kernel's determinant is largest."""
    units, relevance, _ = tokens(1, 24, 16)
    kernel = (relevance[0][:, None] * (units[0] @ units[0].T) * relevance[0]).double()
    want: list[int] = []
    for _ in range(8):
        best = [torch.linalg.det(kernel[[*want, i]][:, [*want, i]]) if i not in want else -1.0 for i in range(24)]
        want.append(int(torch.tensor(best).argmax()))
    assert determinant(units, relevance, 8)[0][0].tolist() == want
