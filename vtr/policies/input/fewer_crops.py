"""Relaxed aspect-ratio matching, BlueLM-V-3B (Lu et al., CVPR 2025, arXiv 2411.10640, section 3.2 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtr.base import UnsupportedError
from vtr.inputs import InputPolicy, Size, mapped
from vtr.policies.input._crops import crops_of
from vtr.settings import register_policy

WAYS_OUT = {
    "max_pixels": "it cuts no crops and gives a token per patch: make pictures smaller by its own max_pixels "
    "(processor.image_processor.max_pixels, or size={'longest_edge': …}), or use downsample:scale=0.5",
    "do_image_splitting": "it scales every picture up to its longest_edge before it cuts crops: give it a smaller "
    "size={'longest_edge': …}, or do_image_splitting=False",
}
"""An attribute that image processors of a kind have, and what to do there instead."""
FIXED = (
    "it scales every picture to one size, so there are no crops to save, and as many tokens whatever the picture: "
    "reduce them in the model, e.g. by m3:tokens=144"
)


def relaxed(size: Size, canvases: Sequence[Size], alpha: float) -> Size | None:
    """Algorithm 1: the canvas that is taken for a picture.

    Canvases are tried from the largest area to the smallest. One takes the place of the one before if the picture has
    more than ``alpha`` more pixels on it, or less than ``alpha`` fewer and less of it stays empty.

    Args:
        size, canvases: (width, height) in pixels.

    Returns:
        None for a sliver of which no canvas shows a pixel.
    """
    best, most, least_wasted = None, 0, float("inf")
    for width, height in sorted(canvases, key=lambda canvas: (-canvas[0] * canvas[1], -canvas[0])):
        scale = min(width / size[0], height / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        wasted = width * height - effective
        if effective - most > alpha * most or (most - effective < alpha * most and wasted < least_wasted):
            best, most, least_wasted = (width, height), effective, wasted
    return best


@register_policy("fewer_crops")
@dataclass
class FewerCrops(InputPolicy):
    """Fewer crops where more would mostly enlarge the picture or stay empty: tower and decoder both get fewer tiles.

    BlueLM-V-3B's relaxed aspect-ratio matching says which canvas would do. Where that has fewer crops than the
    processor would lay, the picture is scaled so that the unchanged processor (and the model, which counts after it)
    lays them; else it is left as it is. The canvases are the processor's own. InternVL's goes by proportions and
    stretches pictures, so nothing of a canvas stays empty there: the rule is a heuristic for it.

    Lu et al., CVPR 2025, arXiv 2411.10640. The paper trains its models with it; here it is for models as they are. Rows
    of several pictures, which LLaVA-OneVision cuts no crops of, stay as they are.

    Args:
        alpha: how many of a picture's pixels a smaller canvas may lose, as a share, in [0, 1).

    Raises:
        TypeError, ValueError: not a number in [0, 1).
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise TypeError(f"alpha must be a number in [0, 1), got {self.alpha!r}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha}: the share of pixels that a smaller canvas may lose lies in [0, 1)")
        self.alpha = float(self.alpha)

    def check_processor(self, image_processor: Any) -> None:
        """Raise UnsupportedError for an image processor that lays no crops by a picture's size."""
        if crops_of(image_processor, {}) is None:
            why = next((why for name, why in WAYS_OUT.items() if hasattr(image_processor, name)), FIXED)
            raise UnsupportedError(f"{self.spec!r} has nothing to do before {type(image_processor).__name__}: {why}")

    def size_for(self, size: Size, image_processor: Any, settings: Mapping[str, Any]) -> Size:
        crops = crops_of(image_processor, settings)
        assert crops is not None
        canvas = relaxed(size, crops.canvases, self.alpha)
        if canvas is None:
            return size
        fitted = crops.fit(size, canvas)
        return fitted if crops.count(fitted) < crops.count(size) else size

    def process(self, image_processor: Any, images: Any, settings: Mapping[str, Any]) -> Any:
        """As the base class; pictures that the processor cuts no crops of stay as they are."""
        if "batch_num_images" not in getattr(image_processor, "model_input_names", ()):
            return super().process(image_processor, images, settings)
        rows = images if isinstance(images, (list, tuple)) else [images]

        def scaled(one: Any) -> Any:
            return self.scaled(one, image_processor, settings)

        single = [not isinstance(row, (list, tuple)) or len(row) == 1 for row in rows]
        made = [mapped(scaled, row) if alone else row for row, alone in zip(rows, single, strict=True)]
        return image_processor(made, **settings)
