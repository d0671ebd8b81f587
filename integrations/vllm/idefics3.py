"""vLLM's own Idefics3 and SmolVLM, with policies. Registered under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from vllm.model_executor.models import idefics3, smolvlm
from vllm.multimodal import MULTIMODAL_REGISTRY
from vtr.integrations.idefics3 import Idefics3
from vtr.integrations.vllm import layouts
from vtr.integrations.vllm.processor import KEY, Reduced
from vtr.integrations.vllm.whole import Whole

from vtr.image import Layout


class Idefics3Processor(Reduced, idefics3.Idefics3MultiModalProcessor):
    """Frontend of both. A picture is one image for a request's policies, but each of its tiles is reduced by itself."""

    layout_of = staticmethod(layouts.idefics3)
    instead = "vLLM takes none for this model: send the picture"

    def _check(self, config: Any, spec: str) -> None:
        layouts.check_family(Idefics3(), spec)

    def _parts(self, items: Any, i: int, kwargs: Mapping[str, object]) -> int:
        size, stock = items.get_image_size(i), {name: value for name, value in kwargs.items() if name != KEY}
        return self.info.get_num_patches(
            image_width=size.width,
            image_height=size.height,
            processor=self.info.get_hf_processor(**stock),
            mm_kwargs=stock,
        )


class _Tiled(Whole):
    check_default = staticmethod(partial(layouts.check_family, Idefics3()))

    def image_layouts(self, kwargs: dict[str, Any], count: int) -> tuple[list[Layout], list[int]]:
        tiles = [int(n) for n in torch.as_tensor(kwargs["num_patches"]).flatten().tolist()]
        return [layouts.idefics3(self.config, (0, 0), n) for n in tiles], tiles  # type: ignore[attr-defined]


@MULTIMODAL_REGISTRY.register_processor(
    Idefics3Processor, info=idefics3.Idefics3ProcessingInfo, dummy_inputs=idefics3.Idefics3DummyInputsBuilder
)
class Idefics3ForConditionalGeneration(_Tiled, idefics3.Idefics3ForConditionalGeneration):
    """Idefics3 with policies."""


@MULTIMODAL_REGISTRY.register_processor(
    Idefics3Processor, info=smolvlm.SmolVLMProcessingInfo, dummy_inputs=smolvlm.SmolVLMDummyInputsBuilder
)
class SmolVLMForConditionalGeneration(_Tiled, smolvlm.SmolVLMForConditionalGeneration):
    """SmolVLM with policies; vLLM serves no videos of it."""
