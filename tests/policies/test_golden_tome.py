"""ToMe's matching and merging against the numbers of the official code (facebookresearch/ToMe), which only was run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official
from tests.official import close
from tests.seen import seen
from vtr.policies.picture.tome import ToMe, match, merge, most, reduced

META = official.meta("tome")


def cases(file: str) -> Any:
    some = [case for case in META["cases"] if case["file"] == file]
    return pytest.mark.parametrize("case", some, ids=lambda c: c["case"])


@cases("unit")
def test_rounds(case: dict[str, Any]) -> None:
    data = {k.removeprefix(case["case"] + "."): t for k, t in UNIT.items() if k.startswith(case["case"] + ".")}
    x, metric, tokens = data["x"], data.get("metric", data["x"]), (case["class_token"], case["distill_token"])
    sizes, source = torch.ones(*x.shape[:2], 1), torch.arange(x.shape[1]).expand(x.shape[:2])
    for i, (r, count) in enumerate(zip(case["r"], case["counts"], strict=True)):
        gone, want = most(x.shape[1], r, sum(tokens)), f"round{i}."
        assert x.shape[1] - gone == count
        if not gone:
            assert all(f"{want}{name}" not in data for name in ("merged", "into"))
            continue
        found = match(x if case["metric_is_x"] else metric, gone, *tokens)
        for name in ("merged", "into", "unmerged"):
            assert torch.equal(getattr(found, name), data[want + name]), name
        close(found.best, data[want + "best"])
        metric, _ = merge(metric, sizes, found.rows, found.left)
        x, sizes = merge(x, sizes, found.rows, found.left)
        source = found.rows.gather(1, source)
        close(x, data[want + "x"])
        assert torch.equal(sizes[..., 0], data[want + "size"]) and torch.equal(source, data[want + "source"].long())


@cases("unit")
def test_what_the_policy_makes_of_it(case: dict[str, Any]) -> None:
    """Where tokens are their own metric and rounds as large as the budget asks for: the same, in raster order."""
    data = {k.removeprefix(case["case"] + "."): t for k, t in UNIT.items() if k.startswith(case["case"] + ".")}
    if not case["metric_is_x"] or case["class_token"]:
        return
    x, target, last = data["x"], case["counts"][-1], f"round{len(case['r']) - 1}."
    got, source, _ = reduced(x, target)
    full = [most(t, t - target) for t in [x.shape[1], *case["counts"][:-1]]]
    if full != case["r"]:
        assert got.shape[1] == target
        return
    close(got, data[last + "x"])
    assert torch.equal(source, data[last + "source"].long())
    for b, one in enumerate(x):
        made = ToMe(target).compress(seen(one[None], tile_layout(1, len(one))))
        rows = data[last + "source"][b]
        firsts = [int((rows == row).nonzero()[0]) for row in range(target)]
        order = sorted(range(target), key=lambda row: firsts[row])
        close(made.features, data[last + "x"][b][torch.tensor(order)])
        assert made.sources == [(rows == row).nonzero()[:, 0].tolist() for row in order]


UNIT, VIT, CLIP = (official.tensors("tome", name) for name in ("unit", "vit", "clip_llmc"))


@cases("vit")
def test_in_the_blocks_of_a_vision_transformer(case: dict[str, Any]) -> None:
    """The paper's own place for it: behind attention, by the mean keys, with or without proportional attention."""
    data = {k.removeprefix(case["case"] + "."): t for k, t in VIT.items() if k.startswith(case["case"] + ".")}
    w = {k.removeprefix("weights."): t for k, t in data.items() if k.startswith("weights.")}
    x, eps, heads = data["block0_input"], case["layer_norm_eps"], case["heads"]
    sizes, source = torch.ones(*x.shape[:2], 1), torch.arange(x.shape[1]).expand(x.shape[:2])

    def norm(y: Tensor, name: str) -> Tensor:
        return layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def dense(y: Tensor, name: str) -> Tensor:
        return linear(y, w[f"{name}.weight"], w[f"{name}.bias"])

    for i, r in enumerate(case["r"]):
        block = f"blocks.{i}"
        qkv = dense(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        bias = sizes.log()[:, None, None, :, 0] if case["prop_attn"] else None
        mixed = scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        x = x + dense(mixed, f"{block}.attn.proj")
        if gone := most(x.shape[1], r, 1):
            found = match(k.mean(1), gone, class_token=True)
            x, sizes = merge(x, sizes, found.rows, found.left)
            source = found.rows.gather(1, source)
        x = x + dense(gelu(dense(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        assert x.shape[1] == case["counts"][i]
        close(x, data[f"block{i}_output"])
    assert torch.equal(sizes[..., 0], data["size"]) and torch.equal(source, data["source"].long())


@cases("clip_llmc")
def test_in_a_clip_tower_whose_sizes_are_forgotten(case: dict[str, Any]) -> None:
    """As a port has it: no proportional attention, and a merged token counts as one in the next layer."""
    data = {k.removeprefix(case["case"] + "."): t for k, t in CLIP.items() if k.startswith(case["case"] + ".")}
    w = {k.split("layers.")[1]: t for k, t in data.items() if "layers." in k}
    x, config = data["hidden0"], case["vision_config"]
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def dense(y: Tensor, name: str) -> Tensor:
        return linear(y, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(y: Tensor, name: str) -> Tensor:
        return layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    for i, r in enumerate(case["r"]):
        y = norm(x, f"{i}.layer_norm1")
        q, k, v = (dense(y, f"{i}.self_attn.{p}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for p in "qkv")
        x = x + dense(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{i}.self_attn.out_proj")
        if gone := most(x.shape[1], r, 1):
            found = match(k.mean(1), gone, class_token=True)
            x, _ = merge(x, torch.ones(*x.shape[:2], 1), found.rows, found.left)
        up = dense(norm(x, f"{i}.layer_norm2"), f"{i}.mlp.fc1")
        x = x + dense(up * (1.702 * up).sigmoid(), f"{i}.mlp.fc2")
        close(x, data[f"hidden{i + 1}"])


# ------------------------------------------------------------------------------------------------------- what is right
@pytest.mark.parametrize("keep", [0, 1, 2, 5, 9, 500, 0.0, 0.01, 0.5, 1.0])
def test_budgets(keep: float) -> None:
    for layout in (tile_layout(1, 1), tile_layout(3, 3), anyres_layout((60, 100), ((96, 96),), 48, 3)):
        tiles = torch.randn(layout.tiles, layout.grid[0] * layout.grid[1], 8)
        image, policy = seen(tiles, layout), ToMe(keep)
        made = policy.compress(image)
        assert len(made.features) == len(made.sources) == policy.kept_of(layout)
        firsts = [s[0] for s in made.sources]
        assert firsts == sorted(set(firsts))
        for feature, some in zip(made.features, made.sources, strict=True):
            close(feature, image.features[torch.tensor(some)].mean(0))
            assert len(set(layout.tile[torch.tensor(some)].tolist())) == 1
        if keep == 500:
            assert torch.equal(made.features, image.features)


def test_tokens_that_are_all_zero() -> None:
    made = vtr.policy("tome:2").compress(seen(torch.zeros(1, 16, 4)))
    assert isinstance(made, vtr.Pooled) and len(made.sources) == 2 and not made.features.any()
