"""What policies share that see all frames of a video at once, whatever the model makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vtr.base import Policy
from vtr.image import Image, Layout, Pooled, frames_of
from vtr.keep import Keep, check_keep

Part = tuple[int, torch.Tensor]
"""Of a frame: which image of the row it lies in, and the tokens there that show it."""


@dataclass
class Framewise(Policy):
    """Base of policies that thin a video's frames together. Newline tokens and pictures stay as they are.

    A method is a subclass with a :meth:`choose`. LLaVA-OneVision and Qwen2-VL make one image of a video, whose tiles
    are the frames; Qwen3-VL, InternVL and SmolVLM an image of each frame. Here they are the same.

    Args:
        keep: of a video's patches, how much stays: a ratio.
        frames: "videos": what the model was given as a video (for InternVL and SmolVLM: images of one tile that follow
            each other closely). "images": all images of a request are the frames of one video. A list: these images
            are, in this order, counted from 0.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.25
    frames: Literal["videos", "images"] | list[int] = "videos"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.keep, int) or self.keep == 0:
            raise ValueError(f"keep={self.keep}: of a video a ratio stays, above 0 and up to 1.0, e.g. keep=0.25")
        listed = isinstance(self.frames, list) and all(type(i) is int and i >= 0 for i in self.frames) and self.frames
        if self.frames not in ("videos", "images") and not (listed and len(set(self.frames)) == len(self.frames)):
            raise ValueError(
                f"frames={self.frames!r}: choose 'videos', 'images' or a list of different images, e.g. frames=[0,1,2]"
            )

    @property
    def share(self) -> float:
        """The keep as official codes have it: one minus the share that goes."""
        return 1 - round(1 - self.keep, 12)

    def choose(self, video: torch.Tensor) -> list[torch.Tensor]:
        """The patches of each frame that stay, int64 on the CPU, in the order in which they are to stand.

        Args:
            video: [frames, n, hidden_size], the patches of a video as they would enter the text model.
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose()")

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        raise NotImplementedError(f"{cls.name} thins videos, and budgets are set for pictures: give its keep itself")

    def compress(self, image: Image) -> torch.Tensor | Pooled | None:
        """Of one image by itself: a video, or None (all tokens) for a picture."""
        return self.compress_row([image])[0]

    def compress_row(self, images: Sequence[Image]) -> list[torch.Tensor | Pooled | None]:
        """An answer for each image: token indices; None where all stay.

        Raises:
            ValueError: frames of one video have different sizes, or ``frames`` names an image that is not there.
        """
        chosen: list[list[torch.Tensor]] = [[] for _ in images]
        for video in self.videos([image.layout for image in images]):
            if len({len(at) for _, at in video}) > 1:
                raise ValueError(
                    f"{self.spec} compares frames place by place, and these have different numbers of tokens: "
                    f"{sorted({len(at) for _, at in video})}; give frames of one size"
                )
            parts = [images[i].features.index_select(0, at.to(images[i].features.device)) for i, at in video]
            for (i, at), kept in zip(video, self.choose(torch.stack(parts).detach()), strict=True):
                chosen[i].append(at[kept])
        return [self._answer(image, some) if some else None for image, some in zip(images, chosen, strict=True)]

    def _answer(self, image: Image, chosen: list[torch.Tensor]) -> torch.Tensor | Pooled:
        newlines = image.layout.newline.nonzero()[:, 0]
        return torch.cat([*chosen, newlines]).sort().values

    def videos(self, layouts: Sequence[Layout]) -> list[list[Part]]:
        """The videos of a row: of each its frames, in order."""
        if self.frames == "videos":
            films: list[list[Part]] = []
            for i, layout in enumerate(layouts):
                if layout.first_frame is None:
                    continue
                if layout.first_frame == 0 or not films:  # by_image may have given the first frame to another
                    films.append([])
                films[-1] += [(i, at) for at in frames_of(layout)]
            if not films and len(layouts) > 1:
                warnings.warn(
                    f"{self.spec} thins videos, and this request has {len(layouts)} pictures, which stay whole. If "
                    "they are the frames of a video, say frames=images",
                    stacklevel=2,
                )
            return films
        mine = list(range(len(layouts))) if self.frames == "images" else self.frames
        if max(mine, default=0) >= len(layouts):
            raise ValueError(f"frames={self.frames}: this request has {len(layouts)} images, counted from 0")
        return [[(i, at) for i in mine for at in frames_of(layouts[i])]]
