"""HoloV against the numbers of the official code (obananas/HoloV)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official
from tests.policies.encoder import layout_of
from tests.seen import GivenTower, seen
from vtr.image import Image
from vtr.policies.picture.holov import SCALE, holistic, quotas_of, run_sizes, run_weights, within

META = official.meta("holov")


def cases(*files: str) -> Any:
    return pytest.mark.parametrize("case", [c for c in META["cases"] if c["file"] in files], ids=lambda c: c["case"])


def given(case: dict[str, Any]) -> dict[str, Tensor]:
    """Its tensors, all with a batch dimension."""
    prefix, found = case["case"] + ".", official.tensors("holov", case["file"])
    numbers = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    return numbers if case["file"] != "qwen" else {k: v if v.dim() == 3 else v[None] for k, v in numbers.items()}


def image_of(features: Tensor, attention: Tensor) -> Image:
    """A tile of features [n, D] and attention [n]."""
    return seen(features[None], tower=GivenTower(from_cls={None: attention[None, None]}))


@cases("unit", "qwen")
def test_kept_tokens(case: dict[str, Any]) -> None:
    """Which, in which order, and the tokens of zeros."""
    numbers = given(case)
    keep = case["prune_rate"] if case["file"] == "qwen" else case["T"]
    for features, attention, kept, output in zip(
        numbers["features"], numbers["attention"], numbers["kept"], numbers["output"], strict=True
    ):
        policy = vtr.HoloV(keep, case["num_patches"], placement="official")
        made = policy.compress(image_of(features, attention))
        assert isinstance(made, vtr.Pooled)
        assert [some[0] if some else -1 for some in made.sources] == kept.tolist()
        assert torch.equal(made.features, output)
        assert case["T"] == len(output)


@cases("unit", "qwen")
def test_scores_and_quotas(case: dict[str, Any]) -> None:
    numbers = given(case)
    for row, attention in enumerate(numbers["attention"]):
        sizes = run_sizes(len(attention), case["num_patches"])
        weights = run_weights(attention, sizes, 0.09, official=True)
        official.close(weights, numbers["crop_weights"][row][: len(sizes)], 1e-5)
        assert quotas_of(weights, case["T"]).tolist() == numbers["crop_counts"][row].tolist()
        scores = holistic(numbers["features"][row], attention, sizes, 0.09)
        for i, (part, size) in enumerate(zip(scores.split(sizes), sizes, strict=True)):
            want = float(numbers["crop_scores"][row][i]) * (SCALE if size == 1 else 1.0)
            assert float(part.mean()) == pytest.approx(want, rel=1e-4)


@cases("embeds")
def test_prompts(case: dict[str, Any]) -> None:
    numbers, policy = given(case), vtr.HoloV(case["T"], case["num_patches"], placement="official")
    layout, ids = layout_of(case), numbers["input_ids"]
    for row, want in enumerate(numbers["inputs_embeds"]):
        part = slice(row * layout.tiles, (row + 1) * layout.tiles)
        tower = GivenTower(from_cls={None: numbers["attention_heads"][part]})
        image = seen(numbers["features"][part], layout, tower, numbers["image_newline"])
        official.close(image.features[layout.newline == 0], numbers["candidates"][row], 1e-6)
        made = policy.compress(image)
        assert isinstance(made, vtr.Pooled)
        ordinal = (layout.newline == 0).cumsum(0) - 1
        assert [int(ordinal[some[0]]) if some else -1 for some in made.sources] == numbers["kept"][row].tolist()
        at = ids[row].tolist().index(official.IMG)
        text = numbers["embed_tokens"][ids[row].clamp(min=0)]
        official.close(torch.cat([text[:at], made.features, text[at + 1 :]]), want)
        assert len(made.features) == policy.kept_of(layout)


@cases("unit")
def test_true_placement_keeps_the_same_tokens_and_no_zeros(case: dict[str, Any]) -> None:
    """What a full run cannot take, the others do."""
    numbers = given(case)
    for features, attention, kept in zip(numbers["features"], numbers["attention"], numbers["kept"], strict=True):
        made = vtr.HoloV(case["T"], case["num_patches"]).compress(image_of(features, attention))
        assert isinstance(made, Tensor) and len(made.unique()) == len(made) == case["T"]
        theirs = {i for i in kept.tolist() if i >= 0}
        lone = 1 in run_sizes(len(attention), case["num_patches"])  # which the official code weighs otherwise
        assert lone or theirs <= set(made.tolist())


def test_newlines_stay_and_zeros_do_not_come() -> None:
    layout = layout_of({"side": 6, "image_size_wh": [100, 60], "grid_wh": [2, 2]})
    heads = torch.rand(5, 3, 36, generator=torch.Generator().manual_seed(0))
    image = seen(torch.randn(5, 36, 8), layout, GivenTower(from_cls={None: heads}))
    for select in ("attention", "holistic"):
        kept = vtr.HoloV(40, select=select).compress(image)
        assert isinstance(kept, Tensor) and len(kept.unique()) == len(kept) == vtr.HoloV(40).kept_of(layout)
        assert layout.newline[kept].sum() == layout.newline.sum()


@pytest.mark.parametrize("n", [1, 3, 16, 17, 40])
def test_any_number_of_any_number(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    for sharp in (0.0, 1.0, 30.0):
        attention = (torch.randn(n, generator=generator) * sharp).softmax(0)
        sizes = run_sizes(n, 16)
        assert sum(sizes) == n and min(sizes) > 0 and max(sizes) - min(sizes) <= 1
        for total in range(n + 1):
            quotas = within(run_weights(attention, sizes, 1.0), sizes, total)
            assert int(quotas.sum()) == total and bool((quotas <= torch.tensor(sizes)).all())
        for keep in (0, 1, n // 2, n, n + 5):
            for select in ("attention", "holistic"):
                policy = vtr.HoloV(keep, select=select, alpha=1.0)
                kept = policy.compress(image_of(torch.randn(n, 4, generator=generator), attention))
                assert isinstance(kept, Tensor) and len(kept.unique()) == len(kept) == min(keep, n)
    attention = torch.zeros(n)
    assert int(within(run_weights(attention, run_sizes(n, 16), 1.0), run_sizes(n, 16), n).sum()) == n
