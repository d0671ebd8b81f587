"""The baseline that touches no model: a smaller picture goes into the processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtr.checks import check_part
from vtr.inputs import InputPolicy, Size
from vtr.settings import register_policy


@register_policy("downsample")
@dataclass
class Downsample(InputPolicy):
    """Scales a picture's sides, before the processor sees it.

    What that does to tokens depends on the processor. Those that lay crops by a picture's size (LLaVA-NeXT,
    LLaVA-OneVision) lay fewer, in whole tiles and never below the thumbnail and one crop; Qwen-VL's give fewer tokens.
    Those with one size (LLaVA-1.5), or that go by proportions (InternVL), give about as many: only detail is lost.

    Args:
        scale: of width and height, in (0, 1]: 0.5 leaves a quarter of the pixels.

    Raises:
        TypeError, ValueError: not a number in (0, 1].
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        check_part(self.scale, "scale", "it scales width and height")
        self.scale = float(self.scale)

    def size_for(self, size: Size, image_processor: Any, settings: Mapping[str, Any]) -> Size:
        """At least one pixel wide and high."""
        width, height = (max(1, round(side * self.scale)) for side in size)
        return width, height
