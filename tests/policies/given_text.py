"""A tiny text model of fixtures that give embeddings: what a patched model and the slow reference take of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from vtr.integrations.llava import tile_layout

import vtr
from tests import official, oracle
from vtr.image import Layout


class Tiled(official.GivenAdapter):
    """Pictures lie as ``model.laid_out`` says; a line of tokens each, where it says nothing."""

    def layouts(self, model: Any, inputs: Any) -> dict[int, list[Layout]]:
        laid_out = getattr(model, "laid_out", None) or [tile_layout(1, len(p)) for p in model.pictures]
        return {model.config.image_token_id: laid_out}


def text_model(config: dict[str, Any], state: dict[str, Tensor], embeds: Tensor, vision: Tensor) -> Any:
    """The text model of ``state`` (transformers' names), patched, its prompt's text among its words.

    Behind the vocabulary come a word for each text embedding of ``embeds`` [n, d], and the image placeholder.
    """
    words, room = embeds[~vision], int((~vision).sum()) + 1
    state = dict(state)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = torch.zeros(room, embeds.shape[1])
        if name.startswith("model."):
            more[:-1] = words
        state[name] = torch.cat([state[name], more])
    text = LlamaConfig(**{**config, "vocab_size": config["vocab_size"] + room}, bos_token_id=None, eos_token_id=None)
    tower = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=2, patch_size=1
    )
    last = config["vocab_size"] + room - 1
    made: Any = official.Given(LlavaConfig(vision_config=tower, text_config=text, image_token_index=last))
    named = {official._renamed(name, ""): tensor for name, tensor in state.items()}
    missing, unexpected = made.load_state_dict(named, strict=False)
    assert not unexpected and not [name for name in missing if "language_model" in name or name == "lm_head.weight"]
    made.set_attn_implementation("eager")
    made = official.features_given(made.eval())
    official.register_adapter(Tiled())
    return vtr.patch(made)


def prompt(model: Any, embeds: Tensor, vision: Tensor, layouts: Sequence[Layout] | None = None) -> dict[str, Tensor]:
    """What the model takes: runs of ``vision`` are pictures, which lie as ``layouts`` say."""
    first = model.config.text_config.vocab_size - 1 - int((~vision).sum())
    ids = torch.full((len(embeds),), model.config.image_token_id)
    ids[~vision] = torch.arange(first, model.config.image_token_id)
    starts = vision & ~torch.cat([torch.zeros(1).bool(), vision[:-1]])
    number = starts.cumsum(0)
    model.pictures = [embeds[vision & (number == i + 1)] for i in range(int(starts.sum()))]
    model.laid_out = layouts
    return {
        "input_ids": ids[None], "attention_mask": torch.ones(1, len(ids)).long(),
        "pixel_values": torch.zeros(len(model.pictures), 3, 2, 2),
    }  # fmt: skip


def hidden_of(model: Any, row: oracle.Row, given: oracle.Given) -> list[Tensor]:
    """Hidden states behind every layer, as the slow reference has them."""
    outs, own = [], oracle.block

    def block(*args: Any, **kwargs: Any) -> Any:
        made = own(*args, **kwargs)
        outs.append(made[0])
        return made

    from vtr.testing import dense

    dense.block = block
    try:
        oracle.run(model, row, given)
    finally:
        dense.block = own
    return outs


def attention_of(model: Any, row: oracle.Row, states: Tensor, layer: int) -> Tensor:
    """Attention probabilities [heads, n, n] of ``layer`` over the whole row, of the ``states`` that enter it."""
    module, at = model.get_decoder().layers[layer], torch.arange(len(states))
    mask = oracle.hidden_keys(torch.ones(len(states)).bool(), at, None)
    normed = oracle.norm(module.input_layernorm, states)
    with torch.no_grad():
        return oracle.attention(module.self_attn, normed, mask, at, model.config.text_config)[1]


def generated(model: Any, inputs: dict[str, Tensor], policy: Any, steps: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens [steps] of the first ``vocab`` words, and the logits [steps, vocab] that chose them."""
    out = model.generate(
        **inputs, policy=policy, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True, suppress_tokens=list(range(vocab, model.config.text_config.vocab_size)),
    )  # fmt: skip
    return out.sequences[0, -steps:], torch.cat(out.logits)[:, :vocab]
