"""The baseline that touches no model: a smaller picture goes into the processor.

What it does to tokens depends on the processor. AnyRes processors (LLaVA-NeXT, LLaVA-OneVision, InternVL) lay fewer
crops over a smaller picture, so tokens fall, in whole tiles and never below the thumbnail and one crop: the pocket
model's 192 × 192 picture has 744 tokens, its half 300, and a quarter of it 300 as well. Processors with one fixed size
(LLaVA-1.5) scale every picture to that size: the tokens stay as many and only detail is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

NAME = "downsample"


@dataclass(frozen=True)
class Downsample:
    """Scales a picture's sides before the processor sees it.

    Args:
        scale: of width and height, in (0, 1]: 0.5 leaves a quarter of the pixels.

    Raises:
        TypeError, ValueError: not a number in (0, 1].
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise TypeError(f"scale must be a number in (0, 1], got {self.scale!r}")
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale={self.scale}: it scales width and height and lies in (0, 1]")

    @property
    def spec(self) -> str:
        """The spec string of this baseline."""
        return f"{NAME}:scale={float(self.scale)}"

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The smaller picture (Lanczos), at least one pixel wide and high."""
        from PIL import Image

        width, height = (max(1, round(side * self.scale)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
