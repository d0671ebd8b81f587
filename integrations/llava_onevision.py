"""LLaVA-OneVision as transformers has it: AnyRes crops (anyres_max_9), single tiles where a row has several, videos."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image
from vtr.integrations.llava import check_patches, tile_layout
from vtr.integrations.llava_next import canvas_of, window_of, with_newlines

from vtr.engine.adapters import Adapter
from vtr.image import Layout, framed


@lru_cache(maxsize=1024)
def anyres_max_layout(
    size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...], tile_pixels: int, side: int, most: int
) -> Layout:
    """The tokens of one image of ``size`` (height, width) in pixels, as ``pack_image_features`` orders them.

    Like LLaVA-NeXT's, but a canvas of more than ``most`` tiles is scaled down: each of its tokens then stands where
    the centre of its cell lies.
    """
    rows, columns = get_anyres_image_grid_shape(size, [list(p) for p in pinpoints], tile_pixels)
    canvas = canvas_of(rows, columns, side)
    body = unpad_image(canvas, size)
    height, width = body.shape[1:]
    window, scaled = window_of(body, canvas), None
    ratio = math.sqrt(height * width / (most * side**2))
    if ratio > 1.1:
        scaled = max(int(height // ratio), 1), max(int(width // ratio), 1)
        down, across = _centres(height, scaled[0]), _centres(width, scaled[1])
        body = body[:, down][:, :, across]
    made = with_newlines(body, canvas, (rows, columns), side)
    return replace(
        made,
        window=window,
        scaled=scaled,
        shrunk=lambda k: anyres_max_layout(size, pinpoints, tile_pixels, side // k, most),
    )


def _centres(old: int, new: int) -> torch.Tensor:
    """int64 [new]: which of ``old`` cells lies under the centre of each of ``new``."""
    return ((torch.arange(new) + 0.5) * old / new).long()


@lru_cache(maxsize=64)
def frames_layout(frames: int, side: int) -> Layout:
    """A video: each frame a tile of its own (counted from 0), and one newline token at the end."""
    frame = tile_layout(side, side)
    tile = torch.arange(frames).repeat_interleave(len(frame))
    columns = [tile, frame.y.repeat(frames), frame.x.repeat(frames), frame.newline.repeat(frames)]
    end = (frames - 1, side - 1, side, 1)
    tile, y, x, newline = (torch.cat([c, torch.tensor([last])]) for c, last in zip(columns, end, strict=True))
    return Layout(tile, y, x, newline, (side, side), shrunk=lambda k: frames_layout(frames, side // k))


def _sizes(sizes: Any) -> list[tuple[int, int]]:
    rows = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
    return [(int(height), int(width)) for height, width in rows]


class LlavaOnevision(Adapter):
    """``LlavaOnevisionForConditionalGeneration``. A video is one image whose tiles are its frames."""

    family = "LLaVA-OneVision"
    classes = ("LlavaOnevisionForConditionalGeneration",)
    lacks = MappingProxyType({"cls_token": "it is about the vision tower's CLS token, and SigLIP has none"})

    def placeholders(self, model: nn.Module) -> tuple[int, ...]:
        config: Any = model.config
        return (int(config.image_token_id), int(config.video_token_id))

    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """Thumbnail and crops of every image that is alone in its row, one tile of others, frames of videos.

        Raises:
            ValueError: pixel_values without image_sizes.
        """
        config: Any = model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        found: dict[int, list[Layout]] = {}
        if any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos")):
            check_patches(self.tower(model), config, inputs)
        if inputs.get("pixel_values") is not None:
            if inputs.get("image_sizes") is None:
                raise ValueError(
                    "LLaVA-OneVision needs image_sizes beside pixel_values: pass everything the processor returned"
                )
            found[config.image_token_id] = self._images(config, inputs, side)
        if (videos := inputs.get("pixel_values_videos")) is not None:
            film = framed(frames_layout(videos.shape[1], math.ceil(side / 2)), 0)
            found[config.video_token_id] = [film] * len(videos)
        return found

    def _images(self, config: Any, inputs: Mapping[str, Any], side: int) -> list[Layout]:
        pinpoints = tuple((int(h), int(w)) for h, w in config.image_grid_pinpoints)
        most = int((inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix("anyres_max_"))
        sizes = _sizes(inputs["image_sizes"])
        alone: Sequence[bool] = [True] * len(sizes)
        if (counts := inputs.get("batch_num_images")) is not None:
            alone = [n == 1 for n in torch.as_tensor(counts).tolist() for _ in range(n)]
        tile = config.vision_config.image_size
        one = frames_layout(1, side)  # a tile and the newline token behind it
        return [
            anyres_max_layout(size, pinpoints, tile, side, most) if anyres else one
            for size, anyres in zip(sizes, alone, strict=True)
        ]
