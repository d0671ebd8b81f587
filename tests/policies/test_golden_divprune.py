"""DivPrune against the numbers of the official code (vbdi/divprune) and of AngelSlim's port."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout, canvas_of, with_newlines

import vtr
from tests import official
from tests.official import IMG
from tests.seen import seen
from vtr.image import Image, Layout
from vtr.policies.picture._greedy import farthest, unit

META = official.meta("divprune")
UNIT, EMBEDS = (official.tensors("divprune", name) for name in ("unit", "embeds"))
PORT = official.tensors("idpruner", "divprune_port")


def cases(method: str, file: str) -> Any:
    found = [case for case in official.meta(method)["cases"] if case["file"] == file]
    return pytest.mark.parametrize("case", found, ids=lambda c: c["case"])


def classes(features: Tensor) -> Tensor:
    """int64 [n]: equal tokens have an equal number; any of them may stand for another."""
    return features.unique(dim=0, return_inverse=True)[1]


def line(features: Tensor) -> Image:
    return seen(features[None], tile_layout(1, len(features)))


def check(features: Tensor, picks: Tensor, policy: vtr.Policy) -> None:
    """All picks in order, while tokens differ; no token twice."""
    which, count = classes(features), len(picks)
    distinct = min(count, int(which.max()) + 1)
    got, _ = farthest(unit(features)[None], count)
    assert len(set(got[0].tolist())) == count
    assert which[got[0, :distinct]].tolist() == which[picks[:distinct]].tolist()
    if len(features) == int(which.max()) + 1:
        assert got[0].tolist() == picks.tolist()
    kept = policy.compress(line(features))
    assert isinstance(kept, Tensor) and kept.tolist() == got[0].sort().values.tolist()


@cases("divprune", "unit")
def test_picks(case: dict[str, Any]) -> None:
    features, picks = UNIT[f"{case['case']}.features"], UNIT[f"{case['case']}.picks"]
    assert len(picks) == case["count"]
    check(features, picks[: case["count"]], vtr.DivPrune(case["ratio"], newline="official"))
    if f"{case['case']}.distance" in UNIT:
        units = unit(features)
        official.close(1 - units @ units.T, UNIT[f"{case['case']}.distance"])


@cases("idpruner", "divprune_port")
def test_the_port(case: dict[str, Any]) -> None:
    check(PORT[f"{case['case']}.features"], PORT[f"{case['case']}.picks"], vtr.DivPrune(case["kept"]))


def layout_of(case: dict[str, Any]) -> Layout:
    side = case["side"]
    if case["tiles"] == 1:
        return tile_layout(side, side)
    (width, height), (across, down) = case["image_size_wh"], case["grid_wh"]
    if case["merge"] == "spatial":
        canvas = canvas_of(down, across, side)
        whole = with_newlines(canvas, canvas, (down, across), side)
        stays = whole.newline == 0
        return Layout(*(getattr(whole, f)[stays] for f in ("tile", "y", "x", "newline")), whole.grid, whole.crops)
    pixels = 14 * side
    return anyres_layout((height, width), ((down * pixels, across * pixels),), pixels, side)


@cases("divprune", "embeds")
def test_the_whole_prompt(case: dict[str, Any]) -> None:
    """Newline tokens compete with patches; any of them may stand for another."""
    name, system = case["case"], case["system_tokens"]
    features, newline = EMBEDS[f"{name}.features"], EMBEDS[f"{name}.image_newline"]
    image = seen(features, layout_of(case), newline=newline)
    n = case["vision_tokens"]
    assert EMBEDS[f"{name}.input_ids"][0].tolist().index(IMG) == system and len(image) == n
    official.close(image.features, EMBEDS[f"{name}.whole_embeds"][0, system : system + n], 1e-6)
    policy = vtr.DivPrune(case["ratio"], newline="official")
    kept, places = policy.compress(image), EMBEDS[f"{name}.kept_positions"]
    theirs = places[(places >= system) & (places < system + n)] - system
    assert isinstance(kept, Tensor) and len(kept) == case["kept_vision"] == policy.kept_of(image.layout)
    which = classes(image.features)
    assert which[kept].sort().values.tolist() == which[theirs].sort().values.tolist()
    patches = image.layout.newline == 0
    assert kept[patches[kept]].tolist() == theirs[patches[theirs]].tolist()


def test_newline_tokens_stay_by_default() -> None:
    layout = anyres_layout((90, 60), ((168, 84),), 84, 6)
    image = seen(torch.randn(3, 36, 16, generator=torch.Generator().manual_seed(0)), layout)
    newlines = layout.newline.nonzero()[:, 0].tolist()
    kept = vtr.DivPrune(7).compress(image)
    assert set(newlines) <= set(kept.tolist()) and len(kept) == 7 + len(newlines) == vtr.DivPrune(7).kept_of(layout)


def test_more_than_there_is_nothing_and_equal_tokens() -> None:
    same = line(torch.ones(9, 4))
    assert vtr.DivPrune(4).compress(same).tolist() == [0, 1, 2, 3]
    assert vtr.DivPrune(0).compress(same).tolist() == [] and len(vtr.DivPrune(50).compress(same)) == 9
    assert len(vtr.DivPrune(1).compress(line(torch.zeros(9, 4)))) == 1
    assert vtr.DivPrune(0.001, newline="official").kept_of(same.layout) == 1


def test_one_budget_for_a_row() -> None:
    """As if all tokens were of one image."""
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    images = [line(features[:15]), line(features[15:])]
    first, second = vtr.DivPrune(0.25, pool="row").compress_row(images)
    assert torch.cat([first, second + 15]).tolist() == vtr.DivPrune(0.25).compress(line(features)).tolist()
    assert [len(k) for k in vtr.DivPrune(0.2).compress_row(images)] == [3, 5]
    with pytest.raises(ValueError, match="pool='image'"):
        vtr.DivPrune(0.2, pool="row").kept_of(images[0].layout)
