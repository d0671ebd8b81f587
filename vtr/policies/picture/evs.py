"""EVS, efficient video sampling (arXiv 2510.14624): of a video those patches stay that differ from the frame before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from vtr.image import Layout
from vtr.keep import Keep, top
from vtr.policies.picture._frames import Framewise
from vtr.settings import register_policy

FIRST = 255.0
"""The change of the first frame's patches: above every other, so that all of them stay."""


def changes(video: torch.Tensor) -> torch.Tensor:
    """float32 [frames, n]: one minus the cosine of each patch and the one at its place in the frame before.

    Args:
        video: [frames, n, hidden_size].
    """
    states = video.float()
    change = 1 - cosine_similarity(states[1:], states[:-1], dim=-1)
    return torch.cat([torch.full_like(states[:1, :, 0], FIRST), change])


@register_policy("evs")
@dataclass
class EVS(Framewise):
    """Keep of a video the patches that change most from one frame to the next, and its first frame whole.

    EVS (NVIDIA, arXiv 2510.14624), as vLLM and SGLang run it for Qwen2.5-VL and Nemotron: one budget over the whole
    video, so that a still film keeps little and a cut keeps much. Their ``--video-pruning-rate 0.7`` is ``keep=0.3``.
    How many stay follows from sizes. Positions stay as they were where the model has M-RoPE, and close up elsewhere.

    Args:
        keep: of a video's patches, how much stays: a ratio in (0, 1]. Never fewer than one frame has.
        frames: see :class:`~vtr.policies.picture._frames.Framewise`.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.3

    def count(self, frames: int, n: int) -> int:
        """How many patches of so many frames of n each stay: ``max(n, int(frames · n · (1 − rate)))``."""
        return max(n, int(frames * n * self.share))

    def choose(self, video: torch.Tensor) -> list[torch.Tensor]:
        frames, n = video.shape[:2]
        kept = top(changes(video).flatten(), self.count(frames, n)).cpu()
        return [kept[kept // n == frame] % n for frame in range(frames)]

    def kept_of(self, layout: Layout) -> int:
        """How many tokens of a picture, or of a video that is one image, stay.

        Raises:
            ValueError: the image is one frame of a video; how many of it stay depends on the others.
        """
        if layout.first_frame:
            raise ValueError(f"how many tokens {self.spec} leaves of one frame depends on the others of its video")
        if layout.first_frame is None:
            return len(layout)
        newlines = int(layout.newline.sum())
        return self.count(layout.tiles, (len(layout) - newlines) // layout.tiles) + newlines
