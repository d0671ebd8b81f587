"""The decoder: a Llama in a GGUF file becomes transformers' Llama, its vocabulary a tokenizer with picture tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .gguf import Gguf

OPEN, CONTEXT, CLOSE = "<img>", "<IMG_CONTEXT>", "</img>"
RENAMED = {"<file_sep>": CONTEXT, "<filename>": OPEN, "<gh_stars>": CLOSE}
"""Tokens of source code repositories that chats never have stand for the picture: no row is added to the embeddings."""
CONTROL = 3
"""What GGUF calls a token that is no text."""
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""Parts of a layer of transformers' Llama → llama.cpp's."""
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + CONTEXT + "\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The decoder's own, with places for pictures."""


def config(file: Gguf) -> Any:
    """transformers' settings for this file.

    Raises:
        ValueError: it is no Llama whose embeddings are its output as well.
    """
    from transformers import LlamaConfig

    says = file.says
    if says.get("general.architecture") != "llama" or "output.weight" in file.tensors:
        raise ValueError("the GGUF file must be a Llama with tied embeddings")
    return LlamaConfig(
        vocab_size=len(says["tokenizer.ggml.tokens"]),
        hidden_size=says["llama.embedding_length"],
        intermediate_size=says["llama.feed_forward_length"],
        num_hidden_layers=says["llama.block_count"],
        num_attention_heads=says["llama.attention.head_count"],
        num_key_value_heads=says["llama.attention.head_count_kv"],
        max_position_embeddings=says["llama.context_length"],
        rms_norm_eps=says["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": says["llama.rope.freq_base"]},
        bos_token_id=says["tokenizer.ggml.bos_token_id"],
        eos_token_id=says["tokenizer.ggml.eos_token_id"],
        pad_token_id=says["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in transformers' order: llama.cpp turns neighbours (0, 1), transformers (0, half)."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def state(file: Gguf) -> dict[str, torch.Tensor]:
    """What transformers' Llama (without its head) loads."""
    says, tensors = file.says, file.tensors
    heads = {"attn_q": says["llama.attention.head_count"], "attn_k": says["llama.attention.head_count_kv"]}
    out = {"embed_tokens.weight": tensors["token_embd.weight"], "norm.weight": tensors["output_norm.weight"]}
    for layer in range(says["llama.block_count"]):
        for ours, theirs in PARTS.items():
            weight = tensors[f"blk.{layer}.{theirs}.weight"]
            out[f"layers.{layer}.{ours}.weight"] = halves(weight, heads[theirs]) if theirs in heads else weight
    return {name: torch.tensor(value) for name, value in out.items()}


def tokenizer(file: Gguf) -> Any:
    """The file's byte-level BPE; digits stand alone, and three of its unused tokens stand for pictures.

    Raises:
        ValueError: it is another tokenizer, or lacks these tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    says = file.says
    words = says["tokenizer.ggml.tokens"]
    if (says.get("tokenizer.ggml.model"), says.get("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        raise ValueError("the GGUF file's tokenizer is not SmolLM's")
    if missing := sorted(set(RENAMED) - set(words)):
        raise ValueError(f"the GGUF file's vocabulary lacks {', '.join(missing)}, which are to stand for pictures")
    names = [RENAMED.get(word, word) for word in words]
    merges = [tuple(pair.split(" ", 1)) for pair in says["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({word: at for at, word in enumerate(names)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = [name for name, kind in zip(names, says["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=names[says["tokenizer.ggml.bos_token_id"]],
        eos_token=names[says["tokenizer.ggml.eos_token_id"]],
        unk_token=names[says["tokenizer.ggml.unknown_token_id"]],
        pad_token=names[says["tokenizer.ggml.padding_token_id"]],
        extra_special_tokens={
            "start_image_token": OPEN, "end_image_token": CLOSE, "context_image_token": CONTEXT,
        },
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        model_max_length=says["llama.context_length"],
    )  # fmt: skip
