"""SCOPE against the numbers of the official code (kinredon/SCOPE) and of AngelSlim's port."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official
from tests.official import IMG, close
from tests.seen import GivenTower, seen
from vtr.image import Image
from vtr.policies.picture._greedy import _covering_all, barred, covering, unit
from vtr.policies.picture.scope import Scope

META = official.meta("scope")
UNIT, E2E, EMBEDS = (official.tensors("scope", name) for name in ("unit", "e2e", "embeds"))
PORT = official.tensors("idpruner", "scope_port")


def cases(method: str, file: str) -> Any:
    found = [case for case in official.meta(method)["cases"] if case["file"] == file]
    return pytest.mark.parametrize("case", found, ids=lambda c: c["case"])


def looked_at(features: Tensor, saliency: Tensor) -> list[Image]:
    """One image a tile: its states and what the CLS token pays to them."""
    layout = tile_layout(1, features.shape[1])
    towers = [
        GivenTower({None: f[None]}, from_cls={None: s[None, None]}) for f, s in zip(features, saliency, strict=True)
    ]
    return [seen(f[None], layout, tower) for f, tower in zip(features, towers, strict=True)]


def greedy(case: dict[str, Any], features: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
    units, worth = unit(features), saliency ** case["alpha"]
    multi = case.get("combined", "multi") == "multi"
    table = units @ units.transpose(1, 2)
    return covering(table, case.get("T", case.get("kept")), None, worth if multi else None, None if multi else worth)


@cases("scope", "unit")
def test_picks(case: dict[str, Any]) -> None:
    features, want = UNIT[f"{case['case']}.features"], UNIT[f"{case['case']}.picks"]
    saliency = UNIT[f"{case['case']}.attention_sum"] if case["saliency"] else torch.ones(features.shape[:2])
    picks, covered = greedy(case, features, saliency)
    after = UNIT[f"{case['case']}.coverage_after"]
    if f"{case['case']}.similarity" in UNIT:
        units = unit(features)
        close(units @ units.transpose(1, 2), UNIT[f"{case['case']}.similarity"])
    if case["margin"] == 0:  # exact ties, that noise decides
        assert all(len(set(some)) == case["T"] for some in picks.tolist())
        close(covered.sum(1), after.sum(1))
        return
    assert picks.tolist() == want.tolist()
    close(covered, after)
    policy = Scope(case["T"], alpha=case["alpha"], combined=case["combined"])
    for image, mine in zip(looked_at(features, saliency), want, strict=True):
        kept = policy.compress(image)
        assert isinstance(kept, Tensor) and kept.tolist() == mine.sort().values.tolist()


@cases("idpruner", "scope_port")
def test_the_port(case: dict[str, Any]) -> None:
    """Projected features; saliency as given."""
    features, saliency = PORT[f"{case['case']}.features"][None], PORT[f"{case['case']}.saliency"]
    assert greedy(case, features, saliency)[0][0].tolist() == PORT[f"{case['case']}.picks"].tolist()
    (image,) = looked_at(features, saliency)
    kept = Scope(case["kept"], features="projected", alpha=case["alpha"]).compress(image)
    assert isinstance(kept, Tensor) and kept.tolist() == PORT[f"{case['case']}.mask"].nonzero()[:, 0].tolist()


@cases("scope", "embeds")
def test_the_whole_prompt(case: dict[str, Any]) -> None:
    """Thumbnail, then the canvas without newline tokens; the fixture's features say only which tokens were picked."""
    name = case["case"]
    features, picks, kept = (EMBEDS[f"{name}.{part}"] for part in ("features", "picks", "kept_features"))
    side = int(features.shape[1] ** 0.5)
    exact = features.float().scatter(1, picks.sort(1).values[..., None].expand(-1, -1, features.shape[2]), kept)
    layout = tile_layout(side, side)
    if case["grid_wh"] is not None:
        (width, height), (across, down) = case["image_size_wh"], case["grid_wh"]
        layout = anyres_layout((height, width), ((down * side * 14, across * side * 14),), side * 14, side)

    # states that cover only themselves, so that saliency alone decides
    saliency = torch.full(features.shape[:2], 0.01).scatter(1, picks, 1.0)
    states = torch.eye(features.shape[1]).expand(len(features), -1, -1)
    tower = GivenTower({None: states}, from_cls={None: saliency[:, None]})
    image = seen(exact, layout, tower, EMBEDS[f"{name}.image_newline"])
    made = Scope(case["per_tile"], placement="official").compress(image)
    body = made.features if isinstance(made, vtr.Pooled) else image.features[made.sort().values]
    ids, words = EMBEDS[f"{name}.input_ids"][0], EMBEDS[f"{name}.embed_tokens"]
    at = ids.tolist().index(IMG)
    got = torch.cat([words[ids[:at]], body, words[ids[at + 1 :]]])
    close(got[None], EMBEDS[f"{name}.inputs_embeds"], 1e-6)


