"""A small model in the shape of InternVL's remote code (``InternVLChatModel``), written for tests.

Same attribute names, call signatures and order of steps as the public one; tokens and their order too. Nothing of it
derives from transformers' InternVL, whose weights :func:`converted` copies over.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast


class VisionAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.qk_normalization = config.use_qk_norm
        if self.qk_normalization:
            self.q_norm, self.k_norm = nn.RMSNorm(config.hidden_size, 1e-6), nn.RMSNorm(config.hidden_size, 1e-6)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.qk_normalization:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attn, self.mlp = VisionAttention(config), VisionMLP(config)
        self.norm1, self.norm2 = (nn.LayerNorm(config.hidden_size, config.layer_norm_eps) for _ in range(2))
        self.ls1, self.ls2 = (nn.Parameter(torch.full((config.hidden_size,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class VisionEmbeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        side = config.image_size[0] // config.patch_size[0]
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size[0], config.patch_size[0])
        self.position_embedding = nn.Parameter(torch.zeros(1, side**2 + 1, config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], 1) + self.position_embedding


class VisionEncoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class InternVisionModel(nn.Module):
    """The tower: hidden_states are every layer's input and the last one's output."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embeddings, self.encoder = VisionEmbeddings(config), VisionEncoder(config)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling:
        states = self.encoder(self.embeddings(pixel_values))
        asked = tuple(states) if output_hidden_states else None
        return BaseModelOutputWithPooling(states[-1], states[-1][:, 0], hidden_states=asked)


class InternVLChatModel(PreTrainedModel):
    """Merges images itself and calls the language model with embeddings; no GenerationMixin, a closed forward."""

    config_class = PretrainedConfig
    main_input_name = "pixel_values"
    all_tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Any, vision_config: Any, llm_config: Any, language_model: Any = None) -> None:
        super().__init__(config)
        config.vision_config, config.llm_config = vision_config, llm_config
        self.select_layer, self.downsample_ratio, self.ps_version = -1, 0.5, "v2"
        side = vision_config.image_size[0] // vision_config.patch_size[0]
        self.num_image_token = int(side**2 * self.downsample_ratio**2)
        self.vision_model = InternVisionModel(vision_config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(llm_config)
        wide = vision_config.hidden_size * int(1 / self.downsample_ratio) ** 2
        width = llm_config.hidden_size
        self.mlp1 = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))
        self.img_context_token_id = None

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        assert image_flags is not None and input_ids is not None
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        features = self.extract_feature(pixel_values)[image_flags.squeeze(-1) == 1]
        selected = input_ids == self.img_context_token_id
        embeds[selected] = embeds[selected] * 0.0 + features.reshape(-1, embeds.shape[-1])
        out = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return CausalLMOutputWithPast(logits=out.logits, past_key_values=out.past_key_values)

    def pixel_shuffle(self, x: Tensor) -> Tensor:
        """[n, w, h, c] → [n, w / 2, h / 2, 4 c]."""
        n, w, h, c = x.shape
        x = x.view(n, w, h // 2, c * 2).permute(0, 2, 1, 3).contiguous()
        return x.view(n, h // 2, w // 2, c * 4).permute(0, 2, 1, 3).contiguous()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        seen = self.vision_model(pixel_values=pixel_values, output_hidden_states=False, return_dict=True)
        patches = seen.last_hidden_state[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        return self.mlp1(self.pixel_shuffle(patches.reshape(len(patches), side, side, -1)).flatten(1, 2))

    def chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, Any],
        history: Any = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
        IMG_START_TOKEN: str = "<img>",
        IMG_END_TOKEN: str = "</img>",
        IMG_CONTEXT_TOKEN: str = "<IMG_CONTEXT>",
        verbose: bool = False,
    ) -> str:
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
        for tiles in num_patches_list:
            image = IMG_START_TOKEN + IMG_CONTEXT_TOKEN * self.num_image_token * tiles + IMG_END_TOKEN
            question = question.replace("<image>", image, 1)
        inputs = tokenizer(question, return_tensors="pt")
        out = self.generate(
            pixel_values=pixel_values,
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **generation_config,
        )
        return tokenizer.batch_decode(out, skip_special_tokens=True)[0]

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: Any = None,
        output_hidden_states: bool | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        assert self.img_context_token_id is not None
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.extract_feature(pixel_values) if visual_features is None else visual_features
            embeds[input_ids == self.img_context_token_id] = features.reshape(-1, embeds.shape[-1])
        return self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            **generate_kwargs,
        )


def converted(native: Any) -> InternVLChatModel:
    """The same weights as transformers' InternVL ``native``, in the other shape."""
    config, text = native.config, native.config.text_config
    model = InternVLChatModel(PretrainedConfig(), config.vision_config, text)
    weights = {}
    for name, weight in native.state_dict().items():
        for old, new in NAMES:
            name = name.replace(old, new)
        weights[name] = weight
    for at in range(config.vision_config.num_hidden_layers):
        here = f"vision_model.encoder.layers.{at}.attn."
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{here}{p}_proj.{kind}", None) for p in "qkv"]
            if parts[0] is not None:
                weights[f"{here}qkv.{kind}"] = torch.cat(parts)
    model.load_state_dict({n: w for n, w in weights.items() if "vision_model.layernorm" not in n})
    model.language_model.set_attn_implementation(text._attn_implementation)
    model.language_model.generation_config = native.generation_config
    model.img_context_token_id = config.image_token_id
    return model.eval()


NAMES = [
    ("model.vision_tower.", "vision_model."),
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.layer_norm", "mlp1.0"),
    ("model.multi_modal_projector.linear_1", "mlp1.1"),
    ("model.multi_modal_projector.linear_2", "mlp1.3"),
    ("lm_head", "language_model.lm_head"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.projection_layer", "attn.proj"),
    ("attention.", "attn."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_", "ls"),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("patch_embeddings.projection", "patch_embedding"),
    ("position_embeddings", "position_embedding"),
]
