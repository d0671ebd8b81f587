"""HiPrune against the numbers of the official code (Danielement321/HiPrune)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official
from tests.policies.encoder import check_run, each_tile, inputs_of, layout_of, runs_of
from tests.seen import GivenTower, seen
from vtr.engine.image_tower import attention_index, state_index
from vtr.policies.picture.hiprune import beside

META, UNIT = official.meta("hiprune"), official.tensors("hiprune", "unit")
LAYER = 1


def name_of(case: dict[str, Any]) -> str:
    return case["case"] if isinstance(case["case"], str) else f"c{case['case']}"


@pytest.mark.parametrize("case", META["unit"], ids=name_of)
def test_kept_patches(case: dict[str, Any]) -> None:
    name = name_of(case)
    objects, deep = UNIT[f"{name}.object_mean"], UNIT[f"{name}.deep_mean"]
    for which, mean in (("object", objects), ("deep", deep)):
        if f"{name}.{which}_attn" in UNIT:
            official.close(UNIT[f"{name}.{which}_attn"].mean((1, 2))[:, 1:], mean, 1e-6)

    def tower(i: int) -> GivenTower:
        return GivenTower(received={None: deep[i : i + 1], LAYER: objects[i : i + 1]})

    policy = vtr.HiPrune(case["per_tile"], "official", case["alpha"], LAYER)
    kept = each_tile(policy, torch.zeros(*deep.shape, 2), tower)
    assert torch.equal(kept, UNIT[f"{name}.mask"])
    assert kept.sum(1).tolist() == case["kept"]


@runs_of("hiprune")
def test_embeddings_and_answers(run: str) -> None:
    settings = META["e2e"]["runs"][run]
    policy = vtr.HiPrune(
        settings["retention"], "official", settings["alpha"], settings["object_layer"] - 1, budget="total"
    )
    check_run("hiprune", run, policy)
    assert official.run(*inputs_of("hiprune", run), policy)[0].shape[1] == settings["embeds_len"]


def test_a_share_of_the_depth_names_the_published_layer() -> None:
    share = vtr.HiPrune().object_layer
    assert [attention_index(share, depth, -2) for depth in (24, 4, 1, 32)] == [8, 1, 0, 11]
    assert state_index(share, 24, -2) == 9 and attention_index(1.0, 24, -2) == 23
    assert vtr.HiPrune().wants == ("attentions", "attentions[0.375]")
    for wrong in (1.5, 0.0, "x", True):
        with pytest.raises((TypeError, ValueError), match="object_layer"):
            vtr.HiPrune(object_layer=wrong)  # type: ignore[arg-type]


def test_a_layer_may_be_named_either_way() -> None:
    """The tower of four layers: 0.375 of them is its second."""
    run = next(run for run, settings in META["e2e"]["runs"].items() if settings["tiles"] > 1)
    made = [official.run(*inputs_of("hiprune", run), vtr.HiPrune(64, object_layer=layer))[0] for layer in (0.375, 1)]
    other = official.run(*inputs_of("hiprune", run), vtr.HiPrune(64, alpha=1.0, object_layer=0))[0]
    assert torch.equal(*made) and not torch.equal(other, made[0])


def test_neighbours_are_those_in_the_grid() -> None:
    corner = torch.zeros(1, 12, dtype=torch.bool).index_fill(1, torch.tensor([3]), True)  # the end of 3 rows' first
    assert beside(corner, (3, 4)).nonzero()[:, 1].tolist() == [2, 7]
    assert beside(corner, (3, 4), "official").nonzero()[:, 1].tolist() == [0, 2, 4, 7]


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [1, 4, 9, 36])
def test_small_budgets_never_fail(n: int, alpha: float) -> None:
    """Where the neighbours alone are more than the budget, the official code fails."""
    generator = torch.Generator().manual_seed(n)
    deep, objects = (torch.rand(1, n, generator=generator) / n for _ in range(2))
    for keep in range(n + 2):
        tower = GivenTower(received={None: deep, 0.375: objects})
        kept = vtr.HiPrune(keep, alpha=alpha).compress(seen(torch.zeros(1, n, 2), tower=tower))
        assert isinstance(kept, Tensor) and len(kept.unique()) == len(kept) == min(keep, n)
        anchors = objects[0].argsort(descending=True)[: min(round(min(keep, n) * alpha / 5), keep)]
        assert set(anchors.tolist()) <= set(kept.tolist())


def test_a_total_budget_is_divided_by_the_tiles_of_the_picture_alone() -> None:
    layout = layout_of({"side": 6, "image_size_wh": [100, 100], "grid_wh": [2, 2]})
    newlines = int(layout.newline.sum())
    assert vtr.HiPrune(64, budget="total").kept_of(layout) == 5 * (64 // 5) + newlines
    assert vtr.HiPrune(64, "official", budget="total").kept_of(layout) == 5 * (64 // 5)
    assert vtr.HiPrune(0.01, budget="total").kept_of(layout) == 5 + newlines
    assert math.isclose(vtr.HiPrune(0.5, budget="total").kept_of(layout), 90 + newlines)
