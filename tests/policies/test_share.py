"""``share="image"``: one budget divided among the images of a row, so that none of them starves another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtr
from tests import tiny
from tests.loads import forward
from tests.tiny import IMAGE
from vtr.engine import ranking
from vtr.shares import divided

ROWS = [["ab", IMAGE, "c", IMAGE, "d", IMAGE, "what"], ["abcdef"], [IMAGE, "cde"], ["a", IMAGE, "b", IMAGE, "which"]]
SHRINKING = [1.0, 0.8, 0.5, 0.5, 0.2]
POLICIES = [
    vtr.FastV(0.5, share="image"),
    vtr.FastV(7, share="image"),
    vtr.GSearch(SHRINKING, share="image"),
    vtr.Pyramid([0.5, 0.2, 2], [1, 3, 4], share="image"),
    vtr.Random(0.3, layer=1, share="image"),
    vtr.UniformGrid(0.3, share="image"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return vtr.patch(tiny.llava_next())


@given(st.data())
def test_a_count_is_divided_by_size(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    here = [data.draw(st.integers(0, n)) for n in sizes]
    count = data.draw(st.integers(0, sum(here)))
    got = divided(count, sizes, here)
    assert sum(got) == count and all(0 <= mine <= most for mine, most in zip(got, here, strict=True))
    if count >= sum(n > 0 for n in here):
        assert all(mine > 0 for mine, most in zip(got, here, strict=True) if most)


def test_images_have_their_part_of_it() -> None:
    assert divided(10, [10, 10, 20], [10, 10, 20]) == [3, 2, 5]  # of equal rests the earlier image
    assert divided(10, [4, 4, 392], [4, 4, 392]) == [1, 1, 8]  # one each before the rest
    assert divided(2, [4, 9, 9], [4, 9, 9]) == [0, 1, 1]  # fewer than images: the larger ones
    assert divided(12, [8, 8, 8], [1, 8, 8]) == [1, 6, 5]  # one that has no more


@given(st.data())
def test_groups_are_ranked_as_rows_of_their_own(data: st.DataObject) -> None:
    score = st.sampled_from([0.0, 1.0, -1.0, 2.5, float("inf"), float("-inf")])
    kept: list[ranking.Kept] = []
    counts, want, start = [], [], 0
    for _ in range(data.draw(st.integers(1, 4))):
        groups = [
            (n, data.draw(st.integers(0, n))) for n in data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
        ]
        n = sum(size for size, _ in groups)
        scores = torch.tensor(data.draw(st.lists(score, min_size=n, max_size=n)))
        parted = data.draw(st.booleans())
        best = vtr.Best(scores, sum(stay for _, stay in groups), groups if parted else None)
        kept.append((scores, best.count, best.groups))
        want.append(best.indices() + start)
        counts.append(n)
        start += n
    got, left = ranking.keep(kept, counts, torch.device("cpu"))
    assert got.tolist() == torch.cat(want).tolist() and left == [len(mine) for mine in want]


def per_image(model: Any, inputs: Any, b: int, layer: int) -> list[int]:
    """How many of row b's tokens of each image entered a layer, by the report's slots."""
    ids, kept = inputs["input_ids"][b], set(vtr.report(model).rows[b].kept(layer))
    spans: list[int] = []
    for slot in range(len(ids)):
        if ids[slot] == tiny.IMAGE_ID:
            if slot == 0 or ids[slot - 1] != tiny.IMAGE_ID:
                spans.append(0)
            spans[-1] += slot in kept
    return spans


@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: one.spec)
def test_counts_per_image_are_those_divided(model: Any, policy: vtr.Policy) -> None:
    inputs = tiny.batch(model, ROWS)
    forward(model, inputs, policy=None)
    layers = len(vtr.report(model).rows[0].vision_tokens)
    whole = [per_image(model, inputs, b, 0) for b in range(len(ROWS))]
    row = vtr.policy(policy.spec.replace(',share="image"', ""))
    forward(model, inputs, policy=row)
    totals = [one.vision_tokens for one in vtr.report(model).rows]
    forward(model, inputs, policy=policy)
    assert [one.vision_tokens for one in vtr.report(model).rows] == totals
    for b in (0, 3):
        before = whole[b]
        for layer in range(layers):
            if totals[b][layer] < sum(before):
                before = divided(totals[b][layer], whole[b], before)
            assert per_image(model, inputs, b, layer) == before


@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: one.spec)
def test_a_row_of_one_image_is_as_before_and_rows_are_as_alone(model: Any, policy: vtr.Policy) -> None:
    inputs = tiny.batch(model, ROWS)
    given_ = [policy, None, policy, policy]
    got = forward(model, inputs, policy=given_).logits
    for b, one in enumerate(given_):
        alone = tiny.single(inputs, b, model)
        mine = forward(model, alone, policy=one).logits[0]
        torch.testing.assert_close(got[b, tiny.real(inputs, b)], mine, atol=1e-5, rtol=0)
        if b == 2:
            row = vtr.policy(policy.spec.replace(',share="image"', ""))
            assert torch.equal(forward(model, alone, policy=row).logits[0], mine)


def test_it_is_said_in_words_what_cannot_be() -> None:
    for made in (vtr.FastV, vtr.Pyramid):
        with pytest.raises(ValueError, match="share='images': choose 'row' or 'image'"):
            made(share="images")  # type: ignore[arg-type,call-arg]
    with pytest.raises(ValueError, match="leave out share"):
        vtr.Random(0.5, before_decoder=True, share="image")


def test_groups_must_add_up(model: Any) -> None:
    class Wrong(vtr.Policy):
        def prune(self, layer: int, tokens: vtr.Tokens) -> vtr.Best:
            return vtr.Best(tokens.hidden.norm(dim=-1), 4, [(len(tokens), 3)])

    with pytest.raises(ValueError, match=r"the groups of vtr\.Best"):
        forward(model, tiny.single(tiny.batch(model, ROWS), 0, model), policy=Wrong())
