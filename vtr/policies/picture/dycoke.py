"""DyCoke's first part (arXiv 2411.15024): of every other frame only what the frame before does not show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from vtr.base import UnsupportedError
from vtr.checks import check_placement
from vtr.image import Image, Pooled
from vtr.keep import Keep
from vtr.policies.picture._frames import Framewise
from vtr.policies.picture._tiles import Placement
from vtr.settings import register_policy


@register_policy("dycoke")
@dataclass
class DyCoke(Framewise):
    """Keep the first of every four frames of a video whole, and of the others what differs from an earlier one.

    DyCoke (Tao et al., CVPR 2025, arXiv 2411.15024), the temporal part before the decoder. Frames 1 and 3 of each four
    are compared with the frame before them, frame 2 with frame 0, place by place; the least similar patches stay. Its
    second part, which reads other cached tokens at every decoded word, is not here.

    Args:
        keep: of each frame that is compared, how much stays: a ratio in (0, 1] (the paper's 1 − K).
        frames: see :class:`~vtr.policies.picture._frames.Framewise`.
        placement: "true" takes every frame, in order. "official" repeats the published code: patches stand most
            dissimilar first, a last odd frame is lost, the third frame of the last four stays whole, and fewer than
            five frames are refused.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.3
    placement: Placement = "true"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_placement(self.placement)

    def choose(self, video: torch.Tensor) -> list[torch.Tensor]:
        frames, n = video.shape[:2]
        official = self.placement == "official"
        if official and frames < 5:
            raise UnsupportedError(
                f"placement='official' is the published code, which fails on {frames} frames: give at least 5, or use "
                "placement='true'"
            )
        count, states = max(int(self.share * n), 1), video.float()
        out = [torch.arange(n)] * frames
        for i in range(1, frames):
            if i % 4 == 0 or (official and i % 2 == 0 and i + 2 >= frames):
                continue
            alike = cosine_similarity(states[i], states[i - 2 if i % 2 == 0 else i - 1], dim=-1)
            least = alike.argsort(stable=True)[:count].cpu()
            out[i] = least if official else least.sort().values
        if official and frames % 2:
            out[-1] = out[-1][:0]
        return out

    def _answer(self, image: Image, chosen: list[torch.Tensor]) -> torch.Tensor | Pooled:
        if self.placement != "official":
            return super()._answer(image, chosen)
        order = torch.cat([*chosen, image.layout.newline.nonzero()[:, 0]])
        return Pooled(image.features.index_select(0, order.to(image.features.device)), [[i] for i in order.tolist()])
