"""LLaVA-NeXT (1.6) as transformers has it: a thumbnail, AnyRes crops on an unpadded canvas, a newline token per row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from vtr.integrations.llava import check_patches, tile_layout

from vtr.engine.adapters import Adapter
from vtr.image import Layout


@lru_cache(maxsize=1024)
def anyres_layout(size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...], tile_pixels: int, side: int) -> Layout:
    """The tokens of one image of ``size`` (height, width) in pixels, as ``pack_image_features`` orders them.

    The thumbnail's patches (``side`` rows and columns), then the canvas of all crops row by row, cut back to the
    picture's aspect ratio, each canvas row followed by one newline token.
    """
    rows, columns = get_anyres_image_grid_shape(size, [list(p) for p in pinpoints], tile_pixels)
    canvas = canvas_of(rows, columns, side)
    body = unpad_image(canvas, size)
    made = with_newlines(body, canvas, (rows, columns), side)
    return replace(
        made, window=window_of(body, canvas), shrunk=lambda k: anyres_layout(size, pinpoints, tile_pixels, side // k)
    )


def window_of(body: torch.Tensor, canvas: torch.Tensor) -> tuple[int, int, int, int]:
    """(top, left, height, width) of what ``unpad_image`` left of a canvas: it cuts as much on either side."""
    (height, width), (whole_height, whole_width) = body.shape[1:], canvas.shape[1:]
    return (whole_height - height) // 2, (whole_width - width) // 2, height, width


def canvas_of(rows: int, columns: int, side: int) -> torch.Tensor:
    """int64 [3, rows · side, columns · side]: tile, y and x of every token of a canvas of crops."""
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    return torch.stack([1 + (y // side) * columns + x // side, y % side, x % side])


def with_newlines(body: torch.Tensor, canvas: torch.Tensor, crops: tuple[int, int], side: int) -> Layout:
    """A thumbnail, then ``body`` ([3, height, width], what is left of ``canvas``), a newline token behind each row."""
    # a newline token stands one past the last patch of its row; of a sliver no patch may be left, its newlines are
    one = torch.tensor([0, 0, 1]).view(3, 1, 1)
    end = (body[:, :, -1:] if body.shape[2] else canvas[:, :, :1] - one) + one
    tile, y, x = torch.cat([body, end], 2).flatten(1)
    newline = torch.cat([torch.zeros_like(body[0]), torch.ones_like(end[0])], 1).flatten()
    thumbnail = tile_layout(side, side)
    return Layout(
        torch.cat([thumbnail.tile, tile]),
        torch.cat([thumbnail.y, y]),
        torch.cat([thumbnail.x, x]),
        torch.cat([thumbnail.newline, newline]),
        (side, side),
        crops,
    )


class LlavaNext(Adapter):
    """``LlavaNextForConditionalGeneration``."""

    family = "LLaVA-NeXT"
    classes = ("LlavaNextForConditionalGeneration",)

    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """Thumbnail and crops of every image, from ``image_sizes``.

        Raises:
            ValueError: pixel_values without image_sizes.
        """
        if inputs.get("pixel_values") is None:
            return {}
        sizes = inputs.get("image_sizes")
        if sizes is None:
            raise ValueError("LLaVA-NeXT needs image_sizes beside pixel_values: pass everything the processor returned")
        config: Any = model.config
        check_patches(self.tower(model), config, inputs)
        pinpoints = tuple((int(h), int(w)) for h, w in config.image_grid_pinpoints)
        sizes = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        layouts = [anyres_layout((int(h), int(w)), pinpoints, side, side // patch) for h, w in sizes]
        return {config.image_token_id: layouts}
