"""Tokenizer and processor of the pocket model, built from its vocabulary."""

from __future__ import annotations

from typing import Any

from .model import BOS, IDS, MEAN, PINPOINTS, STD
from .scenes import PATCH, TILE

# Nothing follows the question: its last word, which decides the answer, is where the model starts to answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}"
)


def make_tokenizer(ids: dict[str, int] = IDS, named: dict[str, str] | None = None, numbers: bool = False) -> Any:
    """One token per word; upper case and ? . , ! do not matter; unknown words become <unk>.

    ids: of words. named: special tokens the processor asks for by a name; None: LLaVA-NeXT's. numbers: digits are words
    wherever they stand, and colons do not matter ("Frame12:" is frame, 1, 2).
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    ignored = "[?.,!:]" if numbers else "[?.,!]"
    core.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(ignored), " "), normalizers.Replace("colour", "color")]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if numbers:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [core.pre_tokenizer, pre_tokenizers.Digits(individual_digits=True)]
        )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=named or {"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        model_max_length=4096,
    )


def make_processor() -> Any:
    """Stock LlavaNextProcessor around the tokenizer and the torchvision-free image processor."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    side = {"height": TILE, "width": TILE}
    pictures = LlavaNextImageProcessorPil(
        size=side, crop_size=side, image_grid_pinpoints=PINPOINTS, image_mean=list(MEAN), image_std=list(STD)
    )
    return LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
