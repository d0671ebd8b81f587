"""FitPrune against the numbers of the official code (ywh187/FitPrune), and what it does beyond them."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests import official
from tests.policies import inside
from vtr.policies.decoder.fitprune import DELETED, curve

META = official.meta("fitprune")
cases = pytest.mark.parametrize("case", META["cases"], ids=lambda c: f"c{c['case']}")


@cases
def test_prefill_and_decoding(case: inside.Case) -> None:
    depth = len(case["entering_lengths"])
    policy = vtr.FitPrune(scheme=[case["delete_scheme"].get(str(layer), 0) for layer in range(depth)])
    ran, mine = inside.agrees("fitprune", case, policy), inside.of("fitprune", case)
    assert [len(kept) for kept in ran.kept] == policy.entering(depth, case["vision"])
    for layer in range(depth - 1):
        if f"L{layer}.stays" not in mine:
            continue
        first, n = case["start"], len(ran.kept[layer])
        stays = mine[f"L{layer}.stays"].flatten().bool()
        assert len(stays) == n + case["start"] + case["text"]
        chosen = stays[first : first + n].tolist()
        assert ran.kept[layer + 1] == [token for token, yes in zip(ran.kept[layer], chosen, strict=True) if yes]


# ------------------------------------------------------------------------------------------------- beyond the official
def test_the_published_recipe_is_exact_where_it_was_made_for() -> None:
    want = [576 - sum(DELETED[:layer]) for layer in range(32)]
    assert vtr.FitPrune().entering(32, 576) == want and sum(DELETED) == 449
    assert vtr.FitPrune(scheme=DELETED).entering(32, 576) == want


@pytest.mark.parametrize("depth", [1, 2, 5, 28, 32, 80])
@pytest.mark.parametrize("total", [1, 2, 300, 2880])
def test_other_reductions_depths_and_numbers(depth: int, total: int) -> None:
    before = float("inf")
    for reduction in (0.0, 0.1, 0.55, 0.6, 0.9, 1.0):
        counts = vtr.FitPrune(reduction).entering(depth, total)
        assert counts == sorted(counts, reverse=True) and counts[0] == total and counts[-1] >= 1
        assert sum(counts) <= before
        before = sum(counts)
    assert vtr.FitPrune(0.0).entering(depth, total) == [total] * depth


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_set_to_a_budget(share: float) -> None:
    made = vtr.FitPrune(**vtr.FitPrune.settings_at(share, 32, 24))
    assert abs(sum(made.entering(32, 576)) / 576 / 32 - share) < 1e-3
    assert abs(sum(curve(made.reduction, 32)) / 32 - share) < 1e-3


def test_without_text_behind_the_picture_decides() -> None:
    own, none = torch.tensor([0.1, 0.5, 0.3, 0.4]), torch.zeros(4)
    tokens = vtr.Tokens(1, 5, 4, 4, {}.__getitem__, (own, none), lambda: own)
    answer = vtr.FitPrune(scheme=[2, 0, 0, 0, 0]).prune(1, tokens)
    assert answer is not None and answer.indices().tolist() == [1, 3]


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="one per layer"):
        vtr.FitPrune(scheme=[1, 2]).check(5)
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="lies in"):
            vtr.FitPrune(bad)
    with pytest.raises(TypeError, match="list"):
        vtr.FitPrune(scheme="llava")
    assert vtr.policy("fitprune:0.5") == vtr.FitPrune(0.5)
