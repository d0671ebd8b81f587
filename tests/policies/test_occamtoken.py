"""OccamToken without its register: thresholds that follow the mean. (No code and no neurons are published.)"""

from __future__ import annotations

import pytest
import torch
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests.policies.stages import tokens_of
from tests.seen import GivenTower, seen
from vtr.policies.decoder.occamtoken import above


def test_as_many_as_have_a_part_of_the_mean() -> None:
    scores = torch.tensor([[4.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert above(scores, 1.0).tolist() == [[True, False, False, True], [True] * 4]
    assert above(scores, 3.0).tolist() == [[True, False, False, False]] * 2  # nobody: the first of the best
    assert above(torch.full((1, 577), 0.1), 1.0).all()
    there = torch.tensor([[False, True, True, True], [False] * 4])
    assert above(scores, 1.2, there).tolist() == [[False, False, False, True], [False] * 4]


def test_every_tile_has_a_mean_of_its_own_and_newlines_stay() -> None:
    layout = anyres_layout((14, 28), ((14, 28),), 14, 2)
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0], [10.0, 10.0, 10.0, 10.0], [0.1, 0.2, 0.1, 0.1]])[: layout.tiles]
    tower = GivenTower(from_cls={None: scores[:, None]})
    image = seen(torch.zeros(layout.tiles, 4, 3), layout, tower)
    kept = vtr.OccamToken(1.0).compress(image)
    tiles = layout.tile[kept][layout.newline[kept] == 0].bincount(minlength=layout.tiles).tolist()
    assert tiles == [1, 4, 1][: layout.tiles]
    assert int(layout.newline[kept].sum()) == int(layout.newline.sum())


def test_the_question_decides_inside_the_decoder() -> None:
    policy, fields = vtr.OccamToken(question=1.0), {"place": torch.arange(4)}
    assert policy.cuts(32) == [12] and policy.cuts(28) == [11]
    for paid, want in (([0.4, 0.1, 0.1, 0.2], [0, 3]), ([0.1, 0.1, 0.1, 0.1], [0, 1, 2, 3])):
        kept = policy.prune(12, tokens_of(12, 32, fields, torch.tensor(paid)))
        assert kept is not None and kept.tolist() == want
    with pytest.raises(ValueError, match="depends on picture and question"):
        policy.entering(32, 576)


def test_a_compressor_may_stand_in_front() -> None:
    made = vtr.policy("cls:0.5+occamtoken:picture=0")
    assert made.wants == ("cls",) and made.asks("prune")
    with pytest.raises(ValueError, match="depends on picture and question"):
        made.entering(32, 576)
