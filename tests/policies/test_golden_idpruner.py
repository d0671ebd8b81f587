"""Maximal marginal relevance against the numbers of AngelSlim (IDPruner), and its saliency of towers without CLS."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout

import vtr
from tests import official
from tests.official import close
from tests.seen import GivenTower, seen
from vtr.engine.image_tower import _columns
from vtr.image import Image
from vtr.policies.picture._greedy import marginal, unit
from vtr.policies.picture.mmr import min_max

META = official.meta("idpruner")
MMR, SALIENCY = (official.tensors("idpruner", name) for name in ("mmr", "saliency_port"))


def cases(file: str) -> Any:
    found = [case for case in META["cases"] if case["file"] == file]
    return pytest.mark.parametrize("case", found, ids=lambda c: c["case"])


def looked_at(features: Tensor, scores: Tensor) -> Image:
    """A line of tokens which the CLS token of the layer in use looks at so much."""
    return seen(features[None], tile_layout(1, len(features)), GivenTower(from_cls={None: scores[None, None]}))


@cases("mmr")
def test_picks(case: dict[str, Any]) -> None:
    features, scores, mask = (MMR[f"{case['case']}.{name}"] for name in ("features", "scores", "mask"))
    trade, parallel, count = case["mmr_lambda"], case["parallel_k"], case["kept"]
    policy = vtr.MMR(count, trade=trade, parallel=parallel)
    kept = policy.compress(looked_at(features, scores))
    assert kept.tolist() == mask.nonzero()[:, 0].tolist() and len(kept) == count
    if f"{case['case']}.picks" not in MMR:
        return
    importance = min_max(scores)
    close(importance, MMR[f"{case['case']}.importance"], 1e-6)
    picks, _ = marginal(unit(features)[None], importance[None], count, trade, parallel)
    assert picks[0].tolist() == MMR[f"{case['case']}.picks"].tolist()
    if f"{case['case']}.similarity_max_after" in MMR:
        units = unit(features)
        close((units @ units[picks[0]].T).amax(1), MMR[f"{case['case']}.similarity_max_after"])


NO_CLS = [case for case in META["cases"] if case["file"] == "saliency_port" and case["model"] == "qwen"]
"""With a CLS token the port leaves its key out of the softmax; ours is the tower's own attention."""


@pytest.mark.parametrize("case", NO_CLS, ids=lambda c: c["case"])
def test_attention_received(case: dict[str, Any]) -> None:
    """Towers without a CLS token: what a patch gets, summed over the patches of a token, in raster order."""
    name = case["case"]
    q, k, ends = (SALIENCY[f"{name}.{part}"] for part in ("vit_q", "vit_k", "cu_seqlens"))
    units = case["merge"] ** 2
    parts = []
    for a, b in itertools.pairwise(ends.tolist()):
        mine = q[:, :, a:b]
        if b - a >= 6144:
            mine = mine.mean(2, keepdim=True)  # the port asks one query then; the engine never does
            got = (mine @ k[:, :, a:b].transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0, 0]
        else:
            got = _columns(mine, k[:, :, a:b])[0] * (b - a)
        parts.append(got.view(-1, units).sum(1))
    got = torch.cat(parts)
    if case["windows"]:
        got = got[SALIENCY[f"{name}.reverse_indices"]]
    want = torch.cat([SALIENCY[f"{name}.scores{i}"] for i in range(len(case["lengths"]))])
    close(got, want)


def test_towers_without_a_cls_token() -> None:
    features, scores = torch.eye(9)[None], torch.rand(1, 9, generator=torch.Generator().manual_seed(0))
    image = seen(features, None, GivenTower(received={None: scores}, with_cls=False))
    assert vtr.MMR(3).compress(image).tolist() == scores[0].topk(3).indices.sort().values.tolist()


def test_equal_scores_and_equal_tokens() -> None:
    image = looked_at(torch.ones(9, 4), torch.ones(9))
    assert vtr.MMR(4).compress(image).tolist() == [0, 1, 2, 3]
    assert vtr.MMR(4, parallel=3).compress(image).tolist() == [0, 1, 2, 3]
    assert vtr.MMR(0).compress(image).tolist() == [] and len(vtr.MMR(50).compress(image)) == 9


def test_one_budget_and_one_scale_for_a_row() -> None:
    made = torch.Generator().manual_seed(0)
    features, scores = torch.randn(40, 8, generator=made), torch.rand(40, generator=made)
    images = [looked_at(features[:15], scores[:15]), looked_at(features[15:], scores[15:])]
    first, second = vtr.MMR(0.25, pool="row").compress_row(images)
    assert torch.cat([first, second + 15]).tolist() == vtr.MMR(0.25).compress(looked_at(features, scores)).tolist()


@pytest.mark.parametrize("wrong", [{"trade": 1.5}, {"parallel": 0}, {"pool": "batch"}, {"keep": -1}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        vtr.MMR(**wrong)
