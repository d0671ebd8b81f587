"""GlobalCom² against the numbers of the official code (xuyang-liu16/GlobalCom2)."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official
from tests.official import IMG, close
from tests.spy import Spy
from vtr.image import Image, arrange
from vtr.keep import top
from vtr.policies.picture.globalcom2 import best, crops_of, ratios

META = official.meta("globalcom2")
UNIT, E2E = (official.tensors("globalcom2", name) for name in ("unit", "e2e"))
CONFIG = META["e2e"]["config"]
RUNS = [name for name in META["e2e"] if ".R" in name]


def retention(name: str) -> float:
    """R25 → 0.25."""
    return int(name.rpartition("R")[2]) / 100


def percent(r: float) -> str:
    return f"R{round(r * 100)}"


# ------------------------------------------------------------------------------------- selection, from given scores
@dataclass
class Unit:
    """One picture of given features and scores."""

    image: Image
    scores: Tensor
    name: str

    def __init__(self, case: dict[str, Any]) -> None:
        self.name = f"c{case['case']}"
        base, crops = UNIT[f"{self.name}.base_feat"], UNIT[f"{self.name}.crop_feat"]
        self.scores = torch.cat([UNIT[f"{self.name}.base_scores"][None], UNIT[f"{self.name}.crop_scores"]])
        (width, height), (across, down), side = case["image_size"], case["grid_wh"], math.isqrt(len(base))
        pixels = case["best_resolution"][0] // across
        layout = anyres_layout((height, width), ((down * pixels, across * pixels),), pixels, side)
        tiles, newline = torch.cat([base[None], crops]), UNIT["image_newline"]
        features = arrange(layout, tiles, newline)
        self.image = Image(features, layout, 0, 1, None, newline, lambda: self.scores)


units = pytest.mark.parametrize("case", META["unit"], ids=lambda c: f"{c['case']}-{percent(c['R'])}")


@units
def test_ratios(case: dict[str, Any]) -> None:
    unit = Unit(case)
    got = ratios(unit.scores[0], crops_of(unit.image.layout), case["R"])
    assert got == pytest.approx(case["ratios"], abs=1e-12)
    want = UNIT[f"{unit.name}.{percent(case['R'])}.ratios"]
    assert want.dtype == torch.float64
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, atol=1e-12, rtol=0)


@units
def test_kept_tokens(case: dict[str, Any]) -> None:
    """Valid areas, counts and indices: which tokens stay, best first."""
    unit, r = Unit(case), percent(case["R"])
    policy, layout = vtr.GlobalCom2(case["R"]), unit.image.layout
    crops = crops_of(layout)
    assert crops.shape[::-1] == tuple(case["valid_area_wh"])
    assert [len(tokens) for tokens in crops.tokens] == [w * h for w, h in case["crop_valid_wh"]]
    counts = policy.counts(ratios(unit.scores[0], crops, case["R"]), crops)
    assert counts == case["crop_tokens"]
    assert best(unit.scores[0], case["thumb_tokens"]).tolist() == UNIT[f"{unit.name}.{r}.thumb_idx"].tolist()
    for j, (order, count) in enumerate(zip(policy.rank(layout, unit.scores), counts, strict=True)):
        assert order[:count].tolist() == UNIT[f"{unit.name}.{r}.crop{j}.topk_idx_in_valid"].tolist()


@units
def test_what_the_thumbnail_says_of_a_crop(case: dict[str, Any]) -> None:
    """The thumbnail's scores at every token of a crop; crops without scores of their own are ranked by them alone."""
    unit = Unit(case)
    crops, layout = crops_of(unit.image.layout), unit.image.layout
    wide = interpolate(unit.scores[0].view(1, 1, *layout.grid), crops.shape, mode="bilinear").flatten()
    silent = torch.cat([unit.scores[:1], torch.zeros_like(unit.scores[1:])])
    for j, order in enumerate(vtr.GlobalCom2(case["R"]).rank(layout, silent)):
        want = UNIT[f"{unit.name}.crop{j}.global_scores"]
        close(wide[crops.places[j]], want, 1e-6)
        assert order.tolist() == best(want, len(want)).tolist()


@units
def test_official_placement(case: dict[str, Any]) -> None:
    unit, name = Unit(case), f"c{case['case']}.{percent(case['R'])}"
    made = vtr.GlobalCom2(case["R"], placement="official").compress(unit.image)
    assert isinstance(made, vtr.Pooled) and made.layout is not None
    k, crops = case["thumb_tokens"], UNIT[f"{name}.crops_out_fp16"]
    assert len(made.features) == case["total"] and len(made.features) - k == case["crops_out_tokens"]
    assert torch.equal(made.features[:k], UNIT[f"{name}.thumb_out"])
    assert torch.equal(made.features[k:], crops.float())
    assert int(made.layout.newline.sum()) == case["newlines"]


@units
def test_true_placement_keeps_the_same_tokens(case: dict[str, Any]) -> None:
    """In their own order, with the newline tokens that the image has."""
    unit = Unit(case)
    kept = vtr.GlobalCom2(case["R"]).compress(unit.image)
    official_ = vtr.GlobalCom2(case["R"], placement="official").compress(unit.image)
    assert isinstance(kept, Tensor) and isinstance(official_, vtr.Pooled)
    newline = unit.image.layout.newline.bool()
    theirs = [i for some in official_.sources for i in some]
    assert Counter(kept.tolist()) == Counter(theirs)
    assert int(newline[kept].sum()) == int(newline.sum()) == case["valid_area_wh"][1]
    assert len(kept) == case["thumb_tokens"] + sum(case["crop_tokens"]) + case["valid_area_wh"][1]


