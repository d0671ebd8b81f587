"""vLLM's own Qwen2-VL, Qwen2.5-VL and Qwen3-VL, with policies. Registered under the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vtr.integrations.vllm import layouts, positions
from vtr.integrations.vllm.processor import KEY, Reduced
from vtr.integrations.vllm.specs import made_of, unpacked
from vtr.integrations.vllm.whole import Whole

from vtr.engine.compression import Answered
from vtr.image import Layout


class QwenProcessor(Reduced):
    """Frontend of all three. The layout follows from what a picture is resized to; videos are left as they are."""

    layout_of = staticmethod(layouts.qwen_vl)
    instead = "this model's must be as many as their grid has, so policies cannot have reduced them: send the picture"

    def _layout(self, items: Any, i: int, kwargs: Mapping[str, object]) -> Layout:
        size, stock = items.get_image_size(i), {name: value for name, value in kwargs.items() if name != KEY}
        processor = self.info.get_image_processor(**stock)  # type: ignore[attr-defined]
        resized, _ = self.info._get_vision_info(  # type: ignore[attr-defined]
            image_width=size.width, image_height=size.height, num_frames=1, image_processor=processor, mm_kwargs=stock
        )
        config = self.info.get_hf_config()  # type: ignore[attr-defined]
        return layouts.qwen_vl(config, (resized.height, resized.width), 1)

    def _left(self, spec: str, layout: Layout) -> int:
        return positions.count_of(spec, layout)


class Qwen(Whole):
    """The worker's part: M-RoPE as vtr on transformers has it.

    A token that stays keeps its three positions, one that is made of others has their mean, and nothing behind an image
    moves. DeepStack's features are further channels of a token here, so they are chosen and averaged along with it.
    """

    check_default = staticmethod(positions.check)

    def image_layouts(self, kwargs: dict[str, Any], count: int) -> tuple[list[Layout], list[int]]:
        return [self._of_grid(grid) for grid in torch.as_tensor(kwargs["image_grid_thw"]).tolist()], [1] * count

    def expected(self, spec: str, layout: Layout) -> Callable[[Answered], bool]:
        return partial(positions.as_told, spec, layout)

    def _of_grid(self, grid: Sequence[int]) -> Layout:
        side = self.config.vision_config.patch_size  # type: ignore[attr-defined]
        return layouts.qwen_vl(self.config, (grid[1] * side, grid[2] * side), 1)  # type: ignore[attr-defined]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """int64 [3, l] of a request's tokens, and what is added to a place behind them."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        found = [self._cut(feature) for feature in features]
        cuts = [cut for cut in found if cut is not None]
        if not cuts:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        tokens, begins = positions.lengthened(input_tokens, cuts, self.config.image_token_id)  # type: ignore[attr-defined]
        whole, delta = super().get_mrope_input_positions(tokens, self._moved(features, found))  # type: ignore[misc]
        return positions.shortened(whole, cuts, begins), delta + len(tokens) - len(input_tokens)

    def _cut(self, feature: Any) -> positions.Cut | None:
        """What is to know of an image under a policy; None: it is none."""
        if feature.modality != "image" or KEY not in (feature.data or {}):
            return None
        spec, count = unpacked(bytes(feature.data[KEY].data.tolist()))
        layout = self._of_grid(feature.data["image_grid_thw"].data.tolist())
        if made_of(spec) is None:
            return None
        return positions.Cut(feature.mm_position.offset, count, layout, spec)

    @staticmethod
    def _moved(features: Sequence[Any], cuts: Sequence[positions.Cut | None]) -> list[Any]:
        """The features where they were before the prompt became shorter."""
        out, gone = [], 0
        for feature, cut in zip(features, cuts, strict=True):
            place = feature.mm_position
            out.append(replace(feature, mm_position=replace(place, offset=place.offset + gone)))
            gone += 0 if cut is None else len(cut.layout) - cut.left
        return out


# -- Qwen2-VL ----------------------------------------------------------------------------------------------------------
class Qwen2VLProcessor(QwenProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    """Frontend of Qwen2-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=qwen2_vl.Qwen2VLProcessingInfo, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class Qwen2VLForConditionalGeneration(Qwen, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2-VL with policies."""


# -- Qwen2.5-VL --------------------------------------------------------------------------------------------------------
class Qwen25VLProcessor(QwenProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Frontend of Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor, info=qwen2_5_vl.Qwen2_5_VLProcessingInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class Qwen2_5_VLForConditionalGeneration(Qwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with policies."""


# -- Qwen3-VL ----------------------------------------------------------------------------------------------------------
class Qwen3VLProcessor(QwenProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Frontend of Qwen3-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=qwen3_vl.Qwen3VLProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class Qwen3VLForConditionalGeneration(Qwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL with policies."""
