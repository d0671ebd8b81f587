"""A policy per image of a row: as data, and as each image's own policy alone would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from tests import tiny
from tests.loads import forward
from tests.tiny import IMAGE
from vtr.parts import members

ROWS = [["ab", IMAGE, "c", IMAGE, "d", IMAGE, "what"], ["abcdef"], [IMAGE, "cde"], ["a", IMAGE, "b", IMAGE, "which"]]
FEW = 'by_image:default="m3:tokens=9",last="none"'


@pytest.fixture(scope="module")
def model() -> Any:
    return vtr.patch(tiny.llava_next())


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


SPECS = [
    (FEW, vtr.ByImage("m3:9", last="none")),
    ("by_image:m3:9,last=none", vtr.ByImage("m3:9", last="none")),
    ('by_image:default=["m3:9","none","pool:4"]', vtr.ByImage(["m3:9", None, vtr.Pool(4)])),
    ('by_image:last="m3:1",at={"-2":"pool:2","0":"none"}', vtr.ByImage(last="m3:1", at={-2: "pool:2", 0: "none"})),
    (
        r'by_image:default="globalcom2:retention=0.5,placement=\"official\",budget=\"exact\"",first="none"',
        vtr.ByImage(vtr.GlobalCom2(0.5, placement="official", budget="exact"), first="none"),
    ),
    (
        FEW + '+fastv:keep=0.5,share="image"',
        vtr.ByImage("m3:9", last="none") + vtr.FastV(0.5, share="image"),
    ),
]


@pytest.mark.parametrize(("spec", "made"), SPECS)
def test_it_is_data(spec: str, made: vtr.Policy, tmp_path: Path) -> None:
    assert vtr.policy(spec) == made == vtr.policy(made.spec)
    made.save_pretrained(tmp_path)
    assert vtr.Policy.from_pretrained(tmp_path) == made
    assert json.loads(json.dumps(made.config())) == made.config()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"default": "fastv"}, r'join it behind, by_image:default="m3:9",last="none"\+fastv:… \(share="image"'),
        ({"default": "m3:9+fastv:0.5"}, "acts in the decoder"),
        ({"default": "uniform:0.5"}, "say before_decoder=true"),
        ({"default": "autoscale"}, "tries answers with all images"),
        ({"default": FEW}, "another inside"),
        ({"default": "none"}, "names no policy"),
        ({"default": []}, "it is empty"),
        ({"default": ["m3:9"], "last": "none"}, "leave out first, last and at"),
        ({"default": "m3:9", "at": {"x": "none"}}, "'x' is no image's index"),
        ({"default": "m3:9", "at": {"0": "nothing"}}, "unknown policy 'nothing'"),
    ],
)
def test_what_cannot_be_per_image_says_what_can(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        vtr.ByImage(**settings)


def test_a_policy_file_may_not_name_another(tmp_path: Path) -> None:
    file = tmp_path / "vtr_policy.json"
    file.write_text(json.dumps({"policy": "by_image", "settings": {"at": {"0": "cdpruner:weights=elsewhere"}}}))
    with pytest.raises(ValueError, match="name another file"):
        vtr.Policy.from_pretrained(tmp_path)


def test_who_acts_on_which_image() -> None:
    made = vtr.ByImage("m3:9", first="m3:36", last="none", at={1: "m3:1", -2: "pool:2"})
    specs = [one and one.spec for one in (made.of_image(i, 5) for i in range(5))]
    assert specs == ["m3:tokens=36", "m3:tokens=1", "m3:tokens=9", "pool:grid=2", None]
    assert made.of_image(0, 1) is None and made.wants == ("tiles",) and not made.question_guided
    assert vtr.ByImage("m3:9", last="cdpruner:8").question_guided
    assert [one.name for one in members(made + vtr.FastV())] == ["m3", "m3", "m3", "pool", "fastv"]


def test_each_image_has_what_its_policy_alone_makes_of_it(model: Any) -> None:
    """Coarse, and a whole last one: as M3 with a list of scales; a row alone as in the batch."""
    inputs = tiny.batch(model, ROWS)
    few = vtr.ByImage("m3:9", last="none")
    got = forward(model, inputs, policy=few).logits
    report = vtr.report(model)
    lists = [vtr.Matryoshka([9, 9, 36]), None, None, vtr.Matryoshka([9, 36])]
    close(got, forward(model, inputs, policy=lists).logits)
    want = vtr.report(model)
    assert [row.vision_tokens for row in report.rows] == [row.vision_tokens for row in want.rows]
    assert report.flops == want.flops and report.kv_bytes == want.kv_bytes
    for b in range(len(ROWS)):
        alone = tiny.single(inputs, b, model)
        close(got[b, tiny.real(inputs, b)], forward(model, alone, policy=few).logits[0])


def test_a_budget_for_several_images_is_divided_among_those_that_are_its_own(model: Any) -> None:
    inputs = tiny.single(tiny.batch(model, ROWS), 0, model)
    pooled = vtr.DivPrune(24, pool="row")
    forward(model, inputs, policy=None)
    total = vtr.report(model).rows[0].total
    forward(model, inputs, policy=vtr.ByImage(pooled, last="none"))
    mixed = vtr.report(model).rows[0].vision_tokens[0]
    forward(model, inputs, policy=vtr.ByImage(["none", "none", vtr.ClsTop(4)]))
    assert mixed < total and vtr.report(model).rows[0].vision_tokens[0] < total
    first = tiny.single(tiny.batch(model, [[*ROWS[0][:4], "what"]]), 0, model)
    forward(model, first, policy=pooled)
    two = vtr.report(model).rows[0]
    assert mixed == two.vision_tokens[0] + (total - two.total)


def test_scores_of_the_tower_are_made_for_those_images_alone_that_want_them(model: Any) -> None:
    inputs = tiny.single(tiny.batch(model, ROWS), 0, model)
    forward(model, inputs, policy=vtr.ClsTop(4))
    every = vtr.report(model).selector_flops
    forward(model, inputs, policy=vtr.ByImage("m3:9", last=vtr.ClsTop(4)))
    one = vtr.report(model).selector_flops
    assert 0 < one < every


def test_it_acts_together_with_a_pruner(model: Any) -> None:
    inputs = tiny.batch(model, ROWS)
    both = [vtr.policy(FEW + '+fastv:keep=0.5,layer=2,share="image"'), None, vtr.policy(FEW), vtr.FastV(0.5)]
    got = forward(model, inputs, policy=both).logits
    counts = vtr.report(model).rows[0].vision_tokens
    assert counts[2] == counts[0] // 2
    for b, one in enumerate(both):
        alone = forward(model, tiny.single(inputs, b, model), policy=one).logits
        close(got[b, tiny.real(inputs, b)], alone[0])


def test_a_list_must_be_as_long_as_the_row(model: Any) -> None:
    inputs = tiny.single(tiny.batch(model, ROWS), 0, model)
    with pytest.raises(ValueError, match="names 2 policies, but the row has 3 images"):
        forward(model, inputs, policy=vtr.ByImage(["m3:9", "none"]))
    assert len(forward(model, inputs, policy="m3:9").logits) == 1


def test_how_many_stay_is_known_from_sizes(model: Any) -> None:
    from vtr.engine.adapters import find_adapter
    from vtr.engine.prompt import read_prompt

    inputs = tiny.single(tiny.batch(model, ROWS), 0, model)
    layouts = read_prompt(find_adapter(model), model, inputs["input_ids"], None, inputs).layouts[0]
    made = vtr.ByImage("m3:9", last="pool:2")
    want = [made.of_image(i, 3).kept_of(layout) for i, layout in enumerate(layouts)]  # type: ignore[union-attr]
    forward(model, inputs, policy=made)
    assert vtr.report(model).rows[0].vision_tokens[0] == sum(want)
    assert made.kept_of(layouts[0]) == vtr.Pool(2).kept_of(layouts[0])
    assert vtr.ByImage("m3:9", last="none").kept_of(layouts[0]) == len(layouts[0])
