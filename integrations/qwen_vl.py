"""Qwen2-VL, 2.5-VL and Qwen3-VL as transformers has them: a picture of any size is one grid of tokens, with M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from vtr.integrations.llava import tile_layout

from vtr.engine.adapters import Adapter
from vtr.image import Layout, framed


@lru_cache(maxsize=256)
def frames_layout(frames: int, height: int, width: int) -> Layout:
    """A video's frames (each already two of the film's) one behind the other, tiles counted from 0."""
    frame = tile_layout(height, width)
    return Layout(
        torch.arange(frames).repeat_interleave(len(frame)),
        frame.y.repeat(frames),
        frame.x.repeat(frames),
        frame.newline.repeat(frames),
        (height, width),
        shrunk=lambda k: frames_layout(frames, height // k, width // k),
    )


def patch_order(vision: Any, layout: Layout) -> torch.Tensor | None:
    """int64 [tokens]: where each token is in a tower that takes patches window by window; None: it has no windows.

    Args:
        vision: the tower's config.
    """
    if getattr(vision, "window_size", None) is None:
        return None
    side = vision.window_size // vision.spatial_merge_size // vision.patch_size
    height, width = layout.grid
    down, across = -(-height // side), -(-width // side)
    window = (layout.tile * down + layout.y // side) * across + layout.x // side
    return window.argsort(stable=True).argsort()


class Qwen25VL(Adapter):
    """``Qwen2_5_VLForConditionalGeneration`` and ``Qwen2VLForConditionalGeneration``.

    A picture is one tile; a video is one image whose tiles are its frames.

    Positions have three axes (time, row, column). A token that stays keeps its own; one that is made of others has the
    mean of theirs. So nothing behind an image moves, and decoding needs nothing.
    """

    family = "Qwen2-VL, Qwen2.5-VL"
    classes: tuple[str, ...] = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
    image_inputs = ("pixel_values", "image_grid_thw")
    lacks = MappingProxyType(
        {
            "projector": "it merges states in front of the projector, which here takes 2 × 2 patches at once (the "
            "tower's merger)",
            "cls_token": "it is about the vision tower's CLS token, and this tower has none",
        }
    )
    unsupported = MappingProxyType(
        {
            "autoscale": "pictures have grids of their own size, which share no scales to choose from; give each image "
            "of a request its own, e.g. m3:tokens=[64,16]"
        }
    )

    def placeholders(self, model: nn.Module) -> tuple[int, ...]:
        config: Any = model.config
        return (int(config.image_token_id), int(config.video_token_id))

    def tower(self, model: nn.Module) -> Any:
        return model.model.visual  # type: ignore[union-attr]

    def projector(self, model: nn.Module) -> Any:
        return model.model.visual.merger  # type: ignore[union-attr]

    def patch_order(self, model: nn.Module, layout: Layout) -> torch.Tensor | None:
        """Qwen2.5-VL's tower takes patches window by window."""
        return patch_order(model.config.vision_config, layout)  # type: ignore[union-attr]

    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """One grid per image or video, from ``image_grid_thw`` and ``video_grid_thw``.

        Raises:
            ValueError: pixels without their grid.
        """
        config: Any = model.config
        found: dict[int, list[Layout]] = {}
        for pixels, grids, placeholder in (
            ("pixel_values", "image_grid_thw", config.image_token_id),
            ("pixel_values_videos", "video_grid_thw", config.video_token_id),
        ):
            if inputs.get(pixels) is None:
                continue
            if inputs.get(grids) is None:
                raise ValueError(f"{self.family} needs {grids} beside {pixels}: pass everything the processor returned")
            side = config.vision_config.spatial_merge_size
            shapes = [(int(t), int(h) // side, int(w) // side) for t, h, w in torch.as_tensor(inputs[grids]).tolist()]
            if placeholder == config.video_token_id:
                found[int(placeholder)] = self.videos(shapes, inputs.get("second_per_grid_ts"))
            else:
                found[int(placeholder)] = [
                    tile_layout(h, w) if t == 1 else frames_layout(t, h, w) for t, h, w in shapes
                ]
        return found

    def videos(self, shapes: Sequence[tuple[int, int, int]], seconds: Any) -> list[Layout]:
        """Videos of so many frames (each two of the film's), rows and columns, in the order of their placeholders.

        Args:
            seconds: between two frames, for each video; None where the call does not say.
        """
        steps = [None] * len(shapes) if seconds is None else [float(step) for step in seconds]
        return [
            framed(frames_layout(*shape), 0, None if step is None else tuple(step * i for i in range(shape[0])))
            for shape, step in zip(shapes, steps, strict=True)
        ]


class Qwen3VL(Qwen25VL):
    """``Qwen3VLForConditionalGeneration``. A video is an image per frame, since a timestamp stands between frames.

    DeepStack adds features of earlier layers of the tower to the vision tokens behind the first decoder layers: to
    those that are still there, and their means to tokens made of several.
    """

    family = "Qwen3-VL"
    classes = ("Qwen3VLForConditionalGeneration",)

    def videos(self, shapes: Sequence[tuple[int, int, int]], seconds: Any) -> list[Layout]:
        return [framed(tile_layout(height, width), i) for frames, height, width in shapes for i in range(frames)]

    def layer_features(self, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        kwargs.pop("visual_pos_masks", None)
        return kwargs.pop("deepstack_visual_embeds", None) or []
