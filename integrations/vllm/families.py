"""vLLM's own LLaVA, LLaVA-NeXT, LLaVA-OneVision and InternVL, with policies. Registered under the same names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.models import interns1, llava, llava_next, llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY
from vtr.integrations.internvl import crops_of
from vtr.integrations.vllm import layouts
from vtr.integrations.vllm.processor import Reduced
from vtr.integrations.vllm.worker import Reducing

from vtr.image import Layout


def clip_layer(config: Any) -> nn.Module:
    """A layer of CLIP's tower as transformers has it (and CLS scores read it)."""
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    config._attn_implementation = config._attn_implementation or "sdpa"
    layer = CLIPEncoderLayer(config)
    del layer.mlp, layer.layer_norm2  # only norm, queries and keys are asked
    return layer


def internvl_layer(config: Any) -> nn.Module:
    """A layer of InternVL's tower as transformers has it."""
    from transformers.models.internvl.modeling_internvl import InternVLVisionLayer

    config._attn_implementation = config._attn_implementation or "sdpa"
    layer = InternVLVisionLayer(config)
    del layer.mlp, layer.layernorm_after
    return layer


def _sizes(kwargs: dict[str, Any]) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in kwargs["image_sizes"]]


# -- LLaVA-1.5 ---------------------------------------------------------------------------------------------------------
class LlavaProcessor(Reduced, llava.LlavaMultiModalProcessor):
    """Frontend of LLaVA-1.5."""

    layout_of = staticmethod(layouts.llava)


def _llava_processor(info: Any, dummy_inputs: Any, *, cache: Any = None) -> Any:
    if isinstance(info, llava.LlavaProcessingInfo):
        return LlavaProcessor(info, dummy_inputs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)  # Pixtral: as it is


class _Clip(Reducing):
    def __init_subclass__(cls) -> None:
        cls.layer_of = staticmethod(clip_layer)


@MULTIMODAL_REGISTRY.register_processor(
    _llava_processor, info=llava._build_llava_or_pixtral_hf_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class LlavaForConditionalGeneration(_Clip, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5 with policies."""

    def image_layouts(self, kwargs: dict[str, Any], count: int) -> tuple[list[Layout], list[int]]:
        return [layouts.llava(self.config, (0, 0), 1)] * count, [1] * count


# -- LLaVA-NeXT --------------------------------------------------------------------------------------------------------
class LlavaNextProcessor(Reduced, llava_next.LlavaNextMultiModalProcessor):
    """Frontend of LLaVA-NeXT."""

    layout_of = staticmethod(layouts.llava_next)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=llava_next.LlavaNextProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class LlavaNextForConditionalGeneration(_Clip, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with policies."""

    def image_layouts(self, kwargs: dict[str, Any], count: int) -> tuple[list[Layout], list[int]]:
        found = [layouts.llava_next(self.config, size, 0) for size in _sizes(kwargs)]
        return found, [len(pixels) for pixels in kwargs["pixel_values"]]


# -- LLaVA-OneVision ---------------------------------------------------------------------------------------------------
class LlavaOnevisionProcessor(Reduced, llava_onevision.LlavaOnevisionMultiModalProcessor):
    """Frontend of LLaVA-OneVision; videos are left as they are."""

    layout_of = staticmethod(layouts.llava_onevision)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor,
    info=llava_onevision.LlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevisionForConditionalGeneration(Reducing, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with policies (SigLIP towers have no CLS token: see :meth:`vtr.Image.cls_attention`)."""

    def image_layouts(self, kwargs: dict[str, Any], count: int) -> tuple[list[Layout], list[int]]:
        found = [layouts.llava_onevision(self.config, size, 0) for size in _sizes(kwargs)]
        return found, [len(pixels) for pixels in kwargs["pixel_values"]]


# -- InternVL ----------------------------------------------------------------------------------------------------------
class InternVLProcessor(Reduced, interns1.InternS1MultiModalProcessor):
    """Frontend of InternVL (the ``-hf`` checkpoints); videos are left as they are."""

    layout_of = staticmethod(layouts.internvl)

    def _tiles(self, size: Any, kwargs: Any) -> int:
        processor = self.info.get_hf_processor(**kwargs)
        tokens = self.info.get_num_image_tokens(
            image_width=size.width, image_height=size.height, processor=processor, mm_kwargs=kwargs
        )
        return tokens // processor.image_seq_length


@MULTIMODAL_REGISTRY.register_processor(
    InternVLProcessor, info=interns1.InternS1ProcessingInfo, dummy_inputs=interns1.InternS1DummyInputsBuilder
)
class InternVLForConditionalGeneration(Reducing, interns1.InternS1ForConditionalGeneration):
    """InternVL with policies."""

    layer_of = staticmethod(internvl_layer)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if config.vision_feature_layer not in (-1, config.vision_config.num_hidden_layers):
            raise ValueError(  # vLLM never reads this setting: answers would be wrong without a word
                "vLLM takes InternVL's features behind the tower's last layer, this checkpoint wants those of layer "
                f"{config.vision_feature_layer} (of {config.vision_config.num_hidden_layers}): save it with "
                "vision_feature_layer=-1 and without the layers behind that one"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def image_layouts(self, kwargs: dict[str, Any], count: int) -> tuple[list[Layout], list[int]]:
        tiles = [int(n) for n in torch.as_tensor(kwargs["image_num_patches"]).flatten().tolist()]
        found, first = [], 0
        for n in tiles:
            crops = crops_of(kwargs["pixel_values"][first : first + n]) if n > 1 else None
            found.append(layouts.internvl(self.config, (0, 0), n, crops))
            first += n
        return found, tiles
