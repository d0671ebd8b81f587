"""HiRED against the numbers of the official code (hasanar1f/HiRED)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official
from tests.policies.encoder import layout_of
from tests.seen import GivenTower, seen
from vtr.image import Image
from vtr.policies.picture._tiles import available, best_of
from vtr.policies.picture.hired import crop_of

META, GIVEN = official.meta("hired"), official.tensors("hired", "fixtures")


def images_of(case: dict[str, Any]) -> tuple[list[Image], dict[str, Tensor]]:
    """Its images, and all numbers of the case."""
    prefix = case["case"] + "."
    numbers = {k.removeprefix(prefix): v for k, v in GIVEN.items() if k.startswith(prefix)}
    pinpoints = tuple((height, width) for height, width in case["pinpoints"])
    made, first = [], 0
    for size, tiles in zip(case["sizes"], case["tiles"], strict=True):
        layout = anyres_layout(tuple(size), pinpoints, case["grid"] * case["patch"], case["grid"])
        assert layout.tiles == tiles
        part = slice(first, first + tiles)
        heads = {0: numbers["top_cls"][part], None: numbers["bottom_cls"][part]}
        made.append(seen(numbers["features"][part], layout, GivenTower(from_cls=heads)))
        first += tiles
    return made, numbers


def policy_of(case: dict[str, Any]) -> vtr.HiRED:
    return vtr.HiRED(float(case["rate"]), case["alpha"], "stripes", placement="official")


cases = pytest.mark.parametrize("case", META["cases"], ids=lambda c: c["case"])


@cases
def test_budgets_and_kept_patches(case: dict[str, Any]) -> None:
    images, numbers = images_of(case)
    policy, chosen = policy_of(case), []
    for image, budgets in zip(images, case["budgets"], strict=True):
        there = available(image.layout, "official")
        assert policy.counts(image, there) == budgets
        assert image.tower is not None
        chosen.append(best_of(image.tower.attention_from_cls().mean(1), budgets, there))
    assert torch.equal(torch.cat(chosen), numbers["mask"].bool())


@cases
def test_what_comes_out(case: dict[str, Any]) -> None:
    """For square grids the official tokens in their order; others are arranged wrongly there."""
    images, numbers = images_of(case)
    kept = [image.features[policy_of(case).compress(image).sort().values] for image in images]
    if all(image.layout.crops[0] == image.layout.crops[1] for image in images):
        official.close(torch.cat(kept), numbers["output"])
        assert [len(k) for k in kept] == case["lengths"]
    patches = numbers["mask"].bool().split(case["tiles"])
    here = [int((m & available(i.layout)).sum()) for m, i in zip(patches, images, strict=True)]
    assert [len(k) for k in kept] == here


@cases
@pytest.mark.parametrize("score", ["count", "sum"])
@pytest.mark.parametrize("budget", ["rectangles", "stripes"])
def test_true_placement_keeps_to_the_budget(case: dict[str, Any], budget: Any, score: Any) -> None:
    for image in images_of(case)[0]:
        policy, layout = vtr.HiRED(case["rate"], case["alpha"], budget, score), image.layout
        kept = policy.compress(image)
        assert len(kept.unique()) == len(kept) == policy.kept_of(layout)
        assert layout.newline[kept].sum() == layout.newline.sum()
        patches = int((layout.newline == 0).sum())
        assert len(kept) - int(layout.newline.sum()) == vtr.keep_count(case["rate"], patches)


def test_a_patch_of_the_thumbnail_speaks_for_the_crop_that_shows_it() -> None:
    square = layout_of({"side": 4, "image_size_wh": [100, 100], "grid_wh": [2, 2]})
    assert crop_of(square, False).view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert crop_of(square, True).view(4, 4)[:, 0].tolist() == [0, 1, 2, 3]
    flat = layout_of({"side": 6, "image_size_wh": [400, 50], "grid_wh": [3, 3]})  # only the middle row shows something
    assert flat.window is not None and flat.window[0] >= 6
    assert set(crop_of(flat, False).tolist()) == {3, 4, 5}
    assert crop_of(layout_of({"side": 5, "image_size_wh": [10, 70], "grid_wh": [1, 7]}), True).max() == 6


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [[100, 100], [100, 30], [30, 100], [100, 1]])
def test_any_budget(size: list[int], alpha: float) -> None:
    """alpha=1 and more than a thumbnail's patches: the official code divides by nothing."""
    layout = layout_of({"side": 4, "image_size_wh": size, "grid_wh": [2, 2]})
    generator = torch.Generator().manual_seed(0)
    heads = {name: torch.rand(5, 2, 16, generator=generator) for name in (0, None)}
    heads[0][:, :, 2:] = 0  # two patches draw everything
    image = seen(torch.zeros(5, 16, 2), layout, GivenTower(from_cls=heads))
    patches = int((layout.newline == 0).sum())
    for keep in range(patches + 3):
        for score in ("count", "sum"):
            kept = vtr.HiRED(keep, alpha, score=score).compress(image)
            assert len(kept.unique()) == len(kept) == min(keep, patches) + int(layout.newline.sum())
        drops = vtr.HiRED(keep, alpha, "stripes", placement="official").compress(image)
        assert len(drops.unique()) == len(drops) <= min(keep, patches)


def test_one_tile_keeps_its_best() -> None:
    heads = torch.rand(1, 2, 36, generator=torch.Generator().manual_seed(0))
    image = seen(torch.zeros(1, 36, 2), tile_layout(6, 6), GivenTower(from_cls={None: heads}))
    for placement in ("true", "official"):
        kept = vtr.HiRED(0.2, placement=placement).compress(image)
        assert kept.tolist() == vtr.top(heads[0].mean(0), 7).tolist()
