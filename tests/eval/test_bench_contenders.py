"""Who is measured and on what: policies set to mean budgets, and random models of published shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForImageTextToText
from vtr.eval.cost import midsize, shapes
from vtr.eval.cost import policies as bench_policies
from vtr.eval.cost.contenders import contenders, shipped

import vtr
from tests.eval.test_bench_policies import TINY
from vtr.budget import at_share
from vtr.shares import nearest_side


# -------------------------------------------------------------------------------------------------- policies at budgets
@pytest.mark.parametrize("depth", [8, 16, 32])
@pytest.mark.parametrize("budget", [0.5, 0.25])
@pytest.mark.parametrize("name", ["random", "uniform", "pool", "fastv", "gsearch", "pyramid"])
def test_a_policy_at_a_budget_has_that_mean(name: str, budget: float, depth: int) -> None:
    policy, side = at_share(name, budget, depth, 24), 24
    policy.check(depth)
    if isinstance(policy, vtr.Pool):
        means = [policy.grid**2 / side**2]  # type: ignore[operator]
    elif isinstance(policy, vtr.GSearch):
        means = [*policy.schedule]  # type: ignore[list-item]
    elif isinstance(policy, vtr.Pyramid):
        stages, here = policy.stages(depth), 1.0
        means = [here := float(stages.get(layer, here)) for layer in range(depth)]
    else:
        means = [1.0 if layer < policy.layer else policy.keep for layer in range(depth)]  # type: ignore[attr-defined]
    assert sum(means) / len(means) == pytest.approx(budget, abs=0.01)


def test_budgets_that_cannot_be_met() -> None:
    for name in ("fastv", "gsearch", "pyramid"):
        with pytest.raises(ValueError, match="mean"):
            at_share(name, 0.1, 8, 24)
    with pytest.raises(ValueError, match="between 0 and 1"):
        at_share("fastv", 1.0, 8, 24)
    with pytest.raises(ValueError, match="a chain without policies"):
        at_share("chain", 0.5, 8, 24)


def test_what_cannot_be_set_is_named() -> None:
    stock = midsize.build(TINY, "cpu", torch.float32)
    field, left_out = contenders(stock, shapes.of_size(TINY), [0.1])
    # a tenth is too little for some cuts of so few layers; and some have no weights for a random model
    without = {left["name"] for left in left_out}
    assert {"fastv", "gsearch", "m3", "pyramid", "autoscale", "dynamic-llava", "pmod"} <= without
    assert all(left["why"] and left["budget"] == 0.1 for left in left_out)
    assert {"ee-mllm", "mustdrop", "occamtoken", "zipvl"} <= without  # picture and question give their budget
    assert [c.name for c in field] == ["none", *[name for name in shipped() if name not in without], "downsample"]
    assert not stock.get_decoder()._forward_pre_hooks  # the stock model stays unpatched


def test_policies_of_others_are_not_shipped_ones() -> None:
    @vtr.register_policy("somebody-elses-for-test")
    @dataclasses.dataclass
    class Theirs(vtr.Policy):
        keep: float = 0.5

    assert "somebody-elses-for-test" not in shipped()
    assert at_share("somebody-elses-for-test", 0.3, 8, 24) == Theirs(0.3)


def test_nearest_side() -> None:
    assert [nearest_side(b, 24) for b in (0.25, 0.5, 1e-9, 0.9999)] == [12, 17, 1, 24]


# ------------------------------------------------------------------------------------------------------------- shapes
@pytest.mark.parametrize(
    ("name", "tokens", "billions"),
    [("llava-1.5-7b", 576, 7.063427), ("llava-next-7b", 2928, 7.063431), ("internvl2-8b", 1792, 8.075)],
)
def test_published_shapes(name: str, tokens: int, billions: float) -> None:
    shape = shapes.SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.config_of(shape))
    assert shape.vision_tokens == tokens
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.0005)


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_a_model_built_on_meta_is_what_transformers_builds(name: str) -> None:
    """Buffers (rope, position ids) are those of a model built directly; parameters are drawn the same way."""
    shape = shapes.scaled_down(shapes.SHAPES[name])
    made = shapes.build(shape, "cpu", torch.float32)
    direct = AutoModelForImageTextToText.from_config(shapes.config_of(shape), dtype=torch.float32)
    buffers = dict(direct.named_buffers())
    assert buffers.keys() == dict(made.named_buffers()).keys()
    for key, buffer in made.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
    for (key, a), (_, b) in zip(made.named_parameters(), direct.named_parameters(), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device.type == "cpu"
        spreads = [float(p.detach().std(correction=0)) for p in (a, b)]
        assert bool(a.isfinite().all()) and spreads[0] == pytest.approx(spreads[1], abs=0.06), key


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", list(shapes.SHAPES))
@torch.no_grad()
def test_shapes_run_whole_and_downsampled(name: str) -> None:
    """Every contender runs on a family's small model, and its counts are exact there too."""
    shape = shapes.scaled_down(shapes.SHAPES[name])
    stock = shapes.build(shape, "cpu", torch.float32)
    field, _ = contenders(stock, shape, [0.3])
    for contender in field:
        inputs = contender.prompts([(1, shape.text_tokens)])
        assert int((inputs["input_ids"] == midsize.IMAGE_ID).sum()) == contender.shape.vision_tokens
        counted, closed = bench_policies.count_flops(contender, inputs)
        reported, tensors = bench_policies.count_bytes(contender, inputs)
        assert counted == closed and reported == tensors
    narrow = field[-1]
    assert narrow.name == "downsample" and narrow.shape.vision_tokens < shape.vision_tokens
    assert narrow.model.lm_head.weight is stock.lm_head.weight


def test_a_row_of_several_internvl_images_is_refused() -> None:
    shape = shapes.scaled_down(shapes.SHAPES["internvl2-8b"])
    with pytest.raises(ValueError, match="one image at most"):
        shapes.prompts(shapes.build(shape, "cpu", torch.float32), shape, [(2, 4)])
