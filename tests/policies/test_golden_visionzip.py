"""VisionZip against the numbers of the official code (dvlab-research/VisionZip)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official
from tests.official import IMG, close
from tests.policies.encoder import inputs_of
from tests.seen import GivenTower, seen
from vtr.image import Layout
from vtr.policies.picture._merge import into_most_similar
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import best_of
from vtr.policies.picture.visionzip import VisionZip, contexts, lined_up, share_of, spread

META = official.meta("visionzip")
UNIT, RESTORE, E2E = (official.tensors("visionzip", name) for name in ("unit", "restore", "e2e"))
RUNS = META["e2e"]["runs"]
units = pytest.mark.parametrize("case", META["unit"], ids=lambda c: f"c{c['case']}")


def tower(name: str, row: slice) -> GivenTower:
    hidden = UNIT[f"{name}.hidden"][row]
    return GivenTower(
        states={None: hidden[:, 1:]}, cls={None: hidden[:, 0]}, from_cls={None: UNIT[f"{name}.cls_attn"][row]},
        key={None: UNIT[f"{name}.metric"][row][:, :, None]}, projector=lambda states: states,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ given numbers
@units
def test_dominant_and_contextual(case: dict[str, Any]) -> None:
    """All rows of a case at once, which may have as many tokens as patches and the CLS token."""
    name, given = f"c{case['case']}", tower(f"c{case['case']}", slice(None))
    want, scores, d = UNIT[f"{name}.indices"], saliency(given, heads="sum"), case["dominant"] - 1
    assert torch.equal(scores.argsort(dim=1, descending=True, stable=True)[:, :d] + 1, want[:, 1:])
    there = torch.ones_like(scores).bool()
    stays = best_of(scores, [d] * len(scores), there)
    targets = spread(~stays, [case["contextual"]] * len(scores))
    assert (targets.sum(1) == case["contextual"]).all() and ((~stays).sum(1) == case["remaining"]).all()
    into = into_most_similar(UNIT[f"{name}.metric"][:, 1:], targets, ~stays & ~targets)
    states = given.hidden_states()
    made = contexts(states, into, targets.flatten().nonzero().squeeze(1)).view(len(scores), -1, states.shape[-1])
    for b, got in enumerate(UNIT[f"{name}.out"]):
        close(torch.cat([given.cls_state()[b, None], states[b, stays[b]], made[b]]), got)


@units
def test_what_the_policy_makes_of_it(case: dict[str, Any]) -> None:
    name, total = f"c{case['case']}", case["dominant"] + case["contextual"]
    if total > case["patches"]:
        return  # as many tokens as patches and one more: no image becomes longer
    for b in range(case["batch"]):
        image = seen(UNIT[f"{name}.hidden"][b : b + 1, 1:], tower=tower(name, slice(b, b + 1)))
        official_ = VisionZip(total, "official", case["contextual"]).compress(image)
        close(official_.features, UNIT[f"{name}.out"][b])
        theirs = sorted(i - 1 for i in UNIT[f"{name}.indices"][b].tolist() if i)
        assert official_.sources[: case["dominant"]] == [[], *([i] for i in theirs)]
        true = VisionZip(total, contextual=case["contextual"]).compress(image)
        assert len(true.features) == total == len(official_.features)
        assert {tuple(s) for s in true.sources} > {(i,) for i in theirs}  # and one patch more
        assert sorted(i for s in true.sources for i in s) == list(range(len(image)))
        assert (firsts := [s[0] for s in true.sources]) == sorted(firsts)


@pytest.mark.parametrize("case", META["restore"], ids=lambda c: f"a{c['case']}")
def test_the_order_of_crops(case: dict[str, Any]) -> None:
    name, (columns, rows) = f"a{case['case']}", case["grid_wh"]
    features, own = RESTORE[f"{name}.features"], RESTORE[f"{name}.indices"][:, 1:].sort().values - 1
    size = (rows * 336, columns * 336)
    layout = anyres_layout(size, (size,), 336, 24)
    made = lined_up(layout, torch.cat([own[:1], own]), case["contextual"])
    thumbnail = features.shape[1]
    assert made[:thumbnail].tolist() == list(range(thumbnail))
    assert torch.equal(features.flatten(0, 1)[made[thumbnail:] - thumbnail], RESTORE[f"{name}.out"])


# -------------------------------------------------------------------------------------------------------- whole model
@pytest.mark.parametrize("run", RUNS)
def test_embeddings_and_answers(run: str) -> None:
    case, (made, inputs) = RUNS[run], inputs_of("visionzip", run)
    policy = VisionZip(case["dominant"] + case["contextual"], "official", case["contextual"])
    embeds, logits = official.run(made, inputs, policy)
    assert embeds.shape[1] == case["embeds_len"]
    close(embeds, E2E[f"{run}.embeds"])
    want = E2E[f"{run}.logits"]
    close(logits[:, -1, : want.shape[1]], want)
    answer = E2E[f"{run}.greedy"][0, 1:].tolist()
    assert official.greedy(made, inputs, policy, len(answer)) == answer
    start, text = E2E["input_ids"][0].tolist().index(IMG), E2E["input_ids"].shape[1] - 1
    (row,) = vtr.report(made).rows
    assert row.vision_tokens[0] == case["embeds_len"] - text and start < text
    indices = E2E[f"{run}.indices"]
    assert indices.shape[0] == case["tiles"]


@pytest.mark.parametrize("run", [run for run in RUNS if RUNS[run]["image_size"] is not None])
def test_true_places(run: str) -> None:
    """By default newline tokens stay, and the canvas is read row by row; how many there are, its size says."""
    case, (made, inputs) = RUNS[run], inputs_of("visionzip", run)
    official.run(made, inputs, VisionZip(case["dominant"] + case["contextual"], contextual=case["contextual"]))
    (row,) = vtr.report(made).rows
    total = (case["dominant"] + case["contextual"]) * case["tiles"]
    lines = row.vision_tokens[0] - total
    assert 0 < lines <= max(case["image_size"])
    firsts = [some[0] for some in row.sources(0)]
    assert firsts == sorted(set(firsts))


# ------------------------------------------------------------------------------------------------------- what is right
def given(layout: Layout, cls: bool = True) -> Any:
    draw, n = torch.Generator().manual_seed(0), layout.grid[0] * layout.grid[1]
    tiles = torch.randn(layout.tiles, n, 8, generator=draw)
    attention = torch.rand(layout.tiles, 2, n, generator=draw)
    keys = torch.randn(layout.tiles, n + cls, 2, 4, generator=draw)
    made = GivenTower(
        states={None: tiles}, cls={None: tiles[:, 0]}, from_cls={None: attention}, received={None: attention.mean(1)},
        key={None: keys}, projector=lambda states: states, with_cls=cls,
    )  # fmt: skip
    return seen(tiles, layout, made)


def test_the_papers_shares() -> None:
    assert [share_of(n) for n in (64, 128, 192, 1, 0)] == [10, 20, 30, 0, 0]
    assert vtr.policy("visionzip:64") == VisionZip(64)


@pytest.mark.parametrize("placement", ["true", "official"])
@pytest.mark.parametrize("keep", [0, 1, 2, 8, 9, 500, 0.0, 0.01, 0.5, 1.0])
def test_small_tiles_and_odd_budgets(keep: float, placement: Any) -> None:
    for layout in (tile_layout(3, 3), tile_layout(2, 9), anyres_layout((60, 100), ((96, 96),), 48, 3)):
        for contextual in (None, 0, 2):
            if contextual and isinstance(keep, int) and contextual > keep:
                continue
            policy = VisionZip(keep, placement, contextual)
            made = policy.compress(given(layout))
            assert len(made.sources) == len(made.features) == policy.kept_of(layout)
            assert made.features.isfinite().all()
            if placement == "true":
                assert len(policy.compress(given(layout, cls=False)).sources) == policy.kept_of(layout)
                firsts = [s[0] for s in made.sources]
                assert firsts == sorted(set(firsts))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="choose at most that"):
        VisionZip(8, contextual=9)
    with pytest.raises(TypeError, match="contextual must be an int"):
        VisionZip(8, contextual=1.0)  # type: ignore[arg-type]
    assert math.isclose(VisionZip(0.25).keep, 0.25)
