"""Policies before the decoder: how many tokens they leave is known from sizes alone, and what they leave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import vtr
from tests import tiny
from tests.conftest import Pair
from tests.tiny import IMAGE
from vtr.engine.adapters import find_adapter

POLICIES: list[vtr.Policy] = [
    vtr.Matryoshka(9), vtr.Matryoshka(36), vtr.Pool(2), vtr.ClsTop(0.3), vtr.ClsTop(5), vtr.ClsTop(0), vtr.ClsTop(1.0),
    vtr.GlobalCom2(0.3, budget="exact"), vtr.UniformGrid(0.3, before_decoder=True), vtr.Random(7, before_decoder=True),
]  # fmt: skip


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    stock = getattr(tiny, request.param)()
    return Pair(stock, vtr.patch(copy.deepcopy(stock)))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.spec)
def test_counts_are_known_beforehand(pair: Pair, policy: vtr.Policy) -> None:
    model = pair.patched
    grid = find_adapter(model).layouts(model, {**tiny.batch(model, [["ab", IMAGE, "what"]])})[tiny.IMAGE_ID][0].grid
    if isinstance(policy, vtr.Matryoshka):
        policy = vtr.Matryoshka({36: grid[0] * grid[1], 9: 1}[policy.tokens])  # type: ignore[index]
    inputs = tiny.batch(model, [["ab", IMAGE, "what"], [IMAGE, "cde", IMAGE, "f"]])
    layouts = find_adapter(model).layouts(model, inputs)[tiny.IMAGE_ID]
    with torch.no_grad():
        model(**inputs, policy=policy)
    entered = [row.vision_tokens[0] for row in vtr.report(model).rows]
    counts = [policy.kept_of(layout) for layout in layouts]
    assert entered == [counts[0], counts[1] + counts[2]]


def test_a_policy_in_the_decoder_has_no_such_count() -> None:
    layout = find_adapter(tiny.llava()).layouts(tiny.llava(), {"pixel_values": torch.zeros(1, 3, 24, 24)})[5][0]
    with pytest.raises(ValueError, match="leaves images as they are"):
        vtr.UniformGrid(0.3).kept_of(layout)
    with pytest.raises(ValueError, match="budget='exact'"):
        vtr.GlobalCom2(0.3).kept_of(vtr.base.Layout(**{**vars(layout), "crops": (1, 1)}))
    with pytest.raises(ValueError, match="of_image"):
        vtr.Matryoshka([9, 1]).kept_of(layout)


@pytest.mark.parametrize(
    ("policy", "entering"),
    [
        (vtr.FastV(0.25, 2), [100, 100, 25, 25, 25]),
        (vtr.GSearch([1.0, 0.5, 0.5, 20, 1]), [100, 50, 50, 20, 1]),
        (vtr.Pyramid([0.5, 0.1], [1, 3]), [100, 50, 50, 10, 10]),
        (vtr.UniformGrid(0.2), [20] * 5),
        (vtr.Random(30, 1), [100, 30, 30, 30, 30]),
        (vtr.DynamicLLaVA(0.2, 2), [100, 100, 20, 20, 20]),
        (vtr.PMoD(ratios=[None, 0.5, None, 0.25, 0.1]), [100, 50, 100, 25, 10]),
        (vtr.Matryoshka(9), [100] * 5),
    ],
    ids=lambda p: p.spec if isinstance(p, vtr.Policy) else "",
)
def test_entering_is_what_a_policy_says_of_itself(policy: vtr.Policy, entering: list[int]) -> None:
    assert policy.entering(5, 100) == entering


@pytest.mark.parametrize("kind", [vtr.UniformGrid, vtr.Random])
def test_before_the_decoder_the_same_tokens_stay_of_one_image(pair: Pair, kind: Any) -> None:
    inputs = tiny.batch(pair.patched, [["ab", IMAGE, "what"]])
    kept = []
    for before in (False, True):
        with torch.no_grad():
            pair.patched(**inputs, policy=kind(0.3, before_decoder=before))
        kept.append(vtr.report(pair.patched).rows[0].sources(0))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("kind", [vtr.UniformGrid, vtr.Random])
def test_before_decoder_settings(kind: Any) -> None:
    made = kind(0.3, before_decoder=True)
    assert vtr.policy(made.spec) == made and made.asks("compress") and not made.asks("prune")
    assert not kind(0.3).asks("compress") and kind(0.3).asks("prune")
    with pytest.raises(ValueError, match="cannot act at layer=2"):
        kind(0.3, layer=2, before_decoder=True)
    with pytest.raises(TypeError, match="true or false"):
        kind(0.3, before_decoder=1)
    joined = made + vtr.FastV(0.5, 1)
    assert joined.asks("compress") and joined.asks("prune")


def test_cls_keeps_what_the_cls_token_looks_at(pair: Pair) -> None:
    """By hand: of each tile the largest scores, and every newline token."""
    model, seen = pair.patched, []

    class Spy(vtr.ClsTop):
        def compress(self, image: vtr.Image) -> torch.Tensor:
            answer = super().compress(image)
            seen.append((image.layout, image.cls_attention(), answer))
            return answer

    with torch.no_grad():
        model(**tiny.batch(model, [["ab", IMAGE, "what"]]), policy=Spy(0.4))
    ((layout, scores, answer),) = seen
    kept = set(answer.tolist())
    assert set(layout.newline.nonzero().squeeze(1).tolist()) <= kept
    for tile in range(layout.tiles):
        mine = [i for i in range(len(layout)) if layout.tile[i] == tile and not layout.newline[i]]
        score = {i: float(scores[tile, layout.y[i] * layout.grid[1] + layout.x[i]]) for i in mine}
        best = sorted(mine, key=lambda i: (-score[i], i))[: int(len(mine) * 0.4 + 1e-9)]
        assert {i for i in kept if i in score} == set(best)
