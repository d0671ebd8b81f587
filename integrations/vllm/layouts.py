"""How the tokens of an image lie, from its size alone, as vLLM's own models line them up. Pure: no vLLM here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from vtr.integrations.internvl import tiles_layout
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout
from vtr.integrations.llava_onevision import anyres_max_layout
from vtr.integrations.vllm.specs import RequestError, made_of, promised

from vtr.engine.adapters import Adapter
from vtr.engine.compression import compressed
from vtr.image import Image, Layout
from vtr.parts import members

ANYRES_MAX = 9
"""Tiles that a canvas of LLaVA-OneVision has at most before it is scaled down; vLLM reads no other from the config."""


def _side(config: Any) -> tuple[int, int]:
    vision = config.vision_config
    return int(vision.image_size), int(vision.image_size) // int(vision.patch_size)


def _pinpoints(config: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(h), int(w)) for h, w in config.image_grid_pinpoints)


def llava(config: Any, size: tuple[int, int], tiles: int) -> Layout:
    """One tile, whatever the size."""
    side = _side(config)[1]
    return tile_layout(side, side)


def llava_next(config: Any, size: tuple[int, int], tiles: int) -> Layout:
    """Thumbnail, unpadded canvas, newline tokens."""
    return anyres_layout(size, _pinpoints(config), *_side(config))


def llava_onevision(config: Any, size: tuple[int, int], tiles: int) -> Layout:
    """The same, scaled down where the canvas is large; also where a request has several images."""
    return anyres_max_layout(size, _pinpoints(config), *_side(config), ANYRES_MAX)


def internvl(config: Any, size: tuple[int, int], tiles: int, crops: tuple[int, int] | None = None) -> Layout:
    """``tiles`` tiles, of several the last the thumbnail. crops: how they lie, which changes no count."""
    vision = config.vision_config
    height, width = (
        int(n // p * config.downsample_ratio) for n, p in zip(vision.image_size, vision.patch_size, strict=True)
    )
    return tiles_layout(tiles, (height, width), (0, 0) if tiles == 1 else crops or (1, tiles - 1))


def qwen_vl(config: Any, size: tuple[int, int], tiles: int) -> Layout:
    """One grid. size: what the picture is resized to."""
    side = int(config.vision_config.patch_size) * int(config.vision_config.spatial_merge_size)
    return tile_layout(size[0] // side, size[1] // side)


def idefics3(config: Any, size: tuple[int, int], tiles: int) -> Layout:
    """One tile: each of them is an image of its own."""
    side = _side(config)[1] // int(config.scale_factor)
    return tile_layout(side, side)


def check_family(adapter: Adapter, spec: str) -> None:
    """Raise RequestError if vtr does not run a policy on a family of transformers either."""
    for part in members(made_of(spec)):
        if why := adapter.why_not(part):
            raise RequestError(f"{part.spec} does not work on {adapter.family}: {why}")


def check_tower(config: Any, spec: str) -> None:
    """Raise RequestError if a policy wants CLS scores of a tower that vLLM does not build up to its last layer."""
    made, vision = made_of(spec), config.vision_config
    if made is None or "cls" not in made.wants or vision.model_type != "clip_vision_model":
        return
    layer, depth = config.vision_feature_layer, int(vision.num_hidden_layers)
    if not isinstance(layer, int) or (layer if layer >= 0 else depth + 1 + layer) < depth - 1:
        raise RequestError(
            f"{spec} reads the vision tower's last layer, but vLLM builds this one up to vision_feature_layer={layer}: "
            "use a policy without CLS scores, e.g. m3:tokens=36"
        )


def shortened(ids: Sequence[int], mark: int, each: int, left: int) -> list[int]:
    """The tokens that stand for a picture, of every ``each`` ones that are ``mark`` only the first ``left``."""
    cut, seen = [], -1
    for token in ids:
        seen += token == mark
        if token != mark or seen % each < left:
            cut.append(token)
    return cut


LayoutOf = Callable[..., Layout]
"""(config, (height, width) of the picture, tiles of it) → layout."""


def count_of(spec: str, layout: Layout) -> int:
    """How many embeddings an image of this layout will have, after a rehearsal.

    Raises:
        RequestError: the policy cannot be used on it, or does not give what it promises.
    """
    count = promised(spec, layout)
    if made_of(spec) is not None:
        check_count(spec, count, rehearsed(spec, layout))
    return count


def check_count(spec: str, count: int, given: int) -> None:
    """Raise RequestError unless a rehearsal gave as many tokens as the policy promises."""
    if given != count:
        raise RequestError(f"{spec} promises {count} embeddings of this image and gives {given}: the policy is broken")


@lru_cache(maxsize=4096)
def rehearsed(spec: str, layout: Layout) -> int:
    """How many embeddings a policy gives of an image of this layout whose features are all zero and scores drawn.

    A worker of vLLM that gives one embedding too few takes the whole engine with it; this is noticed here first.

    Raises:
        RequestError: the policy refuses the image.
    """
    made = made_of(spec)
    assert made is not None
    try:
        return len(compressed(made, stand_in(layout))[0])
    except Exception as error:  # whatever a policy raises on this image, it is the request's
        raise RequestError(f"{spec}: {error}") from error


def stand_in(layout: Layout, seed: int | None = None) -> Image:
    """An image of this layout for rehearsals. Features are drawn, without a seed all zero; scores are drawn."""
    n = layout.grid[0] * layout.grid[1]
    draw = torch.Generator().manual_seed(seed or 0)
    scores = torch.rand(layout.tiles, n, generator=draw)
    width = 1 if seed is None else 8
    tokens, tiles = torch.zeros(len(layout), width), torch.zeros(layout.tiles, n, width)
    if seed is not None:
        tokens, tiles = tokens.normal_(generator=draw), tiles.normal_(generator=draw)
    return Image(tokens, layout, 0, 1, tiles, torch.zeros(width), lambda: scores)
