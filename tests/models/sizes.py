"""Sizes of the tiny models, as data: by a config's field, and what single classes need besides."""

from __future__ import annotations

from typing import Any

DEPTH = 4
"""Decoder layers."""
VOCABULARY = 160
MAX_SIZE = 120e6
"""Parameters of the largest model that is built."""

CONFIGS = {name: "text" for name in ("text_config", "llm_config", "language_config", "decoder_config")}
"""Fields of a config that hold the language model's; others that hold one are a tower's, or are built like one."""

ANY_TEXT: dict[str, Any] = {
    "num_hidden_layers": DEPTH,
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "pad_token_id": 0,
}

# attention's sizes differ from one another: what is cached (24), a query (12 + 8), its rotated part (8), a value (16)
TEXT: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    global_head_dim=16, num_global_key_value_heads=2, max_position_embeddings=512, sliding_window=8,
    attention_chunk_size=8,
    # latents
    q_lora_rank=18, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, qk_head_dim=20, v_head_dim=16,
    o_groups=2, o_lora_rank=8,
    # experts
    moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_local_experts=4,
    n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2, moe_k=2, n_group=1, topk_group=1,
    n_shared_experts=1, moe_num_shared_experts=1, first_k_dense_replace=1, moe_layer_start_index=1,
    moe_layer_end_index=3, dense_intermediate_size=48, shared_intermediate_size=48, intermediate_size_mlp=48,
    # recurrent, convolutional and indexed layers
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, block_ff_dim=48,
    block_multiple_of=1, conv_dim=64, conv_dim_out=64, index_n_heads=2, index_head_dim=16, index_topk=8,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8,
    # what single families add to a layer
    vocab_size_per_layer_input=128, hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2,
    num_kv_shared_layers=0, hc_lowrank=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16,
    linear_head_dim=8, linear_num_heads=4, moe_shared_expert_intermediate_size=16, num_nextn_predict_layers=0,
    adapter_dim=16, text_dim=64,
)  # fmt: skip

VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=2, num_heads=2, num_key_value_heads=2, head_dim=16,
    num_hidden_layers=2, depth=2, embed_dim=32, mlp_dim=48, image_size=32, patch_size=4, out_hidden_size=64,
    output_dim=64, projection_dim=32, d_model=32, num_layers=2, encoder_layers=2, mlp_ratio=2,
    encoder_attention_heads=2, encoder_ffn_dim=48, text_hidden_size=64, mm_hidden_size=64,
    deepstack_visual_indexes=[0, 1], fullatt_block_indexes=[1], vocab_size=64, width=32, layers=2, heads=2,
    projector_input_dim=32, projector_output_dim=64, encoder_hidden_size=32, cross_attention_hidden_size=32,
    num_position_embeddings=64, vision_output_dim=64, n_layers=2, base_channels=32, channel_multiplier=[1, 1],
    num_res_blocks=1, adapter_in_dim=32, adapter_input_size=32, adapter_out_dim=64, adapter_output_size=64,
    max_num_patches=64, moe_intermediate_size=16, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip

TOP: dict[str, Any] = dict(
    hidden_size=64, projector_hidden_size=32, alignment_intermediate_size=32, connector_hidden_size=32,
    projection_dim=64, qformer_hidden_size=32,
)  # fmt: skip

WORDS = {"<image>": 100, **{f"IMGIMGA{letter}Z": 120 + i for i, letter in enumerate("BCDEFGH")}}
"""Names of tokens that a class whose images are tokens reads its ids from."""

_MARKS = {"vision_start_token_id": 110, "vision_end_token_id": 111, "audio_start_token_id": 112}
_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_TILES = {
    "embed_dim": 32, "img_size": [32, 32], "depth": 2, "global_pool": "", "use_post_transformer_norm": False,
    "init_values": 0.1, "ref_feat_shape": [2, 2],
}  # fmt: skip
_WINDOWED = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 18, "kv_lora_rank": 24, "head_dim": 20,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
_INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 64, "compress_ratio": 4}
_MARK: dict[str, Any] = {"image_token_id": 100}
_WIDE_INDEX: dict[str, Any] = {"text_config.index_topk": 64}
"""Under a prompt's length the unpatched model is not batch invariant."""

