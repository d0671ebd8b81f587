"""A LLaVA-1.5 of middle size with random weights, for a server to load: ``python -m vtr.eval.cost.servable``.

For ``vtr bench serve``: the pocket model's decoder is so small that a server is busy with everything else. Here the
tower is to the decoder as CLIP-L is to a 7B model in multiplications (about a twentieth), an image has as many tokens
(576), and words are tokens. What it answers means nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

SIDE, PATCH = 336, 14
IMAGE = "<image>"
SPECIAL = ["<pad>", "<bos>", "<eos>", IMAGE]
WORDS = 1020
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}<image> "
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    """A token a word of w0, w1, …; every other word is w0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="w0", pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE}, padding_side="left",
    )  # fmt: skip


def build(layers: int, hidden_size: int, seed: int) -> tuple[Any, Any]:
    """(model, processor); 64 numbers a head, a tower of 6 layers a quarter as wide."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    wide = hidden_size // 4
    vision = CLIPVisionConfig(
        hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=6, num_attention_heads=wide // 64,
        image_size=SIDE, patch_size=PATCH, projection_dim=wide,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(SPECIAL) + WORDS, hidden_size=hidden_size, intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=hidden_size // 64, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=SPECIAL.index(IMAGE))
    )
    square = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=square), tokenizer(), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    return model.eval(), processor


def main(
    folder: Annotated[Path, typer.Argument(help="where to write it")],
    layers: Annotated[int, typer.Option(help="of the decoder")] = 8,
    hidden_size: Annotated[int, typer.Option(help="of the decoder, a multiple of 256")] = 512,
    seed: Annotated[int, typer.Option(help="of the weights")] = 0,
) -> None:
    """Write a random LLaVA-1.5 of middle size that a server can load."""
    if hidden_size % 256:
        raise typer.BadParameter(f"--hidden-size {hidden_size}: a multiple of 256")
    model, processor = build(layers, hidden_size, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    typer.echo(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in {folder}")


if __name__ == "__main__":
    typer.run(main)
