"""How the tokens of an image lie, from its size alone, as vLLM's own models line them up. Pure: no vLLM here."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from vtr.integrations.internvl import tiles_layout
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout
from vtr.integrations.llava_onevision import anyres_max_layout
from vtr.integrations.vllm.specs import NONE, RequestError, made_of, promised

from vtr.engine.compression import compressed
from vtr.image import Image, Layout

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


LayoutOf = Callable[..., Layout]
"""(config, (height, width) of the picture, tiles of it) → layout."""


def count_of(spec: str, layout: Layout) -> int:
    """How many embeddings an image of this layout will have, after a rehearsal.

    Raises:
        RequestError: the policy cannot be used on it, or does not give what it promises.
    """
    count = promised(spec, layout)
    if spec != NONE and (given := rehearsed(spec, layout)) != count:
        raise RequestError(f"{spec} promises {count} embeddings of this image and gives {given}: the policy is broken")
    return count


@lru_cache(maxsize=4096)
def rehearsed(spec: str, layout: Layout) -> int:
    """How many embeddings a policy gives of an image of this layout whose features are all zero and scores drawn.

    A worker of vLLM that gives one embedding too few takes the whole engine with it; this is noticed here first.

    Raises:
        RequestError: the policy refuses the image.
    """
    made = made_of(spec)
    assert made is not None
    n = layout.grid[0] * layout.grid[1]
    scores = torch.rand(layout.tiles, n, generator=torch.Generator().manual_seed(0))
    image = Image(
        torch.zeros(len(layout), 1), layout, 0, 1, torch.zeros(layout.tiles, n, 1), torch.zeros(1), lambda: scores
    )
    try:
        return len(compressed(made, image)[0])
    except Exception as error:  # whatever a policy raises on this image, it is the request's
        raise RequestError(f"{spec}: {error}") from error
