"""VisPruner against the numbers of the official code (Theia-4869/VisPruner)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official
from tests.policies.encoder import check_run, each_tile, layout_of, runs_of
from tests.seen import GivenTower, seen

META, UNIT = official.meta("vispruner"), official.tensors("vispruner", "unit")


def kept_of(policy: vtr.Policy, features: Tensor, heads: Tensor) -> Tensor:
    def tower(i: int) -> GivenTower:
        return GivenTower(states={None: features[i : i + 1]}, from_cls={None: heads[i : i + 1]})

    return each_tile(policy, features, tower)


@pytest.mark.parametrize("case", META["unit"], ids=lambda c: str(c["case"]))
def test_kept_patches(case: dict[str, Any]) -> None:
    """Where the official code fails (an odd rest), the right number of patches stays, the important among them."""
    features, heads = (UNIT[f"c{case['case']}.{name}"] for name in ("features", "cls_attn"))
    kept = kept_of(vtr.VisPruner(case["keep"], important_ratio=case["important_ratio"]), features, heads)
    if "error" not in case:
        assert torch.equal(kept, UNIT[f"c{case['case']}.mask"])
    assert kept.sum(1).tolist() == [case["keep"]] * len(features)
    best = heads.mean(1).argsort(descending=True, dim=1)[:, : case["important"]]
    assert kept.gather(1, best).all()


@pytest.mark.parametrize("case", META["siglip"]["cases"], ids=lambda c: str(c["case"]))
def test_towers_without_cls_token(case: dict[str, Any]) -> None:
    numbers, name = official.tensors("vispruner", "siglip"), f"s{case['case']}"
    features, received = numbers[f"{name}.features"], numbers[f"{name}.received"]

    def tower(i: int) -> GivenTower:
        part = slice(i, i + 1)
        return GivenTower(states={None: features[part]}, received={-1: received[part]}, with_cls=False)

    policy = vtr.VisPruner(case["keep"], important_ratio=case["important_ratio"])
    assert torch.equal(each_tile(policy, features, tower), numbers[f"{name}.mask"])


@runs_of("vispruner")
def test_embeddings_and_answers(run: str) -> None:
    settings = META["e2e"]["runs"][run]
    check_run("vispruner", run, vtr.VisPruner(settings["keep"], "official", settings["important_ratio"]))


@pytest.mark.parametrize("n", [1, 2, 5, 9, 12, 35])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_any_rest_can_lose_any_number(n: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(n)
    features, heads = torch.randn(2, n, 8, generator=generator), torch.rand(2, 3, n, generator=generator)
    for keep in range(n + 2):
        kept = kept_of(vtr.VisPruner(keep, important_ratio=ratio), features, heads)
        assert kept.sum(1).tolist() == [min(keep, n)] * 2


def test_tiles_of_different_sizes_are_what_each_is_alone() -> None:
    """Unpadding leaves crops with other numbers of patches, among which alone they are chosen."""
    layout = layout_of({"side": 6, "image_size_wh": [100, 60], "grid_wh": [2, 2]})
    generator = torch.Generator().manual_seed(0)
    features, heads = torch.randn(5, 36, 8, generator=generator), torch.rand(5, 3, 36, generator=generator)
    image = seen(features, layout, GivenTower(states={None: features}, from_cls={None: heads}))
    kept = vtr.VisPruner(8).compress(image)
    assert isinstance(kept, Tensor) and len(kept) == vtr.VisPruner(8).kept_of(layout)
    for tile in range(5):
        here = (layout.tile == tile) & (layout.newline == 0)
        at = layout.y[here] * 6 + layout.x[here]
        part, scores = features[tile : tile + 1, at], heads[tile : tile + 1, :, at]
        alone = vtr.VisPruner(8).compress(seen(part, None, GivenTower({None: part}, from_cls={None: scores})))
        assert isinstance(alone, Tensor)
        mine = [i for i in kept.tolist() if here[i]]
        assert sorted(mine) == sorted(here.nonzero().squeeze(1)[alone].tolist())
