"""Shorter prompts built by hand: what M3 and GlobalCom² make of a row's images, from the papers' descriptions alone.

Tower and projector are called directly, crops are put together by transformers' own packing, tokens are chosen one by
one. Nothing here knows the engine, its captures or its layouts.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from tests import oracle, tiny


def pixels(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The tiles [tiles, 3, h, w] of every image, as the vision tower gets them."""
    values, kind = inputs["pixel_values"], model.config.model_type
    if kind == "llava":
        return list(values[:, None])
    if kind == "internvl":
        row, counts = (inputs["input_ids"][0] == tiny.IMAGE_ID).tolist(), [0]
        for before, here in zip([False, *row], row, strict=False):
            counts += [0] if before and not here else []
            counts[-1] += here
        return list(values.split([n // 9 for n in counts if n]))
    config = model.config
    counts = [
        image_size_to_num_patches(size.tolist(), config.image_grid_pinpoints, config.vision_config.image_size)
        for size in inputs["image_sizes"]
    ]
    return [tiles[:n] for tiles, n in zip(values, counts, strict=True)]


def encoded(model: Any, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(projected tiles [tiles, n, D], scores [tiles, n]) of one image's tiles, in the tower's order."""
    inner, config = model.model, model.config
    hidden = inner.vision_tower(tiles, output_hidden_states=True).hidden_states
    chosen = hidden[config.vision_feature_layer]
    if config.vision_config.model_type != "siglip_vision_model":
        chosen = chosen[:, 1:]
    if config.model_type == "internvl":
        side = math.isqrt(chosen.shape[1])
        chosen = inner.pixel_shuffle(chosen.reshape(len(chosen), side, side, -1), config.downsample_ratio).flatten(1, 2)
    projected = inner.multi_modal_projector(chosen)
    with torch.no_grad():
        return projected, scores(model, hidden[-2], projected)


def scores(model: Any, states: Tensor, projected: Tensor) -> Tensor:
    """How much each token matters, [tiles, n]: CLS logits head by head, or unlikeness to the mean token."""
    kind = model.config.vision_config.model_type
    if kind == "siglip_vision_model":
        mean = projected.mean(1, keepdim=True)
        return -(projected * mean).sum(-1) / projected.norm(dim=-1) / mean.norm(dim=-1)
    norm, attention = last_layer(model)
    x = norm(states)
    q, k = attention.q_proj(x), attention.k_proj(x)
    if kind != "clip_vision_model":
        q, k = attention.q_norm(q), attention.k_norm(k)
    heads = attention.num_heads
    per_head = [
        a[:, :1] @ b[:, 1:].transpose(1, 2) / math.sqrt(a.shape[-1])
        for a, b in zip(q.chunk(heads, -1), k.chunk(heads, -1), strict=True)
    ]
    found = sum(per_head)[:, 0] / heads  # type: ignore[index]
    if kind == "clip_vision_model":
        return found
    side = math.isqrt(found.shape[1])  # a token of InternVL is 2 × 2 patches
    return found.view(-1, side // 2, 2, side // 2, 2).mean((2, 4)).flatten(1)


def last_layer(model: Any) -> tuple[Any, Any]:
    """(norm, attention) of the last layer of a CLIP or InternVL tower."""
    tower = model.model.vision_tower
    encoder = tower.encoder if hasattr(tower, "encoder") else tower.vision_model.encoder
    if model.config.vision_config.model_type == "clip_vision_model":
        return encoder.layers[-1].layer_norm1, encoder.layers[-1].self_attn
    return encoder.layer[-1].layernorm_before, encoder.layer[-1].attention


def packed(model: Any, tiles: Tensor, size: Tensor | None, newline: Tensor | None, k: int = 1) -> Tensor:
    """Tiles [tiles, n, C] of one image as its tokens [m, C], by transformers; k: how many times smaller they are."""
    kind = model.config.model_type
    if kind in ("llava", "internvl"):
        return tiles.flatten(0, 1)
    inner = copy.copy(model.model)
    inner.config = copy.deepcopy(model.config)
    inner.config.vision_config.patch_size *= k
    how = {"vision_aspect_ratio": model.config.vision_aspect_ratio} if kind == "llava_onevision" else {}
    strategy = {} if kind == "llava_onevision" else {"vision_feature_select_strategy": "default"}
    return inner.pack_image_features([tiles], size[None], image_newline=newline, **how, **strategy)[0][0]


def matryoshka(model: Any, inputs: dict[str, Tensor], scales: list[int]) -> list[Tensor]:
    """Every image's tokens at its scale."""
    out, newline = [], getattr(model.model, "image_newline", None)
    for i, (tiles, scale) in enumerate(zip(pixels(model, inputs), scales, strict=True)):
        projected, _ = encoded(model, tiles)
        side, small = math.isqrt(projected.shape[1]), math.isqrt(scale)
        k = side // small
        pooled = projected.view(len(tiles), small, k, small, k, -1).mean((2, 4)).flatten(1, 2)
        size = inputs["image_sizes"][i] if "image_sizes" in inputs else None
        out.append(packed(model, pooled, size, newline, k))
    return out


def globalcom2(
    model: Any,
    inputs: dict[str, Tensor],
    retention: float,
    tau: float = 10.0,
    crops: list[tuple[int, int]] | None = None,
) -> list[Tensor]:
    """Every image's kept tokens, in their own order. ``crops``: (rows, columns) of InternVL's images."""
    out, newline = [], getattr(model.model, "image_newline", None)
    for i, tiles in enumerate(pixels(model, inputs)):
        projected, score = encoded(model, tiles)
        size = inputs["image_sizes"][i] if "image_sizes" in inputs else None
        tokens, n = packed(model, projected, size, newline), score.shape[1]
        if len(tiles) == 1:
            out.append(tokens[sorted(best(dict(enumerate(score[0].tolist())), int(n * retention)))])
            continue
        if crops is not None:
            patches, thumbnail, first = in_tiles(score, crops[i]), score[-1], n * (len(tiles) - 1)
            shape, cut = crops[i], (crops[i][0] * math.isqrt(n), crops[i][1] * math.isqrt(n))
        else:
            assert size is not None
            patches, shape, cut = on_canvas(model, score, size)
            thumbnail, first = score[0], 0
        kept = [first + t for t in best(dict(enumerate(thumbnail.tolist())), int(n * retention))]
        kept += of_crops(patches, thumbnail, shape, cut, retention, tau)
        kept += [t for t in range(n, len(tokens)) if crops is None and t not in {p.token for p in patches}]
        out.append(tokens[sorted(kept)])
    return out


class Patch(NamedTuple):
    """A token of a crop: its index, the crop's number, its place on the map of all crops, its own score."""

    token: int
    crop: int
    place: int
    score: float


def in_tiles(score: Tensor, crops: tuple[int, int]) -> list[Patch]:
    """Tokens of crops that come tile by tile (the thumbnail behind them)."""
    n, columns = score.shape[1], crops[1]
    side = math.isqrt(n)
    out = []
    for j in range(len(score) - 1):
        for t in range(n):
            y, x = j // columns * side + t // side, j % columns * side + t % side
            out.append(Patch(j * n + t, j, y * columns * side + x, float(score[j, t])))
    return out


def on_canvas(model: Any, score: Tensor, size: Tensor) -> tuple[list[Patch], tuple[int, int], tuple[int, int]]:
    """Tokens of AnyRes crops: scores and coordinates go through transformers' packing as if they were features."""
    n, config = score.shape[1], model.config
    side = math.isqrt(n)
    pins, edge = config.image_grid_pinpoints, config.vision_config.image_size
    rows, columns = get_anyres_image_grid_shape(size.tolist(), pins, edge)
    crop = torch.arange(rows * columns)[:, None].expand(-1, n)
    cell = torch.arange(n)[None].expand(rows * columns, -1)
    y, x = crop // columns * side + cell // side, crop % columns * side + cell % side
    maps = torch.cat([torch.zeros(1, n, 3), torch.stack([score[1:], y, x], -1).float()])
    body = packed(model, maps, size, torch.full((3,), -99.0))[n:].tolist()
    where = [t for t in range(len(body)) if body[t][1] > -99]
    patches = [
        Patch(n + t, round(body[t][1]) // side * columns + round(body[t][2]) // side, p, body[t][0])
        for p, t in enumerate(where)
    ]
    lines = len(body) - len(where)
    return patches, (rows, columns), (lines, len(where) // max(lines, 1))


def best(score: dict[int, float], count: int) -> list[int]:
    return sorted(score, key=lambda t: (-score[t], t))[:count]


def of_crops(
    patches: list[Patch], thumbnail: Tensor, shape: tuple[int, int], cut: tuple[int, int], retention: float, tau: float
) -> list[int]:
    """The tokens that each crop keeps."""
    if not patches:
        return []
    (rows, columns), n = shape, len(thumbnail)
    side, count, kept = math.isqrt(n), rows * columns, []
    wide = interpolate(thumbnail.view(1, 1, side, side), cut, mode="bilinear").flatten().tolist()
    sums = [0.0] * count
    for t in range(n):
        i, j = min(t // side // max(side // rows, 1), rows - 1), min(t % side // max(side // columns, 1), columns - 1)
        sums[i * columns + j] += float(thumbnail[t])
    powers = [math.exp((s - max(sums)) / tau) for s in sums]
    weights = [p / (sum(powers) + 1e-8) for p in powers]
    for j in range(count):
        mine = [p for p in patches if p.crop == j]
        ratio = min(retention * (1 + weights[j] - sum(weights) / count), 1.0)
        own, seen = math.sqrt(sum(p.score**2 for p in mine)), math.sqrt(sum(wide[p.place] ** 2 for p in mine))
        both = {p.token: p.score / own + wide[p.place] / seen for p in mine}
        kept += best(both, int(len(mine) * ratio))
    return kept


def row(model: Any, inputs: dict[str, Tensor], images: list[Tensor]) -> oracle.Row:
    """The prompt of a batch-1 input with these tokens [m, D] in place of each image's."""
    ids, table, queue = inputs["input_ids"][0].tolist(), model.get_input_embeddings().weight, list(images)
    lengths, parts, vision, at = tiny.lengths(model, inputs) if images else [], [], [], 0
    while at < len(ids):
        if ids[at] == tiny.IMAGE_ID:
            tokens, gone = queue.pop(0), lengths.pop(0)
            while model.config.model_type == "internvl" and at + gone < len(ids) and ids[at + gone] == tiny.IMAGE_ID:
                gone += lengths.pop(0)  # transformers counts InternVL's tiles
            parts.append(tokens)
            vision += [True] * len(tokens)
            at += gone
        else:
            parts.append(table[ids[at], None])
            vision.append(False)
            at += 1
    assert not queue
    return oracle.Row(torch.cat(parts), torch.tensor(vision))
