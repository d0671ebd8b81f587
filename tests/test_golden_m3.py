"""Matryoshka against the numbers of the official M3 code (mu-cai/matryoshka-mm)."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout
from vtr.integrations.llava_onevision import frames_layout

import vtr
from tests import official
from tests.official import IMG, close
from vtr.image import Image, Layout, arrange, scales
from vtr.policies.blind.matryoshka import pool

META = official.meta("m3")
POOL, ANYRES, MODEL = (official.tensors("m3", name) for name in ("pool", "anyres", "model"))
CONFIG = META["model"]["config"]
SIZE = [100, 60]
"""Of the picture any.* (width, height), as the fixtures' README says."""


def suffixes(tensors: dict[str, Tensor], prefix: str) -> list[str]:
    """What stands behind ``prefix`` in the names of the fixtures."""
    return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]


def image(layout: Layout, tiles: Tensor, newline: Tensor | None) -> Image:
    return Image(arrange(layout, tiles, newline), layout, 0, 1, tiles, newline)


def compressed(picture: Image, scale: int) -> Tensor:
    """The picture's tokens at a scale."""
    made = vtr.Matryoshka(scale).compress(picture)
    return picture.features if made is None else made.features


# ---------------------------------------------------------------------------------------------------------- pooling
@pytest.mark.parametrize("scale", list(META["pool_out_shapes"]))
def test_pooling(scale: str) -> None:
    """The official code rounds the side of a cell down; scales that are none of the paper's are refused here."""
    x, want = POOL["x"], POOL[f"y_{scale}"]
    side = math.isqrt(x.shape[1])
    k = math.floor(math.sqrt(x.shape[1] / int(scale)))
    assert list(want.shape) == META["pool_out_shapes"][scale]
    close(pool(x, (side, side), k), want, 1e-6)
    policy, picture = vtr.Matryoshka(int(scale)), image(tile_layout(side, side), x[:1], None)
    if int(scale) in scales((side, side)):
        close(compressed(picture, int(scale)), want[0], 1e-6)
    else:
        with pytest.raises(ValueError, match="choose 576, 144, 36, 9, 1"):
            policy.compress(picture)


# ----------------------------------------------------------------------------------------------------------- AnyRes
@pytest.mark.parametrize("case", META["anyres_cases"], ids=lambda c: f"{c['case']}-{c['scale']}")
def test_anyres(case: dict[str, Any]) -> None:
    name = f"c{case['case']}"
    tiles, want = ANYRES[f"{name}.feats"], ANYRES[f"{name}.img_{case['scale']}"]
    (width, height), (across, down), side = case["image_size"], case["grid_wh"], math.isqrt(tiles.shape[1])
    pixels = case["best_resolution"][0] // across
    assert [down * pixels, across * pixels] == case["best_resolution"][::-1] and len(tiles) == 1 + down * across
    layout = anyres_layout((height, width), ((down * pixels, across * pixels),), pixels, side)
    picture = image(layout, tiles, ANYRES["image_newline"])
    got = picture.features if case["scale"] is None else compressed(picture, case["scale"])
    assert len(got) == len(want) == case["n_tokens"]
    close(got, want, 1e-6)


@pytest.mark.parametrize("scale", suffixes(ANYRES, "single.img_"))
def test_a_single_tile_of_a_list(scale: str) -> None:
    """One tile and one newline token behind it, as LLaVA-OneVision has it where a row has several images."""
    tiles, want = ANYRES["single.feats"], ANYRES[f"single.img_{scale}"]
    picture = image(frames_layout(1, math.isqrt(tiles.shape[1])), tiles, ANYRES["image_newline"])
    close(compressed(picture, int(scale)), want, 1e-6)


@pytest.mark.parametrize("scale", suffixes(ANYRES, "sq.embeds_"))
def test_square_images(scale: str) -> None:
    """Prompts [1, image, 3, 4] and [2, 5, image, 6]."""
    table, side = ANYRES["stub.embed_weight"], math.isqrt(ANYRES["sq.feats"].shape[1])
    for b, ids in enumerate(([1, IMG, 3, 4], [2, 5, IMG, 6])):
        tokens = compressed(image(tile_layout(side, side), ANYRES["sq.feats"][b, None], None), int(scale))
        got = torch.cat([tokens if i == IMG else table[i, None] for i in ids])
        close(got, ANYRES[f"sq.embeds_{scale}"][b], 1e-6)


