"""The baseline of videos that touches no model: fewer frames go into the processor."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vtr.checks import check_part
from vtr.data.videos import Video, spread

FRAMES = "frames"


@dataclass(frozen=True)
class Frames:
    """Takes frames of a video evenly, from the first on, before the processor sees it.

    They are numbered anew, as when a video is sampled more sparsely.

    Args:
        keep: the share of the frames, in (0, 1]; at least one is left.

    Raises:
        TypeError, ValueError: not a number in (0, 1].
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        check_part(self.keep, "keep", "it is the share of the frames that stay")

    @property
    def spec(self) -> str:
        """The spec string of this baseline."""
        return f"{FRAMES}:keep={float(self.keep)}"

    def __call__(self, video: Video) -> Video:
        """The video with fewer frames."""
        at = spread(len(video.frames), max(1, round(self.keep * len(video.frames))))
        times = None if video.times is None else [video.times[i] for i in at]
        return replace(video, frames=[video.frames[i] for i in at], times=times, indices=[video.indices[i] for i in at])
