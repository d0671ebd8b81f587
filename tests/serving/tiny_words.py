"""A tokenizer for random checkpoints: a token a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

WORDS = [
    "what", "which", "where", "how", "many", "color", "shape", "is", "are", "the", "on", "in", "a", "of", "there",
    "picture", "circle", "red", "blue", "one", "two", "three",
]  # fmt: skip
BASIC = ["<pad>", "<bos>", "<eos>", "<unk>"]
TEMPLATE = (
    "{%- for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE {% elif part['type'] == 'text' %}"
    "{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def vocabulary(special: Sequence[str]) -> dict[str, int]:
    """Ids: the basic four, then the special ones, then words."""
    return {word: i for i, word in enumerate([*BASIC, *special, *WORDS])}


def tokenizer(special: Sequence[str], **settings: Any) -> Any:
    """A tokenizer of :func:`vocabulary`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel(vocabulary(special), unk_token="<unk>"))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"], padding_side="left", model_max_length=4096, **settings,
    )  # fmt: skip


def text(kind: type, words: int, layers: int = 4, **settings: Any) -> Any:
    """The config of a small decoder for so many words."""
    return kind(
        vocab_size=words, hidden_size=128, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False, **settings,
    )  # fmt: skip


def save(model: Any, processor: Any, folder: Any) -> None:
    """Write a checkpoint; its attention is made less flat, so that pictures matter."""
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        for which in "qk":
            if hasattr(attention, f"{which}_norm"):
                getattr(attention, f"{which}_norm").weight.data *= 2
            else:
                getattr(attention, f"{which}_proj").weight.data *= 8
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