OVER: dict[str, dict[str, Any]] = {
    f"{name}ForConditionalGeneration": fields
    for name, fields in {
        "Apertus1p5": {
            "image_token_offset": 116,
            "audio_token_offset": 132,
            "vision_config.codebook_size": 16,
            "audio_config.codebook_size": 16,
            "audio_config.codebook_dim": 32,
        },
        "Blip2": _MARK,
        "Chameleon": {**_MARK, "vocabulary_map": WORDS},
        "CohereCompass": {"text_config.rope_parameters": {"full_attention": _AXES, "sliding_attention": _AXES}},
        "DeepseekOcr2": {"text_config.mlp_layer_types": ["dense", "sparse"] * 2, "text_config.num_experts_per_tok": 2},
        "Dots3Note": {
            "text_config.head_dim": 20,
            "text_config.index_topk": 64,
            "text_config.per_layer_config": {1: _WINDOWED, 3: _WINDOWED},
            "vision_config.mlp_layer_types": ["dense", "sparse"],
            "vision_config.per_layer_config": {1: {"num_local_experts": 4, "num_experts_per_tok": 2}},
        },
        "Emu3": {"vocabulary_map": WORDS, "vq_config.hidden_size": 32},
        "Ernie4_5_VLMoe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
        "Florence2": {
            "text_config.encoder_layers": 2,
            "text_config.decoder_layers": 2,
            "text_config.d_model": 64,
            "vision_config.depths": [1, 1],
            "vision_config.patch_size": [7, 3],
            "vision_config.patch_stride": [4, 2],
            "vision_config.patch_padding": [3, 1],
            "vision_config.patch_prenorm": [False, True],
            "vision_config.embed_dim": [16, 32],
            "vision_config.num_heads": [2, 2],
            "vision_config.num_groups": [2, 2],
            "vision_config.projection_dim": 64,
        },
        "Gemma3": {"mm_tokens_per_image": 16},
        "Glm5Next": {
            "text_config.num_key_value_heads": 4,
            "text_config.index_topk": 64,
            "text_config.qk_rope_head_dim": 0,
            "text_config.head_dim": 0,
        },
        "Granite4Vision": {
            "deepstack_layer_map": [[0, 0], [1, 1]],
            "spatial_target_layers": [2],
            "downsample_rate": "1/2",
            "vision_config.hidden_size": 64,
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 64,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "encoder_hidden_size": 64,
            },
        },
        "HYV4VL": _WIDE_INDEX,
        "HunYuanVL": {"text_config.head_dim": 16},
        "InstructBlip": _MARK,
        "InstructBlipVideo": _MARK,
        "Lfm2Vl": {"text_config.layer_types": ["conv", "full_attention", "conv", "full_attention"]},
        "MiniCPMOcr": _MARK,
        "MiniCPMV4_6": _MARK,
        "MiniCPMV4_7": _MARK,
        "MistralLarge4": _WIDE_INDEX,
        "Molmo2": {"adapter_config.vision_feature_layer": [-1, 0], "adapter_config.vit_layers": [-1, 0]},
        "PerceptionLM": {"vision_config.model_args": _TILES},
        "Qwen2_5OmniThinker": _MARKS,
        "Qwen3OmniMoeThinker": _MARKS,
        "Qwen4Exp": {f"text_config.indexer_{name}": size for name, size in _INDEXER.items()},
        "Step3p7": {"text_config.sliding_window": 8},
    }.items()
} | {
    "DiffusionGemmaForBlockDiffusion": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 16,
    },
    "NemotronH_Omni_Reasoning_V3": _MARK,
}
"""What a class needs besides: by a field's path in its config."""
