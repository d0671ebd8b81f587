"""LLaVA-PruMerge and PruMerge+ against the numbers of the official code (42Shawn/LLaVA-PruMerge)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official
from tests.official import close
from tests.policies.encoder import inputs_of, tiny_model
from tests.seen import GivenTower, seen
from vtr.image import Image, Layout, Pooled
from vtr.policies.picture._merge import outliers
from vtr.policies.picture.prumerge import PruMerge, PruMergePlus, cls_row, completed, merged, with_samples

META = official.meta("prumerge")
UNIT, E2E = (official.tensors("prumerge", name) for name in ("unit", "e2e"))
RUNS = META["e2e"]["runs"]
units = pytest.mark.parametrize("case", META["unit"], ids=lambda c: f"c{c['case']}")


def frames(count: int, n: int) -> Layout:
    """So many tiles of n patches, none of which is the whole picture."""
    tile = torch.arange(count).repeat_interleave(n)
    x = torch.arange(n).repeat(count)
    return Layout(tile, torch.zeros_like(x), x, torch.zeros_like(x), (1, n))


def images(case: dict[str, Any]) -> list[Image]:
    """The pictures of a case; of an adaptive batch, which counts outliers together, one of all its tiles."""
    name, batch = f"c{case['case']}", case["batch"]
    hidden, q, k = (UNIT[f"{name}.{what}"] for what in ("hidden", "q", "k"))
    parts = [slice(None)] if case["adaptive"] else [slice(b, b + 1) for b in range(batch)]
    return [
        seen(
            hidden[p, 1:],
            frames(len(hidden[p]), case["patches"]),
            GivenTower(states={None: hidden[p, 1:]}, query={-1: q[p]}, key={-1: k[p][:, :, None]}, projector=_same),
        )
        for p in parts
    ]


def _same(states: Tensor) -> Tensor:
    return states


def policy_of(case: dict[str, Any], placement: Any = "official") -> PruMerge:
    kind = PruMergePlus if case["plus"] else PruMerge
    return kind(None if case["adaptive"] else case["tokens"], placement)


@units
def test_scores_and_outliers(case: dict[str, Any]) -> None:
    name = f"c{case['case']}"
    scores = cls_row(UNIT[f"{name}.q"][:, 0], UNIT[f"{name}.k"])
    close(scores, UNIT[f"{name}.cls_attn"], 1e-6)
    if case["adaptive"]:
        assert outliers(scores) == case["outliers"]
        assert outliers(scores) / scores.numel() == pytest.approx(case["reduction_ratio"])


@units
def test_tokens(case: dict[str, Any]) -> None:
    """Best first, the sum of the rest last."""
    made = [policy_of(case).compress(image) for image in images(case)]
    want = UNIT[f"c{case['case']}.out"]
    close(torch.cat([one.features for one in made]), want.flatten(0, 1))
    assert want.shape[1] == case["tokens"]
    if not case["adaptive"]:
        assert policy_of(case).kept_of(images(case)[0].layout) == case["tokens"]


@units
def test_true_placement_keeps_the_same_tokens(case: dict[str, Any]) -> None:
    """In the order of the picture. Not where tiles count together, samples are there twice, a rounding of the published
    code loses an outlier, or every patch stays."""
    if case["adaptive"]:
        share = case["outliers"] / case["patches"]
        exact = case["batch"] == 1 and 0 < case["outliers"] == int(case["patches"] * share)
        exact = exact and int(1 / share) == case["patches"] // case["outliers"]
    else:
        exact = not case["plus"]
    if not exact or case["tokens"] > case["patches"]:
        return
    for image in images(case):
        theirs, ours = policy_of(case).compress(image), policy_of(case, "true").compress(image)
        order = [[s[0] for s in theirs.sources[:-1]].index(s[0]) for s in ours.sources if len(s) <= 33 and
                 s[0] in {t[0] for t in theirs.sources[:-1]}]  # fmt: skip
        assert len(ours.sources) == len(theirs.sources) == len(order) + 1
        rest = next(i for i, s in enumerate(ours.sources) if sorted(s) == sorted(theirs.sources[-1]))
        close(ours.features[rest], theirs.features[-1])
        mine = torch.cat([ours.features[:rest], ours.features[rest + 1 :]])
        close(mine, theirs.features[torch.tensor(order)])
        assert (firsts := [s[0] for s in ours.sources]) == sorted(firsts)


# -------------------------------------------------------------------------------------------------------- whole model
@pytest.mark.parametrize("run", RUNS)
def test_embeddings_and_answers(run: str) -> None:
    case, (made, inputs) = RUNS[run], inputs_of("prumerge", run)
    policy = (PruMergePlus if case["plus"] else PruMerge)(placement="official")
    embeds, logits = official.run(made, inputs, policy)
    assert embeds.shape[1] == case["embeds_len"]
    close(embeds, E2E[f"{run}.embeds"])
    want = E2E[f"{run}.logits"]
    close(logits[:, -1, : want.shape[1]], want)
    answer = E2E[f"{run}.greedy"][0].tolist()
    assert official.greedy(made, inputs, policy, len(answer)) == answer


@pytest.mark.parametrize("kind", ["prumerge", "prumerge-plus"])
def test_no_picture_counts_on_its_batch_mates(kind: str) -> None:
    model = tiny_model("prumerge", anyres=False)
    keys = list(dict.fromkeys(run.split(".")[0] for run in RUNS))
    rows = [official.prompt(model, E2E["input_ids"], {"pixel_values": E2E[f"{k}.pixel_values"]}) for k in keys]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    together, _ = official.run(model, batch, kind)
    close(together, torch.cat([official.run(model, row, kind)[0] for row in rows], 1))


# ------------------------------------------------------------------------------------------------------- what is right
def given(layout: Layout, flat: bool = False, cls: bool = True) -> Image:
    draw, n = torch.Generator().manual_seed(0), layout.grid[0] * layout.grid[1]
    tiles = torch.randn(layout.tiles, n, 8, generator=draw)
    key = torch.zeros if flat else functools.partial(torch.randn, generator=draw)
    made = GivenTower(
        states={None: tiles}, key={-1: key(layout.tiles, n + cls, 2, 4)}, query={-1: torch.ones(layout.tiles, 2, 4)},
        received={-1: torch.rand(layout.tiles, n, generator=draw)}, projector=_same, with_cls=cls,
    )  # fmt: skip
    return seen(tiles, layout, made)


LAYOUTS = (tile_layout(3, 3), tile_layout(2, 20), anyres_layout((60, 100), ((96, 96),), 48, 3))


@pytest.mark.parametrize("placement", ["true", "official"])
@pytest.mark.parametrize("kind", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("keep", [0, 1, 2, 3, 8, 9, 500, 0.0, 0.01, 0.5, 1.0])
def test_budgets(kind: Any, keep: float, placement: Any) -> None:
    for layout in LAYOUTS:
        policy = kind(keep, placement)
        for cls in (True, False):
            image = given(layout, cls=cls)
            made = policy.compress(image)
            assert isinstance(made, Pooled) and made.features.isfinite().all()
            assert len(made.sources) == len(made.features) == policy.kept_of(layout)
            if placement == "true":
                firsts = [s[0] for s in made.sources]
                assert firsts == sorted(set(firsts))
                if keep == 500:
                    assert torch.equal(made.features, image.features)


@pytest.mark.parametrize("placement", ["true", "official"])
def test_where_nothing_stands_out(placement: Any) -> None:
    """PruMerge keeps the sum of all, as published; PruMerge+ a few samples too, where the published code fails."""
    assert "ZeroDivisionError" in META["probes"]["no_outlier_plus"]
    for layout in LAYOUTS:
        image = given(layout, flat=True)
        newlines = int(layout.newline.sum()) if placement == "true" else 0
        assert len(PruMerge(None, placement).compress(image).sources) == layout.tiles + newlines
        some = PruMergePlus(None, placement).compress(image)
        assert layout.tiles * 2 + newlines <= len(some.sources) <= layout.tiles * 5 + newlines


def test_how_many_depends_on_the_picture() -> None:
    with pytest.raises(ValueError, match="not known before it is encoded"):
        PruMerge().kept_of(LAYOUTS[0])
    assert vtr.policy("prumerge:64") == PruMerge(64)
    assert vtr.policy(vtr.policy("prumerge-plus").spec) == PruMergePlus()


def test_repeated_samples_push_others_out_in_the_published_code_alone() -> None:
    assert with_samples(torch.tensor([5, 2]), torch.tensor([2, 4])).tolist() == [5, 2, 4]
    assert completed(torch.tensor([5, 2, 2]), torch.arange(6)).tolist() == [5, 2, 2, 1, 3, 4]
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.2]])
    made, _, _ = merged(torch.eye(4)[None], torch.eye(4)[None], scores, [torch.tensor([1, 0, 2, 3])], [1], [True])
    close(made[0], torch.tensor([[0.1, 1.0, 0.2, 0.2], [0.1, 0.0, 0.2, 0.2]]))


@pytest.mark.parametrize("kind", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("keep", [None, 3, 0.5])
def test_a_tile_that_is_all_padding(kind: Any, keep: Any) -> None:
    layout = anyres_layout((7, 3), ((8, 16), (16, 8)), 8, 2)
    tiles = set(layout.tile[layout.newline == 0].tolist())
    assert len(tiles) < layout.tiles
    made = kind(keep).compress(given(layout))
    assert {int(layout.tile[s[0]]) for s in made.sources if not layout.newline[s[0]]} == tiles
