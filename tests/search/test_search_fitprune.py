"""FitPrune's recipes: who may go by what is left of the attention, and a recipe that saves what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vtr
from tests.search.search_models import questions, short
from vtr.search.recipe import fitprune, recipe_of


def test_who_may_go_is_least_looked_at_by_both() -> None:
    own, text = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 1, 2, 3])
    assert recipe_of([[torch.stack([own, text])]], 0.0, 2) == [0.0, 0.0]
    # of ten, three may go: 1 + 2 of the one, 1 + 2 of the other; token 1 is in both
    assert recipe_of([[torch.stack([own, text])]], 0.3, 2) == [0.25, 0.0]
    assert recipe_of([[torch.stack([own, text])]], 1.0, 2) == [1.0, 0.0]
    # what went counts as lost in the next layer: token 1 alone is 2 of 10, so 0.3 leaves room for one of the others
    twice = [torch.stack([own, text])] * 2
    assert recipe_of([twice], 0.3, 3) == [0.25, 0.0, 0.0]
    assert recipe_of([twice, [own[None]]], 0.3, 3) == [0.375, 0.0, 0.0]


def test_a_recipe_saves_what_was_asked_for(tmp_path: Path) -> None:
    model, processor = short(4)
    found = fitprune(model, processor, questions(4), reduction=0.3, progress=False)
    assert len(found.scheme) == 4 and found.scheme[-1] == 0.0 and all(share >= 0 for share in found.scheme)
    assert 0.3 <= found.record["saved"] < 0.4
    found.save_pretrained(tmp_path)
    policy = vtr.FitPrune.from_pretrained(tmp_path)
    assert policy == found.policy()
    inputs = vtr.chat.encode(processor, [questions(1)[0].question], [questions(1)[0].image])
    with torch.no_grad():
        model(**inputs, policy=policy)
    row = vtr.report(model).rows[0]
    assert row.vision_tokens == policy.entering(4, row.total)


def test_what_it_refuses() -> None:
    model, processor = short(4)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fitprune(model, processor, questions(2), reduction=1.0)
    with pytest.raises(ValueError, match="is saved"):
        fitprune(model, processor, questions(2), reduction=0.999, progress=False)
