"""InternVL as its own repository has it: ``InternVLChatModel``, the remote code of the original checkpoints.

It is known by its parts, not imported: vision tower, ``mlp1``, a transformers language model, and a ``generate`` that
merges the images and calls the language model's with embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from vtr.integrations.internvl import InternVL

from vtr.base import UnsupportedError
from vtr.image import Layout

PARTS = ("vision_model", "mlp1", "language_model", "extract_feature")


class InternVLChat(InternVL):
    """``InternVLChatModel`` over Llama or Qwen2: ``model.generate(pixel_values, input_ids, …, policy=p)``, ``chat``.

    ``chat`` hands its generation config on to ``generate``: ``chat(…, dict(max_new_tokens=64, policy=p))``.
    """

    family = "InternVL (remote code)"
    classes = ("InternVLChatModel",)
    image_inputs = ("pixel_values",)

    def serves(self, model: nn.Module) -> bool:
        return super().serves(model) or (
            all(hasattr(model, part) for part in PARTS) and "img_context_token_id" in vars(model)
        )

    def inner(self, model: nn.Module) -> Any:
        return model.language_model

    def text_model(self, model: nn.Module) -> Any:
        """Of the language model.

        Raises:
            UnsupportedError: its layers are not built as transformers builds them (InternLM2).
        """
        text: Any = getattr(model.language_model, "model", None)
        layers = getattr(text, "layers", None)
        if not layers or not all(hasattr(layers[0], name) for name in ("self_attn", "mlp")):
            raise UnsupportedError(
                f"{type(model.language_model).__name__} has attention and a cache of its own, which vtr cannot reach "
                "(InternLM2 in InternVL 2 and 2.5 of 2B, 8B, 26B): use a size whose language model is Qwen2 or Llama "
                "(InternVL2.5 1B, 4B, 38B, 78B; InternVL3 but 9B)"
            )
        if not hasattr(text, "rotary_emb"):
            raise UnsupportedError(
                f"{type(text).__name__} does not make rotary embeddings once for all layers: load the checkpoint with "
                "a language model of transformers (Qwen2ForCausalLM, LlamaForCausalLM)"
            )
        return text

    def placeholders(self, model: nn.Module) -> tuple[int, ...]:
        known = getattr(model, "img_context_token_id", None)
        return () if known is None else (int(known),)

    def tower(self, model: nn.Module) -> Any:
        return model.vision_model

    def projector(self, model: nn.Module) -> Any:
        return model.mlp1

    def newline(self, model: nn.Module) -> None:
        return None

    def encode(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        return model.extract_feature(**inputs)  # type: ignore[operator]

    def downsample_ratio(self, model: nn.Module) -> Any:
        return model.downsample_ratio

    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """As :meth:`InternVL.layouts`.

        Raises:
            ValueError: ``img_context_token_id`` is not set; a run of placeholders that is no image.
            UnsupportedError: tiles that belong to no placeholder (``image_flags`` of 0) beside others, or images that
                the caller has encoded.
        """
        if inputs.get("visual_features") is not None:
            raise UnsupportedError("a reduced call needs pixel_values, not visual_features: pass the images")
        if getattr(model, "ps_version", "v2") == "v1":
            raise UnsupportedError(
                "config.ps_version='v1' turns every tile on its side, so tokens lie where no policy expects them: use "
                "a checkpoint with 'v2' (all InternVL 2 and later are)"
            )
        flags = inputs.get("image_flags")
        if flags is not None and not bool(flags.any()):
            return {}
        if flags is not None and not bool(flags.all()):
            raise UnsupportedError(
                "image_flags of 0 mark tiles that belong to no placeholder, beside others: leave such tiles out of "
                "pixel_values"
            )
        if inputs.get("pixel_values") is not None and not self.placeholders(model):
            raise ValueError(
                "model.img_context_token_id is not set, so vision tokens cannot be told from text: "
                "model.img_context_token_id = tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>') (chat does it)"
            )
        return super().layouts(model, inputs)
