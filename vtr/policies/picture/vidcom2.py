"""VidCom² (arXiv 2505.14454): frames that differ from the others get more of a video's budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from vtr.keep import Keep
from vtr.policies.picture._frames import Framewise
from vtr.settings import register_policy

BANDWIDTHS = tuple(2.0**k for k in range(-3, 2))
TEMPERATURE = 0.01


def likeness(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [frames, n] each: how much every patch is like the whole video, and like its own frame (section 3.2).

    A sum of Gaussian kernels around the mean, over the half of the channels that vary least.

    Args:
        video: float32 [frames, n, hidden_size].
    """
    variance = video.flatten(0, 1).var(0, unbiased=False)
    channels = variance.argsort(stable=True)[: video.shape[-1] // 2]
    patches = normalize(video[..., channels], dim=-1)
    means = patches.mean((0, 1), keepdim=True), patches.mean(1, keepdim=True)
    squares = [(patches - mean).square().sum(-1) for mean in means]
    of_video, of_frame = (sum(torch.exp(-far / (2 * width)) for width in BANDWIDTHS) for far in squares)
    return of_video, of_frame  # type: ignore[return-value]


def shares(of_video: torch.Tensor, keep: float) -> torch.Tensor:
    """float32 [frames]: how much of each frame stays; more where a frame is unlike the video (section 3.3)."""
    unlike = -of_video.mean(1)
    weights = ((unlike - unlike.max()) / TEMPERATURE).softmax(0)
    return (keep * (1 + weights - weights.mean())).clamp(max=1.0)


@register_policy("vidcom2")
@dataclass
class VidCom2(Framewise):
    """Keep of every frame of a video the patches least like it and the whole video; of unusual frames keep more.

    VidCom² (Liu et al., EMNLP 2025, arXiv 2505.14454). Every frame keeps at least one patch. How many stay in all is
    about the ratio; it depends on what the video shows. Where lines of a frame end in newline tokens, these stay at
    their places (the published code moves them behind the frame's last patch).

    Args:
        keep: of a video's patches, how much stays: a ratio in (0, 1].
        frames: see :class:`~vtr.policies.picture._frames.Framewise`.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.25

    def choose(self, video: torch.Tensor) -> list[torch.Tensor]:
        of_video, of_frame = likeness(video.float())
        counts = (shares(of_video, self.keep) * video.shape[1]).round().clamp(min=1).long().cpu()
        order = (of_video + of_frame).argsort(dim=1, stable=True).cpu()
        return [kept[:count].sort().values for kept, count in zip(order, counts.tolist(), strict=True)]