def clip() -> CLIPVisionModel:
    config = CLIPVisionConfig(**META["e2e_vision_config"])
    config._attn_implementation = "eager"
    made = CLIPVisionModel(config).eval()
    weights = official.tensors("scope", "e2e_weights")
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in made.state_dict()) else ""
    named = {prefix + name.removeprefix("vision_model."): t for name, t in weights.items()}
    missing, unexpected = made.load_state_dict(named, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    return made


@cases("scope", "e2e")
def test_from_pixels(case: dict[str, Any]) -> None:
    """Through a whole patched LLaVA, a tile an image: the same patches of every tile stay."""
    name, vision = case["case"], META["e2e_vision_config"]
    pixels, picks = E2E[f"{name}.pixel_values"], E2E[f"{name}.picks_plus_one"] - 1
    text = LlamaConfig(vocab_size=9, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=text, image_token_index=8, vision_feature_layer=-2
    )
    model: Any = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(clip().state_dict())
    model.set_attn_implementation("eager")
    vtr.patch(model)
    n = (vision["image_size"] // vision["patch_size"]) ** 2
    seen_: list[tuple[Tensor, Tensor]] = []

    class Spied(Scope):
        def choose(self, image: Image, counts: list[int], there: Tensor) -> Tensor:
            assert image.tower is not None
            chosen = super().choose(image, counts, there)
            seen_.append((image.tower.attention_from_cls().sum(1), image.tower.hidden_states()[chosen]))
            return chosen

    row = torch.tensor([[1, *[8] * n * len(pixels), 2]])
    with torch.no_grad():
        model(input_ids=row, attention_mask=torch.ones_like(row), pixel_values=pixels, policy=Spied(case["per_tile"]))
    assert len(seen_) == len(pixels)
    close(torch.cat([saliency for saliency, _ in seen_]), E2E[f"{name}.attention_sum"])
    close(torch.stack([states for _, states in seen_]), E2E[f"{name}.output"])
    assert picks.shape[1] == case["per_tile"]


def test_padding_takes_no_part() -> None:
    """Tiles of which unpadding took patches have budgets of their own, and newline tokens stay."""
    layout = anyres_layout((90, 60), ((168, 84),), 84, 6)
    made = torch.Generator().manual_seed(0)
    states, saliency = torch.randn(3, 36, 16, generator=made), torch.rand(3, 36, generator=made)
    image = seen(states, layout, GivenTower({None: states}, from_cls={None: saliency[:, None]}))
    for policy in (Scope(9), Scope(0.25), Scope(36), Scope(0), Scope(1)):
        kept = policy.compress(image)
        assert isinstance(kept, Tensor) and len(set(kept.tolist())) == len(kept) == policy.kept_of(layout)


def test_nothing_left_to_cover() -> None:
    """Equal tokens: the lower index wins, and none is taken twice."""
    (image,) = looked_at(torch.ones(1, 9, 4), torch.ones(1, 9))
    for policy in (Scope(4), Scope(4, alpha=0.0), Scope(4, combined="add"), Scope(4, features="projected")):
        assert policy.compress(image).sort().values.tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_both_ways_to_keep_the_gains() -> None:
    """Corrected by the rows that change (on a CPU), or summed anew for all tiles at once (elsewhere)."""
    made = torch.Generator().manual_seed(0)
    table, worth = torch.rand(2, 20, 12, generator=made) - 0.1, torch.rand(2, 12, generator=made)
    there = torch.rand(2, 12, generator=made) > 0.3
    count = int(there.sum(1).min())
    for factor, bonus in ((worth, None), (None, worth), (None, None)):
        ways = [
            covering(table, count, there, factor, bonus),
            _covering_all(table, count, barred(there, worth), factor, bonus),
        ]
        for t in range(2):
            c, mine = torch.zeros(20), list[int]()
            for _ in range(count):
                score = (table[t] - c[:, None]).clamp(min=0).sum(0)
                score = score if factor is None else score * factor[t]
                score = score if bonus is None else score + bonus[t]
                score[~there[t]] = score[mine] = -1
                mine.append(int(score.argmax()))
                c = torch.maximum(c, table[t][:, mine[-1]])
            for picks, covered in ways:
                assert picks[t].tolist() == mine
                close(covered[t], c)
