"""DART against the numbers of the official code (ZichenWen1/DART), and what it does beyond them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official
from tests.policies import inside
from vtr.policies.decoder.dart import set_order, unlike

META = official.meta("dart")
cases = pytest.mark.parametrize("case", META["cases"], ids=lambda c: f"c{c['case']}")
looked_into = pytest.mark.parametrize(
    "case", [c for c in META["cases"] if "key_l1" in inside.of("dart", c)], ids=lambda c: f"c{c['case']}"
)


def policy_of(case: inside.Case) -> vtr.DART:
    """The official settings: a count, of LLaVA-NeXT another one, or a ratio that goes."""
    given = case["DART_config"]
    keep: Any = given["retain_token_num_for_llava_next"] if case["text_length"] else given["max_num_trunction"]
    keep = 1 - given["reduction_ratio"] if keep is None else keep
    pivots = given["pivot_image_token"], given["pivot_text_token"]
    return vtr.DART(keep, given["K"], *pivots, placement="official")


def seen(case: inside.Case) -> vtr.Tokens:
    """What a policy sees on entering the layer of the cut, made from the numbers of the official code."""
    mine, start, n = inside.of("dart", case), case["start"], case["vision"]
    norms, states = mine["key_l1"].float(), mine["last_layer_state"]
    place = torch.arange(len(norms))
    vision = (place >= start) & (place < start + n)
    fields = {
        "hidden": states[vision], "text": states[~vision], "place": place[vision], "text_place": place[~vision],
        "behind": place[~vision] > start,
    }  # fmt: skip
    depth = len(case["entering_lengths"])
    made = vtr.Tokens(case["DART_config"]["K"], depth, n, n, fields.__getitem__, norms[vision], lambda: norms)
    made.text_scores = norms[~vision]
    return made


@looked_into
def test_the_choice(case: inside.Case) -> None:
    mine, tokens, policy = inside.of("dart", case), seen(case), policy_of(case)
    kept = policy.prune(policy.layer, tokens)
    assert kept is not None and kept.tolist() == mine["kept"].tolist()
    assert len(kept) == case["kept"] == policy.count(case["vision"])


@looked_into
def test_pivots_in_the_order_of_a_set(case: inside.Case) -> None:
    mine, tokens, policy = inside.of("dart", case), seen(case), policy_of(case)
    images = tokens.scores.topk(policy.image_pivots).indices
    behind = tokens.behind.nonzero().squeeze(1)
    assert tokens.text_scores is not None
    texts = behind[tokens.text_scores[behind].topk(policy.text_pivots).indices]
    places = [*tokens.place[images].tolist(), *tokens.text_place[texts].tolist()]
    assert [places[i] for i in set_order(places)] == mine["pivot_order"].tolist()


@cases
def test_prefill_and_decoding(case: inside.Case) -> None:
    policy = policy_of(case)
    ran = inside.agrees("dart", case, policy)
    assert ran.kept[policy.layer] == inside.of("dart", case)["kept"].tolist()
    assert [len(kept) for kept in ran.kept] == policy.entering(len(ran.kept), case["vision"])


# ------------------------------------------------------------------------------------------------- beyond the official
def tokens_of(states: Tensor, norms: Tensor, text: Tensor, text_norms: Tensor, behind: Tensor) -> vtr.Tokens:
    n = len(states)
    fields = {"hidden": states, "text": text, "behind": behind, "place": torch.arange(n), "text_place": torch.arange(n)}
    made = vtr.Tokens(2, 5, n, n, fields.__getitem__, norms, lambda: norms)
    made.text_scores = text_norms
    return made


@pytest.mark.parametrize("keep", [1, 2, 4, 5, 13, 40, 64, 100, 0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("behind", [0, 1, 3, 6])
def test_exactly_so_many_stay_once_each(keep: vtr.keep.Keep, behind: int) -> None:
    draw = torch.Generator().manual_seed(3)
    states, norms = torch.randn(64, 8, generator=draw), torch.rand(64, generator=draw)
    text, text_norms = torch.randn(6, 8, generator=draw), torch.rand(6, generator=draw)
    policy = vtr.DART(keep)
    kept = policy.prune(2, tokens_of(states, norms, text, text_norms, torch.arange(6) >= 6 - behind))
    count = vtr.keep_count(keep, 64)
    assert policy.entering(3, 64) == [64, 64, count]
    if kept is None:
        assert count == 64
    else:
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == count


def test_the_least_like_is_taken_and_nobody_twice() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.5, 0.1, -0.3], [0.0, -1.0, 0.2, 0.3, -1.0]])
    picks = unlike(similarity, torch.tensor([0]), [2, 1])
    assert [p.tolist() for p in picks] == [[4, 1], [2]]


def test_the_budget_and_what_it_refuses() -> None:
    made = vtr.DART(**vtr.DART.settings_at(0.3, 32, 24))
    assert abs(sum(made.entering(32, 576)) / 576 / 32 - 0.3) < 2e-3
    with pytest.raises(ValueError, match="at least 1"):
        vtr.DART(layer=0)
    with pytest.raises(ValueError, match="needs a pivot"):
        vtr.DART(image_pivots=0, text_pivots=0)
    with pytest.raises(ValueError, match="choose 1…4"):
        vtr.DART(layer=5).check(5)
