"""Pictures that ``attention_mask`` hides, whole or in part: every family refuses in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests import tiny
from tests.families import FAMILIES
from tests.tiny import IMAGE, VIDEO

ROWS = [["ab", IMAGE, "what"], ["a", IMAGE, "bc", IMAGE, "xy"]]
POLICIES = ["fastv:keep=0.3,layer=2", "pool:grid=2", [None, "random:keep=0.5"]]
SAYS = r"attention_mask hides \d+ of the \d+ vision tokens of row 1.*leave"


def hiding(inputs: Any, marks: torch.Tensor, whole: bool) -> dict[str, Any]:
    """The first picture of row 1 hidden, or the first three of its tokens."""
    slots = marks[1].nonzero()[:, 0]
    gap = (slots.diff() > 1).nonzero()
    first = slots[: int(gap[0]) + 1] if len(gap) else slots
    mask = inputs["attention_mask"].clone()
    mask[1, first if whole else first[:3]] = 0
    return {**inputs, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_hidden_vision_tokens_are_refused(family: Any, padding: str) -> None:
    model = vtr.patch(family.make())
    inputs = family.batch(model, ROWS, padding)
    marks = torch.isin(inputs["input_ids"], torch.tensor([tiny.IMAGE_ID]))
    for whole in (True, False):
        given = hiding(inputs, marks, whole)
        for policy in POLICIES:
            with pytest.raises(vtr.UnsupportedError, match=SAYS):
                family.logits(model, given, policy=policy)
            with pytest.raises(vtr.UnsupportedError, match=SAYS):
                family.generate(model, given, policy=policy, max_new_tokens=2)
    family.generate(model, inputs, policy=POLICIES[0], max_new_tokens=2)
    assert all(row.vision_tokens[-1] < row.total for row in vtr.report(model).rows)


def test_hidden_frames_are_refused() -> None:
    model = vtr.patch(tiny.llava_onevision())
    inputs = tiny.batch(model, [["ab", VIDEO, "what"], ["abc", VIDEO, "who"]])
    given = hiding(inputs, inputs["input_ids"] == tiny.VIDEO_ID, True)
    with pytest.raises(vtr.UnsupportedError, match=SAYS):
        tiny.generate(model, given, policy=POLICIES[0], max_new_tokens=2)
    tiny.generate(model, given, max_new_tokens=2)
