"""VScan's first stage against the numbers of the official code (Tencent/SelfEvolvingAgent)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official
from tests.official import IMG, close
from tests.seen import GivenTower, seen
from vtr.image import Image, Layout
from vtr.policies.picture._tiles import available
from vtr.policies.picture.vscan import VScan, local_scan, merged, windows

META = official.meta("vscan")
UNIT = official.tensors("vscan", "unit")
cases = pytest.mark.parametrize("case", META["cases"], ids=lambda c: c["case"])


def images(case: dict[str, Any]) -> list[Image]:
    """The pictures of a case: one of all tiles, where it has a size, else each tile one."""
    name = case["case"]
    features, size = UNIT[f"{name}.features"], case.get("image_size_wh")
    local, whole = UNIT[f"{name}.attention_layer5"], UNIT[f"{name}.attention_layer_m2"]
    side, newline = round(features.shape[1] ** 0.5), UNIT.get(f"{name}.image_newline")
    layout = tile_layout(side, side)
    if size is not None:
        (width, height), (columns, rows), pixels = size, case["grid_wh"], 14 * side
        layout = anyres_layout((height, width), ((rows * pixels, columns * pixels),), pixels, side)
    parts = [slice(None)] if size is not None else [slice(b, b + 1) for b in range(len(features))]
    towers = [GivenTower(from_cls={vtr.VScan().local_layer: local[p, None], None: whole[p, None]}) for p in parts]
    return [
        seen(features[p], layout, tower, newline if size is not None else None)
        for p, tower in zip(parts, towers, strict=True)
    ]


@cases
def test_who_stays(case: dict[str, Any]) -> None:
    policy, masks = VScan(case["T"], "official"), []
    for image in images(case):
        there = available(image.layout, "official")
        masks.append(policy.choose(image, policy.counts(there), there))
    mask = torch.cat(masks)
    assert mask.sum(1).tolist() == case["kept"]
    assert torch.equal(mask, UNIT[f"{case['case']}.mask"])


@cases
def test_merged_tokens(case: dict[str, Any]) -> None:
    """Single tiles: what every one becomes. Pictures with crops: the unpadded canvas, with all newline tokens."""
    features, mask = UNIT[f"{case['case']}.features"], UNIT[f"{case['case']}.mask"]
    means, _ = merged(features, mask, torch.ones_like(mask))
    close(means, UNIT[f"{case['case']}.kept_features"])
    made = [VScan(case["T"], "official").compress(image).features for image in images(case)]
    if case.get("image_size_wh") is None:
        close(torch.cat(made), UNIT[f"{case['case']}.kept_features"])
    if (prompt := prompted(case, made[0])) is not None:
        close(prompt, UNIT[f"{case['case']}.inputs_embeds"][0])


def prompted(case: dict[str, Any], picture: Tensor) -> Tensor | None:
    ids = UNIT.get(f"{case['case']}.input_ids")
    if ids is None:
        return None
    table, row = UNIT[f"{case['case']}.embed_tokens"], ids[0].tolist()
    return torch.cat([picture if t == IMG else table[t][None] for t in row])


@cases
def test_no_token_is_lost(case: dict[str, Any]) -> None:
    """By default every tile keeps what was asked for, whatever windows can share; and its size says how many."""
    policy = VScan(case["T"])
    for image in images(case):
        made = policy.compress(image)
        patches = [s for s in made.sources if not image.layout.newline[s[0]]]
        assert len(patches) == int(available(image.layout).sum(1).clamp(max=case["T"]).sum())
        assert len(made.sources) == policy.kept_of(image.layout)
        assert sorted(i for s in made.sources for i in s) == list(range(len(image)))
        if image.layout.has_all_patches:
            official_ = VScan(case["T"], "official")
            assert official_.kept_of(image.layout) == len(official_.compress(image).sources)


def test_windows_of_any_grid() -> None:
    assert windows((24, 24)).bincount().tolist() == [36] * 16
    assert len(windows((3, 3)).unique()) == 9
    assert len(windows((9, 14)).unique()) == 3 * 4
    scores = torch.rand(2, 9 * 14, generator=torch.Generator().manual_seed(0))
    chosen = local_scan(scores, windows((9, 14)), torch.tensor([2, 0]), torch.ones(2, 9 * 14).bool())
    assert windows((9, 14))[chosen[0]].bincount()[windows((9, 14)).unique()].tolist() == [2] * 12
    assert not chosen[1].any()


def given(layout: Layout, seed: int = 0) -> Image:
    draw = torch.Generator().manual_seed(seed)
    tiles = torch.randn(layout.tiles, layout.grid[0] * layout.grid[1], 8, generator=draw)
    local, whole = (torch.rand(tiles.shape[0], 2, tiles.shape[1], generator=draw) for _ in range(2))
    return seen(tiles, layout, GivenTower(from_cls={vtr.VScan().local_layer: local, None: whole}))


@pytest.mark.parametrize("keep", [0, 1, 2, 7, 9, 500, 0.0, 0.01, 1.0])
@pytest.mark.parametrize("size", [(3, 3), (10, 4), (2, 9)])
def test_small_tiles_and_odd_budgets(keep: float, size: tuple[int, int]) -> None:
    for layout in (tile_layout(*size), anyres_layout((60, 100), ((96, 96),), 48, 3)):
        image, policy = given(layout), VScan(keep)
        made = policy.compress(image)
        assert len(made.sources) == len(made.features) == policy.kept_of(layout)
        firsts = [s[0] for s in made.sources]
        assert firsts == sorted(set(firsts))
        whole = keep == 500 or (isinstance(keep, float) and keep == 1.0)
        want = image.features[torch.tensor(firsts)] if whole else None
        assert want is None or torch.allclose(made.features, want)


def test_a_tower_without_a_cls_token_ranks_by_attention_received() -> None:
    layout = tile_layout(4, 4)
    scores = torch.arange(16.0).flip(0)[None]
    tower = GivenTower(received={vtr.VScan().local_layer: scores, None: scores}, with_cls=False)
    made = vtr.policy("vscan:4").compress(seen(torch.eye(16)[None], layout, tower))
    assert isinstance(made, vtr.Pooled) and [s[0] for s in made.sources] == [0, 1, 2, 3]
