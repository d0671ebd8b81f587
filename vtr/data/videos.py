"""Videos from anywhere as frames: a folder of pictures, an animated GIF, WebP or PNG, or a film that PyAV reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtr.data.pictures import BadPictureError, upright

if TYPE_CHECKING:
    from PIL import Image

FRAMES = 8
"""Frames that are taken of a video unless a caller says how many."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ANIMATED = (".gif", ".webp", ".png", ".apng")


@dataclass(frozen=True)
class Video:
    """Frames of a video, in order.

    Attributes:
        frames: PIL pictures in RGB, all of one size.
        times: at which second each was taken; None where nobody knows (a folder of pictures).
        indices: which of the video's frames they are. total: how many it has.
    """

    frames: list[Image.Image]
    times: list[float] | None
    indices: list[int]
    total: int

    @property
    def fps(self) -> float | None:
        """Frames a second of the whole video, as far as it can be told from the times."""
        if self.times is None or len(self.times) < 2 or self.times[-1] <= self.times[0]:
            return None
        return (self.indices[-1] - self.indices[0]) / (self.times[-1] - self.times[0])


def spread(total: int, count: int) -> list[int]:
    """Which ``count`` of ``total`` frames are taken, evenly from the first on, as transformers' processors do; all of
    them where there are no more."""
    return list(range(total)) if count >= total else [int(i * total / count) for i in range(count)]


def read_video(source: str | Path | Sequence[Any], frames: int = FRAMES) -> Video:
    """Up to ``frames`` frames of a video.

    Args:
        source: a folder of pictures (in the order of their names), a file, or a list of PIL pictures or files.

    Raises:
        ValueError: ``frames`` below 1, no frames, frames of different sizes, or a file that is no video.
        ImportError: a film, and PyAV is not installed.
        OSError: no such file.
    """
    if frames < 1:
        raise ValueError(f"frames={frames}: of a video at least one frame is taken")
    if not isinstance(source, (str, Path)):
        return _of_pictures(list(source), frames, "the list")
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        return _of_pictures(found, frames, f"the folder {path}")
    if not path.exists():
        raise FileNotFoundError(f"no video at {path}: give a file or a folder of frames")
    return _animated(path, frames) if path.suffix.lower() in ANIMATED else _film(path, frames)


def _of_pictures(pictures: Sequence[Any], frames: int, where: str) -> Video:
    if not pictures:
        raise ValueError(f"{where} has no frames: pictures end in {', '.join(PICTURES)}")
    at = spread(len(pictures), frames)
    return _checked(Video([upright(pictures[i]) for i in at], None, at, len(pictures)))


def _animated(path: Path, frames: int) -> Video:
    """Of a GIF, WebP or PNG; one that does not move has one frame."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as film:
            total = getattr(film, "n_frames", 1)
            at, found, times, now = spread(total, frames), [], [], 0.0
            for i in range(total):
                film.seek(i)
                film.load()  # some formats know how long a frame stays only now
                if i in at:
                    found.append(film.convert("RGB"))
                    times.append(now / 1000)
                now += film.info.get("duration") or 100
    except (UnidentifiedImageError, SyntaxError, EOFError) as error:
        raise BadPictureError(f"{path} cannot be read as an animated picture: {error}") from error
    return _checked(Video(found, times, at, total))


def _film(path: Path, frames: int) -> Video:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{path.name} is a film, which PyAV reads: pip install av. Or give a folder of frames, or a GIF"
        ) from error
    try:
        with av.open(str(path)) as container:
            total = _length(container)
            at = spread(total, frames)
            container.seek(0)
            shown: Any = enumerate(container.decode(video=0))
            decoded = [(frame.time, frame.to_image()) for i, frame in shown if i in at]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is no video that PyAV can read: {error}") from error
    if not decoded:
        raise ValueError(f"{path} has no frames")
    known = all(time is not None for time, _ in decoded)
    times = [float(time) for time, _ in decoded] if known else None
    return _checked(Video([picture.convert("RGB") for _, picture in decoded], times, at[: len(decoded)], total))


def _length(container: Any) -> int:
    """How many frames the first video stream has; counted where the file does not say."""
    stream = container.streams.video[0]
    if stream.frames:
        return int(stream.frames)
    container.seek(0)
    return sum(1 for _ in container.decode(video=0))


def _checked(video: Video) -> Video:
    if len(sizes := {frame.size for frame in video.frames}) > 1:
        raise ValueError(f"frames of one video have one size, these have {sorted(sizes)}")
    return video