# ------------------------------------------------------------------------------------------------------------ model
@functools.cache
def heads() -> int:
    return official.heads_of("m3", CONFIG, MODEL["any.pixel_values"], MODEL["any.clip_feat"])


@functools.cache
def anyres_model() -> tuple[Any, dict[str, Tensor]]:
    """The tiny LLaVA-NeXT and its prompt."""
    model = official.model("m3", CONFIG, heads())
    return model, official.prompt(model, MODEL["any.input_ids"], official.anyres(MODEL["any.pixel_values"], SIZE))


@pytest.mark.parametrize("scale", suffixes(MODEL, "any.embeds_"))
def test_embeddings(scale: str) -> None:
    model, inputs = anyres_model()
    close(official.run(model, inputs, f"m3:tokens={scale}")[0], MODEL[f"any.embeds_{scale}"])


@pytest.mark.parametrize("scale", suffixes(MODEL, "any.logits_"))
def test_logits(scale: str) -> None:
    """Of all tokens; the official sequence is the compressed one, ours keeps the slots of what is gone."""
    model, inputs = anyres_model()
    want = MODEL[f"any.logits_{scale}"][0]
    got = official.run(model, inputs, f"m3:tokens={scale}")[1][0, :, : want.shape[1]]
    ids = MODEL["any.input_ids"][0].tolist()
    before, after = ids.index(IMG), len(ids) - ids.index(IMG) - 1
    text = [*range(before), *range(-after, 0)]
    close(got[text], want[text])
    vision = inputs["input_ids"][0] == model.config.image_token_id
    n, m = int(vision.sum()), len(want) - before - after
    assert vtr.report(model).rows[0].vision_tokens == [m] * CONFIG["num_hidden_layers"]
    close(got[vision][torch.arange(1, m + 1) * n // m - 1], want[before : before + m])


@pytest.mark.parametrize("scale", suffixes(MODEL, "any.greedy_"))
def test_greedy(scale: str) -> None:
    model, inputs = anyres_model()
    want = MODEL[f"any.greedy_{scale}"][0, 1:].tolist()  # the official code puts BOS in front of what it generates
    assert official.greedy(model, inputs, f"m3:tokens={scale}", len(want)) == want


def test_without_a_scale() -> None:
    """No policy is the official code without a scale; its eval forward ignores the scale as well."""
    model, inputs = anyres_model()
    want = MODEL["any.generate_noscale"][0, 1:].tolist()
    assert official.greedy(model, inputs, None, len(want)) == want
    if "any.eval_forward_logits" in MODEL:
        close(official.run(model, inputs, None)[1][..., : CONFIG["vocab_size"]], MODEL["any.eval_forward_logits"])


# --------------------------------------------------------------------------------------------------------- training
SCALES = [int(s) for s in next(iter(suffixes(MODEL, "tr.loss_per_scale_"))).split("_")]


def test_training_loss() -> None:
    """The mean of the scales' losses of a padded batch, and its gradients."""
    model = official.model("m3", CONFIG, heads(), anyres=False, room=0)
    mark, given = model.config.image_token_id, MODEL["tr.input_ids"]
    assert not (given == mark).any()
    count = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2

    def spread(rows: Tensor, fill: int) -> Tensor:
        out = [
            [new for i, v in zip(ids, row, strict=True) for new in ([fill] * count if i == IMG else [v])]
            for ids, row in zip(given.tolist(), rows.tolist(), strict=True)
        ]
        return torch.tensor(out)

    inputs = {
        "input_ids": spread(given, mark),
        "attention_mask": spread(MODEL["tr.attention_mask"], 1),
        "labels": spread(MODEL["tr.labels"], -100),
        "pixel_values": MODEL["tr.pixel_values"],
    }
    losses = torch.stack([model(**inputs, policy=vtr.Matryoshka(s)).loss for s in SCALES])
    close(losses.detach(), MODEL[next(k for k in MODEL if k.startswith("tr.loss_per_scale_"))])
    close(losses.detach().mean()[None], MODEL["tr.loss_mean"])
    losses.mean().backward()
    parameters = dict(model.named_parameters())
    for name in suffixes(MODEL, "tr.grad."):
        close(parameters[official._renamed(name, "")].grad, MODEL[f"tr.grad.{name}"])
