"""Pictures from anywhere, as one looks at them: turned upright, eight bits a channel, RGB."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""
SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose mode "I" is 16-bit gray, whatever values occur."""


class BadPictureError(ValueError):
    """A picture that cannot be read."""


def upright(source: str | Path | bytes | IO[bytes] | Image.Image) -> Image.Image:
    """The picture in RGB, turned as its EXIF orientation says.

    Transparency is dropped, as transformers' ``load_image`` does. Gray of more than eight bits keeps its range: 16-bit
    values are divided by 257; "I" and "F" pictures are taken to reach from 0 to 255 or to 65535 ("F": to 1 as well),
    whichever is the first that holds all values, and are stretched from their least to their largest value otherwise.

    Args:
        source: a file's path, its bytes, an open file, or a PIL picture. An RGB picture whose metadata say nothing of
            an orientation is given back as it is.

    Raises:
        BadPictureError: broken, cut short, too large (Pillow's limit), no regular file (a pipe would wait forever), no
            pixels.
        OSError: a file that is not there or may not be read.
        TypeError: none of these.
    """
    from PIL import Image

    with _opened(source) as image:
        image.load()  # TIFF is turned by this, and some formats have their metadata behind the pixels
        if 0 in image.size:
            raise BadPictureError(f"a picture of {image.width} × {image.height} pixels")
        turn = _turn(image)
        if image is source and image.mode == "RGB" and turn is None:
            return image
        rgb = (_eight_bits(image) if _is_deep(image) else image).convert("RGB")
        rgb.info = {}  # nobody shall turn it again
        return rgb if turn is None else rgb.transpose(Image.Transpose(turn))


def check(source: str | Path | bytes | IO[bytes] | Image.Image) -> None:
    """Decode a picture as cheaply as it goes (JPEG at an eighth of its size). Raises as :func:`upright`."""
    with _opened(source) as image:
        if image is not source:
            image.draft("RGB", (1, 1))
        image.load()


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """The picture, not decoded yet. Of the many kinds of errors that Pillow has for broken files, one is made."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(source, (str, Path, bytes, Image.Image)) and not hasattr(source, "read"):
        raise TypeError(f"a picture is a file, its bytes or a PIL image, got {type(source).__name__}")
    name = str(source) if isinstance(source, (str, Path)) else "the picture"
    try:
        if isinstance(source, Image.Image):
            yield source
            return
        if isinstance(source, (str, Path)):
            if stat.S_ISDIR(mode := Path(source).stat().st_mode):
                raise BadPictureError(f"{name} is a folder, no regular file")
            if not stat.S_ISREG(mode):
                raise BadPictureError(f"{name} is no regular file")
            with open(source, "rb") as file, Image.open(file) as image:  # by its name Pillow misreads turned TIFFs
                yield image
            return
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except BadPictureError:
        raise
    except UnidentifiedImageError as error:
        told = "is not a picture Pillow can read (PNG, JPEG, WebP, …): cannot identify its format"
        raise BadPictureError(f"{name} {told}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # not there, or not for us
            raise
        raise BadPictureError(f"{name}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's kind and message, 200 characters at most; of files what is wrong, in words."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{type(error).__name__}: {error.strerror}: {str(error.filename)[:150]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _turn(image: Image.Image) -> int | None:
    """The ``Image.Transpose`` that makes a loaded picture upright; None where it is, or where nobody says."""
    from PIL.Image import Transpose

    if image.format == "TIFF":  # Pillow has turned it while loading; old versions leave the tag
        return None
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # metadata that cannot be read say nothing; the picture itself is whole
        return None
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    return turns.get(orientation) if isinstance(orientation, int) else None


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits or floats as mode "L"; see :func:`upright`."""
    from PIL import Image

    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        return Image.fromarray(((values.astype(np.int64) + 128) // 257).clip(0, 255).astype(np.uint8))
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    tops: list[float] = [1, 255, 65535] if image.mode == "F" else [255, 65535]
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        values, top = values - low, (high - low) or 1
    return Image.fromarray(np.rint(values * (255 / top)).clip(0, 255).astype(np.uint8))
