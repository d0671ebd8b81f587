"""MMTok against the numbers of the official code (Ironieser/MMTok)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official
from tests.seen import GivenTower, seen
from vtr.image import Image, Layout
from vtr.policies.picture._greedy import covering
from vtr.policies.question.mmtok import MMTok, coverage

META = official.meta("mmtok")
UNIT = official.tensors("mmtok", "unit")
CASES = pytest.mark.parametrize("case", META["cases"], ids=lambda c: c["case"])


def about(projected: Tensor, states: Tensor, words: Tensor, layout: Layout | None = None) -> Image:
    return seen(projected, layout, GivenTower({None: states}), question=words)


@CASES
def test_picks(case: dict[str, Any]) -> None:
    """In order, and what stays of each tile; patches in the padding of a square are given as excluded."""
    name, settings = case["case"], (case["alpha"], case["tv"], case["vv"])
    projected, states, words = (UNIT[f"{name}.{part}"] for part in ("projected", "tower", "text"))
    table, _ = coverage(projected, states, words, *settings)
    there = torch.ones(projected.shape[:2], dtype=torch.bool)
    for tile, out in enumerate(case["padding"] or []):
        there[tile, out] = False
    picks, _ = covering(table, case["k"], there)
    assert picks.sort(1).values.tolist() == UNIT[f"{name}.picks_sorted"].tolist()
    if case["path"] != "pass" and case["float64_same"]:
        assert picks.tolist() == UNIT[f"{name}.picks_in_order_float64"].tolist()
    if case["padding"]:
        return
    policy = MMTok(case["k"], alpha=settings[0], text_temperature=settings[1], vision_temperature=settings[2])
    for tile in range(case["B"]):
        image = about(projected[tile, None], states[tile, None], words, tile_layout(1, case["N"]))
        kept = policy.compress(image)
        assert isinstance(kept, Tensor) and kept.tolist() == UNIT[f"{name}.picks_sorted"][tile].tolist()
        assert torch.equal(image.features[kept], UNIT[f"{name}.output"][tile])


def test_words_that_are_left_out() -> None:
    made = torch.Generator().manual_seed(0)
    projected, states, words = (torch.randn(*s, generator=made) for s in ((1, 36, 12), (1, 36, 8), (5, 12)))
    image, fewer = about(projected, states, words), about(projected, states, words[[0, 3]])
    image.question_ids = torch.tensor([7, 1, 2, 9, 1])
    policy = MMTok(6, leave_out=[1, 2])
    assert policy.compress(image).tolist() == MMTok(6).compress(fewer).tolist()  # type: ignore[union-attr]
    assert MMTok(6, leave_out=[1, 2, 7, 9]).words(image) is words
    assert vtr.policy(policy.spec) == policy == MMTok(6, leave_out=(1, 2))
    image.question_ids = None
    with pytest.raises(vtr.UnsupportedError, match="give input_ids"):
        policy.compress(image)


def test_padding_takes_no_part() -> None:
    """What unpadding took neither covers nor is covered: other numbers there change nothing."""
    layout = anyres_layout((90, 60), ((168, 84),), 84, 6)
    made = torch.Generator().manual_seed(0)
    projected, states = torch.randn(3, 36, 12, generator=made), torch.randn(3, 36, 8, generator=made)
    words = torch.randn(4, 12, generator=made)
    gone = torch.ones(3, 36, dtype=torch.bool)
    patches = layout.newline == 0
    gone[layout.tile[patches], layout.y[patches] * 6 + layout.x[patches]] = False
    assert gone.any()
    others = torch.where(gone[..., None], torch.randn(3, 36, 8, generator=made), states)
    for keep in (0.25, 1, 5, 0, 36):
        kept = MMTok(keep).compress(about(projected, states, words, layout))
        assert isinstance(kept, Tensor) and len(set(kept.tolist())) == len(kept) == MMTok(keep).kept_of(layout)
        assert kept.tolist() == MMTok(keep).compress(about(projected, others, words, layout)).tolist()  # type: ignore[union-attr]


def test_no_question_and_one_that_matters() -> None:
    made = torch.Generator().manual_seed(0)
    projected, states = torch.randn(1, 36, 12, generator=made), torch.randn(1, 36, 8, generator=made)
    silent = MMTok(6).compress(about(projected, states, torch.empty(0, 12)))
    assert len(silent) == 6  # type: ignore[arg-type]
    asked = MMTok(6).compress(about(projected, states, projected[0, :3] * 2))
    assert {0, 1, 2} <= set(asked.tolist())  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [{"alpha": -1}, {"text_temperature": 0}, {"leave_out": [-1]}, {"placement": "x"}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MMTok(**wrong)
