"""LLaVA over other vision towers: Pixtral, DINOv2, ViT, SigLIP, AIMv2, and those whose tokens have no grid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vtr
from tests import oracle
from tests.tiny import IMAGE_ID, PATCH, SIDE
from vtr.engine.tower import cls_scores
from vtr.testing import tiny

SQUARE = {"image_size": SIDE, "patch_size": PATCH}
BREAK, END = 6, 7
PICTURES = [["ab", (16, 24), "what"], ["c", (24, 16), "which"], ["a", (16, 16), "b", (24, 24), "who"], ["abc"]]
SPECS = ["fastv:keep=0.3,layer=2", "gsearch:schedule=[1.0,0.8,0.5,0.5,0.2]", "uniform:keep=0.3", "random:keep=0.4"]


def llava(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    more = {"image_size": 64, "patch_size": PATCH, "head_dim": 16} if kind == "PixtralVision" else SQUARE
    tower = tiny._tower(getattr(transformers, f"{kind}Config"), **more)
    text = tiny._text("llama", 5)
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE_ID, **settings)
    return tiny._ready(transformers.LlavaForConditionalGeneration(config), "sdpa")


def pixtral() -> Any:
    return llava("PixtralVision", vision_feature_layer=-1, vision_feature_select_strategy="full")


def pictures(rows: list[list[Any]], padding: str = "left") -> dict[str, Tensor]:
    """A batch whose pictures have (height, width) pixels; text stands between the rows of patches."""
    ids, sizes = [], [part for row in rows for part in row if isinstance(part, tuple)]
    for row in rows:
        ids.append([1])
        for part in row:
            if isinstance(part, str):
                ids[-1] += [8 + (ord(c) - 97) % 50 for c in part]
                continue
            for y in range(part[0] // PATCH):
                last = y == part[0] // PATCH - 1
                ids[-1] += [IMAGE_ID] * (part[1] // PATCH) + [END if last else BREAK]
    width, made = max(map(len, ids)), torch.Generator().manual_seed(0)
    padded = [[[0] * (width - len(r)), r, [1] * len(r)] for r in ids]
    left = padding == "left"
    out = {
        "input_ids": torch.tensor([pad + r if left else r + pad for pad, r, _ in padded]),
        "attention_mask": torch.tensor([pad + one if left else one + pad for pad, _, one in padded]),
    }
    if sizes:
        pixels = torch.zeros(len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
        for i, (h, w) in enumerate(sizes):
            pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=made)
        out |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    return out


def alone(inputs: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    real = inputs["attention_mask"][b].bool()
    before = sum(isinstance(part, tuple) for row in PICTURES[:b] for part in row)
    count = sum(isinstance(part, tuple) for part in PICTURES[b])
    out = {name: inputs[name][b : b + 1, real] for name in ("input_ids", "attention_mask")}
    if count:
        sizes = inputs["image_sizes"][before : before + count]
        height, width = sizes.max(0).values.tolist()
        pixels = inputs["pixel_values"][before : before + count, :, :height, :width]
        out |= {"pixel_values": pixels, "image_sizes": sizes}
    return out


@pytest.mark.parametrize("padding", ["left", "right"])
def test_pixtrals_pictures_have_grids_of_their_own(padding: str) -> None:
    stock = pixtral()
    model, inputs = vtr.patch(copy.deepcopy(stock)), pictures(PICTURES, padding)
    with torch.no_grad():
        logits = model(**inputs, policy=SPECS).logits
        rows = vtr.report(model).rows
        for b, spec in enumerate(SPECS):
            real = tiny.real(inputs, b)
            mine = alone(inputs, b)
            torch.testing.assert_close(model(**mine, policy=spec).logits[0], logits[b][real], atol=1e-5, rtol=0)
            start = int(real[0])
            kept = [[slot - start for slot in rows[b].kept(layer)] for layer in range(5)]
            dense = oracle.run(stock, oracle.row(stock, mine), oracle.rule(vtr.policy(spec), kept), kept)
            torch.testing.assert_close(dense.logits, logits[b][real], atol=1e-5, rtol=0)
            assert dense.kept == kept


def test_pixtrals_pictures_are_pooled_and_scored_on_their_grids() -> None:
    model, inputs = vtr.patch(pixtral()), pictures(PICTURES[:3])
    for spec, want in (("pool:grid=2", [4, 4, 8]), ("cls:keep=0.5", [12, 12, 26]), ("globalcom2:retention=0.5", None)):
        tiny.generate(model, inputs, policy=spec, max_new_tokens=3)
        got = [row.vision_tokens[0] for row in vtr.report(model).rows]
        assert want is None or got == want
        assert all(0 < n < row.total for n, row in zip(got, vtr.report(model).rows, strict=True))


def batch(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        count = len(model.get_image_features(torch.zeros(1, 3, SIDE, SIDE)).pooler_output[0])
    ids = torch.tensor([[1, 9, *[IMAGE_ID] * count, 10, 11]])
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("kind", ["Dinov2", "ViT", "SiglipVision", "Aimv2Vision"])
@pytest.mark.parametrize("spec", ["fastv:keep=0.3,layer=2", "cls:keep=0.3", "globalcom2:retention=0.3", "m3:tokens=9"])
def test_other_towers(kind: str, spec: str) -> None:
    strategy = "default" if kind in ("Dinov2", "ViT") else "full"
    model = vtr.patch(llava(kind, vision_feature_select_strategy=strategy))
    tiny.generate(model, batch(model), policy=spec, max_new_tokens=2)
    assert vtr.report(model).rows[0].vision_tokens[-1] == (9 if spec.startswith("m3") else 10)


@pytest.mark.parametrize("kind", ["Dinov2", "ViT"])
def test_cls_scores_of_other_towers(kind: str) -> None:
    tower = llava(kind).model.vision_tower.eval()
    last = (tower.encoder.layer if kind == "Dinov2" else tower.layers)[-1]
    seen: dict[str, Tensor] = {}
    attention = last.attention
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        states = tower(torch.randn(2, 3, SIDE, SIDE), output_hidden_states=True).hidden_states[-2]
        q, k = (seen[name].unflatten(-1, (2, 16)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        want = (q[:, :, :1] @ k[:, :, 1:].transpose(2, 3) / 16**0.5).mean(1)[:, 0]
        got, _ = cls_scores(tower, states)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "strategy", "says"),
    [
        ("Dinov2WithRegisters", "default", "Dinov2WithRegistersModel puts 5 tokens in front"),
        ("SiglipVision", "default", "SiglipVisionModel has no CLS token.*use 'full'"),
        ("CLIPVision", "full", "CLS token of CLIPVisionModel.*use 'default'"),
        ("Dinov2", "full", "CLS token of Dinov2Model.*use 'default'"),
    ],
)
def test_tokens_without_a_place_are_refused_by_the_towers_name(kind: str, strategy: str, says: str) -> None:
    model = vtr.patch(llava(kind, vision_feature_select_strategy=strategy))
    inputs = batch(model)
    with pytest.raises(vtr.UnsupportedError, match=says):
        tiny.generate(model, inputs, policy="fastv:keep=0.3,layer=2", max_new_tokens=2)
    tiny.generate(model, inputs, max_new_tokens=2)


def test_rope_in_a_tower_is_no_part_of_cls_scores() -> None:
    model = vtr.patch(llava("DINOv3ViT", vision_feature_select_strategy="default"))
    model.model.vision_tower.config.num_register_tokens = 0
    with pytest.raises(vtr.UnsupportedError, match="use a policy that needs n"):
        cls_scores(model.model.vision_tower, torch.randn(1, 37, 32))