# ------------------------------------------------------------------------------------------------------------ model


@functools.cache
def tiny_model() -> Any:
    key = RUNS[0].split(".")[0]
    heads = official.heads_of("globalcom2", CONFIG, E2E[f"{key}.pixel_values"], E2E[f"{key}.clip_hidden_m2"])
    return official.model("globalcom2", CONFIG, heads)


def inputs_of(key: str) -> dict[str, Tensor]:
    """The prompt about picture ``key``."""
    size = next(META["e2e"][name]["image_size"] for name in RUNS if name.startswith(key + "."))
    return official.prompt(tiny_model(), E2E["input_ids"], official.anyres(E2E[f"{key}.pixel_values"], size))


@pytest.mark.parametrize("key", dict.fromkeys(name.split(".")[0] for name in RUNS))
def test_what_the_tower_gives(key: str) -> None:
    """Projected tiles and CLS scores: the last layer's logits, not its probabilities."""
    spy = Spy()
    official.run(tiny_model(), inputs_of(key), spy)
    ((image, scores),) = spy.seen
    assert image.tiles is not None
    close(scores, E2E[f"{key}.cls_logits_last"], 2e-6)
    if f"{key}.projected" in E2E:
        close(image.tiles, E2E[f"{key}.projected"])


@pytest.mark.parametrize("run", RUNS)
def test_embeddings_and_answers(run: str) -> None:
    key, want = run.split(".")[0], META["e2e"][run]
    model, inputs, policy = tiny_model(), inputs_of(key), vtr.GlobalCom2(retention(run), placement="official")
    spy, theirs, embeds = Spy(), E2E[f"{key}.cls_logits_last"], E2E[f"{run}.embeds"]
    official.run(model, inputs, spy)
    ((image, scores),) = spy.seen
    assert image.layout.crops == tuple(want["grid_wh"][::-1])
    assert ratios(theirs[0], crops_of(image.layout), policy.retention) == pytest.approx(want["ratios"], abs=1e-9)
    got, _ = official.run(model, inputs, policy)
    assert got.shape[1] == want["embeds_len"]
    start, k = E2E["input_ids"][0].tolist().index(IMG), int(theirs.shape[1] * policy.retention)
    order = same_order(best(scores[0], k), best(theirs[0], k), theirs[0])
    got = torch.cat([got[:, :start], got[:, start:][:, order], got[:, start + k :]], 1)
    # float16 rounds a value between two of its numbers either way, if the float32 values differ by their noise
    off = (got - embeds).abs()
    assert (off <= torch.finfo(torch.float16).eps * embeds.abs() + 1e-5 * embeds.abs().max()).all()
    assert (off > 1e-5 * embeds.abs().max()).float().mean() < 1e-3
    answer = E2E[f"{run}.greedy"][0, 1:].tolist()
    assert official.greedy(model, inputs, policy, len(answer)) == answer


def same_order(ours: Tensor, theirs: Tensor, scores: Tensor) -> Tensor:
    """Where each of ``theirs`` stands in ``ours``: the same tokens; of scores nearer than 1e-6 either may be first."""
    assert sorted(ours.tolist()) == sorted(theirs.tolist())
    assert (scores[ours] - scores[theirs]).abs().max() < 1e-6
    return ours.argsort()[theirs.argsort().argsort()]


def test_a_batch_of_two_images_keeps_what_each_keeps_alone() -> None:
    """The official code is wrong here: its second image gets the scores of another tile."""
    keys, policy = [name.split(".")[0] for name in RUNS], vtr.GlobalCom2(0.25, placement="official")
    model = tiny_model()
    first, second = (inputs_of(key) for key in list(dict.fromkeys(keys))[:2])
    images = {"image_sizes": torch.cat([first["image_sizes"], second["image_sizes"]])}
    tiles = [one["pixel_values"][0] for one in (first, second)]
    most = max(map(len, tiles))
    images["pixel_values"] = torch.stack([torch.cat([t, t.new_zeros(most - len(t), *t.shape[1:])]) for t in tiles])
    ids = [one["input_ids"][0] for one in (first, second)]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True, padding_side="left")
    batch = {"input_ids": padded, "attention_mask": mask, **images}
    got, _ = official.run(model, batch, policy)
    alone = [official.run(model, one, policy)[0] for one in (first, second)]
    close(got, torch.cat(alone, 1))
    assert [one.shape[1] for one in alone] == META["e2e"]["batch2"]["single_lens"]
    assert META["e2e"]["batch2"]["lens"][1] != alone[1].shape[1], "the official batch is wrong about the second image"


def test_one_tile_follows_the_rule_of_the_thumbnail() -> None:
    """The official code cannot take LLaVA-1.5's images (it raises); a thumbnail alone is what they are."""
    assert "RuntimeError" in META["e2e"]["image_4d_llava15"]
    unit = META["unit"][0]
    scores, side = UNIT[f"c{unit['case']}.base_scores"], math.isqrt(len(UNIT[f"c{unit['case']}.base_scores"]))
    features = UNIT[f"c{unit['case']}.base_feat"]
    image = Image(features, tile_layout(side, side), 0, 1, None, None, lambda: scores[None])
    kept = vtr.GlobalCom2(unit["R"]).compress(image)
    assert isinstance(kept, Tensor)
    assert sorted(kept.tolist()) == top(scores, unit["thumb_tokens"]).tolist()
