"""DeFT against the numbers of the official code (kmc3661/DeFT)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout

import vtr
from tests import official
from tests.official import close
from tests.policies.stages import tokens_of
from tests.seen import GivenTower, seen
from vtr.base import Best
from vtr.image import Image
from vtr.policies.decoder.deft import counts, exposed

META, GIVEN = official.meta("deft"), official.tensors("deft", "unit")
cases = pytest.mark.parametrize("case", META["cases"], ids=lambda c: c["case"])


def keep_of(pruned: float) -> float:
    return (100 - 100 * pruned) / 100


def numbers(case: dict[str, Any]) -> dict[str, Tensor]:
    prefix = case["case"] + "."
    return {k.removeprefix(prefix): v for k, v in GIVEN.items() if k.startswith(prefix)}


def attention(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """[rows, columns]: after the softmax, mean over heads."""
    k = k.repeat_interleave(len(q) // len(k), 0)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1).mean(0)


def images_of(case: dict[str, Any]) -> list[Image]:
    """The request's images, with what its tower's one layer says."""
    given, made = numbers(case), list[Image]()
    for first, end in case["segments"]:
        paid = attention(given["tower_q"][:, first:end], given["tower_k"][:, first:end])
        if case["cls"]:
            tower = GivenTower(from_cls={-2: paid[0, 1:].view(1, 1, -1)})
            n = paid.shape[1] - 1
        else:
            received = paid.mean(0).view(-1, case["group"]).mean(1)
            tower, n = GivenTower(received={-1: received[None]}, with_cls=False), len(received)
        image = seen(torch.zeros(1, n, 4), tile_layout(1, n), tower)
        image.index, image.count = len(made), len(case["segments"])
        made.append(image)
    for image in made[1:]:
        image.memo = made[0].memo
    return made


def policy_of(case: dict[str, Any], **settings: Any) -> vtr.DeFT:
    return vtr.DeFT(keep_of(case["prune"]), case["alpha"], layer=2, pool="request", **settings)


def test_counts() -> None:
    for one in META["counts"]:
        assert counts(one["n"], keep_of(one["p"]), one["a"]) == (one["candidates"], one["keep"])


def test_the_layer() -> None:
    for depth, scored in META["depth"].items():
        assert vtr.DeFT().cuts(int(depth)) == [scored + 1]


@cases
def test_both_stages(case: dict[str, Any]) -> None:
    given, images = numbers(case), images_of(case)
    policy, sizes = policy_of(case), [len(image) for image in images]
    chosen = policy.compress_row(images)
    candidates = torch.cat([sum(sizes[:i]) + mine for i, mine in enumerate(chosen)])
    assert torch.equal(candidates, given["candidates"])

    seen_by_text = iter(torch.isin(torch.arange(case["N"]), candidates).tolist())
    left = [kind for kind in case["layout"] if kind == "t" or next(seen_by_text)]
    text = torch.tensor([kind == "t" for kind in left])
    causal = torch.ones(len(left), len(left)).tril().bool()
    received = attention(given["q"], given["k"], causal)[text].sum(0)[~text]
    close(received, given["plain_score"])
    fields = {"place": (~text).nonzero()[:, 0], "text_place": text.nonzero()[:, 0]}
    close(exposed(received, fields["place"], fields["text_place"]), given["text_score"])
    tokens = tokens_of(2, 4, fields, received, images[0].memo)
    answer = policy.prune(2, tokens)
    assert isinstance(answer, Best) and answer.count == case["K"]
    assert torch.equal(candidates[answer.indices()], given["kept"])
    plain = policy_of(case, score="sum").prune(2, tokens)
    assert isinstance(plain, Best) and torch.equal(plain.indices(), answer.indices()) == case["plain_same"]


def test_each_image_has_a_budget_of_its_own() -> None:
    case = max(META["cases"], key=lambda c: len(c["segments"]))
    images = images_of(case)
    policy = vtr.DeFT(0.25, 0.5, layer=2)
    for image, mine in zip(images, policy.compress_row(images), strict=True):
        assert len(mine) == policy.kept_of(image.layout) == counts(len(image), 0.25, 0.5)[0]
    assert [k for k, _ in images[0].memo["deft"].values()] == [counts(len(image), 0.25, 0.5)[1] for image in images]


def test_any_compressor_may_stand_in_front() -> None:
    made = vtr.policy("cls:0.5+deft:keep=0.25,first=none")
    assert made.asks("compress") and made.asks("prune") and made.wants == ("cls",)
    assert vtr.DeFT(0.25, first="none").entering(4, 16) == [16, 16, 4, 4]
    with pytest.raises(ValueError, match="only one policy"):
        vtr.policy("cls:0.5+deft")


@pytest.mark.parametrize("share", [0.05, 0.28, 0.6])
def test_a_mean_budget(share: float) -> None:
    policy = vtr.DeFT(**vtr.DeFT.settings_at(share, 28, 24))
    candidates, kept = counts(100_000, policy.keep, policy.alpha)
    assert (candidates + kept) / 2 / 100_000 == pytest.approx(share, rel=5e-3)
