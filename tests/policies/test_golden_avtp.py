"""AVTP against the numbers of the official code (zry13/AVTP)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official
from tests.policies.stages import tokens_of
from vtr.policies.decoder.avtp import alike, budgets

META, GIVEN = official.meta("avtp"), official.tensors("avtp", "unit")
cases = pytest.mark.parametrize("case", META["cases"], ids=lambda c: c["case"])


def policy_of(case: dict[str, Any], importance: Any = "marker") -> vtr.AVTP:
    return vtr.AVTP(case["bases"], list(range(1, len(case["bases"]) + 1)), case["alpha"], importance)


def shown(layer: int, states: Tensor, left: Tensor, images: Tensor, memo: dict[str, Any]) -> Any:
    """The tokens ``left`` of a row entering a layer. images: [T], which image each of the T is of, -1 for text."""
    vision = images[left] >= 0
    fields = {
        "place": vision.nonzero()[:, 0], "text_place": (~vision).nonzero()[:, 0], "image": images[left][vision],
        "hidden": states[left][vision], "text": states[left][~vision],
    }  # fmt: skip
    per_image = tuple(int((images == i).sum()) for i in range(int(images.max()) + 1))
    return tokens_of(layer, 8, fields, memo=memo, per_image=per_image)


def images_of(case: dict[str, Any], length: int) -> Tensor:
    """int64 [length]: a block's first token is its marker, which is text."""
    images = torch.full((length,), -1)
    for i, (start, end) in enumerate(zip(case["starts"], case["ends"], strict=True)):
        images[start + 1 : end] = i
    return images


@cases
def test_kept_tokens_and_counts(case: dict[str, Any]) -> None:
    states = GIVEN[f"{case['case']}.states"]
    images, left, memo = images_of(case, states.shape[1]), torch.arange(states.shape[1]), dict[str, Any]()
    policy = policy_of(case)
    assert policy.prune(0, shown(0, states[0], left, images, memo)) is None
    for cut, stage in enumerate(case["stages"]):
        tokens = shown(cut + 1, states[cut + 1], left, images, memo)
        kept = policy.prune(cut + 1, tokens)
        assert kept is not None
        assert tokens.image[kept].bincount().tolist() == stage["k"]
        vision = (images[left] >= 0).nonzero()[:, 0]
        gone = torch.ones(len(left), dtype=torch.bool).index_fill(0, vision, False).index_fill(0, vision[kept], True)
        left = left[gone]
        assert torch.equal(left, GIVEN[f"{case['case']}.stage{cut}.kept"])


@cases
def test_one_image_is_known_from_its_size(case: dict[str, Any]) -> None:
    if len(case["starts"]) == 1:
        counts = policy_of(case).entering(len(case["bases"]) + 1, case["ends"][0] - case["starts"][0] - 1)
        assert counts[1:] == [stage["k"][0] for stage in case["stages"]]


def test_without_a_marker_the_mean_counts() -> None:
    """Two images back to back behind a word: the second has none in front."""
    states, images = (
        torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([-1, *[0] * 4, *[1] * 4]),
    )
    kept = []
    for importance in ("mean", "marker"):
        policy, memo = vtr.AVTP([0.5], [1], 1.0, importance), dict[str, Any]()  # type: ignore[arg-type]
        policy.prune(0, shown(0, states[0], torch.arange(9), images, memo))
        answer = policy.prune(1, shown(1, states[1], torch.arange(9), images, memo))
        assert answer is not None
        kept.append(answer.lt(4).sum().item())
    change = 1 - alike(states[1], states[0])
    means = change[1:].view(2, 4).mean(1)
    for first, got in zip((means[0], change[0]), kept, strict=True):
        want = budgets(torch.stack([first, means[1]]), torch.tensor([4, 4]), 0.5, 1.0)
        assert got == want[0]


def test_of_equal_tokens_the_first_stay() -> None:
    memo, policy = dict[str, Any](), vtr.AVTP([0.5], [1])
    states, images = torch.ones(2, 6, 4), torch.zeros(6).long()
    policy.prune(0, shown(0, states[0], torch.arange(6), images, memo))
    kept = policy.prune(1, shown(1, states[1], torch.arange(6), images, memo))
    assert kept is not None and kept.tolist() == [0, 1, 2]


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_a_mean_budget(share: float) -> None:
    counts = vtr.AVTP(**vtr.AVTP.settings_at(share, 36, 24)).entering(36, 100_000)
    assert sum(counts) / 36 / 100_000 == pytest.approx(share, rel=5e-3)
