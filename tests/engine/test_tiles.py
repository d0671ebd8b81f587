"""Tiles as real processors and checkpoints have them: Idefics3's with text between them, InternVL's 16 × 16 ladder."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
)

import vtr
from tests.engine.test_oracles import close
from tests.families import FAMILIES
from tests.tiny import SIDE
from vtr.testing import tiny

MARKS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
WORDS = ["[PAD]", "<s>", "what", "is", "this", *MARKS]
TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]


@pytest.fixture(scope="module")
def processor() -> Any:
    """Idefics3's own, over a vocabulary of words; tiles as large as the tiny model's, <image> where it has it."""
    vocabulary = {word: number for number, word in enumerate(WORDS + TILES)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="this"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="this", pad_token="[PAD]", bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS + TILES})
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    return Idefics3Processor(images, tokenizer, image_seq_len=9)


@pytest.fixture(scope="module")
def idefics() -> Any:
    return vtr.patch(next(family for family in FAMILIES if family.kind == "idefics3").make())


def test_what_idefics3s_processor_gives(processor: Any, idefics: Any) -> None:
    """A picture in crops, none, a small one: each row is what it is alone, every tile an image of 3 × 3 tokens."""
    texts = ["<image> what is this", "what is this", "<image> is this what"]
    made = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (36, 60, 3), generator=made, dtype=torch.uint8)
    wide = Image.fromarray(pixels.numpy())
    pictures = [[wide], [], [wide.resize((24, 24))]]
    inputs = processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    policies, run = ["fastv:keep=0.2", "m3:tokens=1", "m3:tokens=1"], {"max_new_tokens": 4, "output_logits": True}
    out = tiny.generate(idefics, inputs, policy=policies, return_dict_in_generate=True, **run)
    tiles = [int((row == tiny.IMAGE_ID).sum()) // 9 for row in inputs["input_ids"]]
    assert tiles[0] == 5 and tiles[1] == 0
    assert [row.vision_tokens[-1] for row in vtr.report(idefics).rows] == [int(tiles[0] * 9 * 0.2), 0, tiles[2]]
    for b, policy in enumerate(policies):
        given = {"images": [pictures[b]]} if pictures[b] else {}
        alone = processor(text=texts[b : b + 1], return_tensors="pt", **given)
        said = tiny.generate(idefics, alone, policy=policy, return_dict_in_generate=True, **run)
        assert torch.equal(out.sequences[b, -4:], said.sequences[0, -4:])
        close(torch.stack([step[b] for step in out.logits]), torch.cat(said.logits))


def test_a_truncated_prompt_is_told(processor: Any, idefics: Any) -> None:
    inputs = processor(text=["<image> what"], images=[[Image.new("RGB", (24, 24), "red")]], return_tensors="pt")
    first = int((inputs["input_ids"][0] == tiny.IMAGE_ID).nonzero()[0])
    cut = {**inputs, "input_ids": inputs["input_ids"][:, first + 4 :], "attention_mask": None}
    with pytest.raises(ValueError, match="left over from whole tiles of 9 tokens"):
        idefics(**cut, policy="fastv")


@pytest.fixture(scope="module")
def wide() -> Any:
    """InternVL with tiles as large as in the checkpoints: 448 pixels, patches of 14, 16 × 16 tokens."""
    torch.manual_seed(0)
    vision = tiny._tower(InternVLVisionConfig, image_size=[448, 448], patch_size=[14, 14])
    config = InternVLConfig(vision_config=vision, text_config=tiny._text("qwen2", 2), image_token_id=tiny.IMAGE_ID)
    config.text_config.layer_types = ["full_attention"] * 2
    return InternVLForConditionalGeneration(config).eval()


@pytest.mark.parametrize("tokens", [256, 64, 16, 4, 1])
def test_the_ladder_of_internvl(wide: Any, tokens: int) -> None:
    """M3's scales of a 16 × 16 tile, of crops and thumbnail alike, equal to a shorter prompt made by hand."""
    made, tiles = torch.Generator().manual_seed(1), 3
    ids = torch.tensor([[1, tiny.IMG, *[tiny.IMAGE_ID] * (256 * tiles), tiny.END_IMG, 9, 10]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(tiles, 3, 448, 448, generator=made)}
    model = vtr.patch(copy.deepcopy(wide))
    with torch.no_grad():
        got = model(**inputs, policy=vtr.Matryoshka(tokens)).logits[0]
        seen = wide.model.get_image_features(inputs["pixel_values"]).pooler_output  # [tiles, 256, D]
        cells = seen.view(tiles, 16, 16, -1).permute(0, 3, 1, 2)
        cells = torch.nn.functional.adaptive_avg_pool2d(cells, round(tokens**0.5)).flatten(2).transpose(1, 2)
        table = wide.get_input_embeddings().weight
        parts = [table[ids[0, :2]], cells.flatten(0, 1), table[ids[0, -3:]]]
        want = wide(inputs_embeds=torch.cat(parts)[None]).logits[0]
    assert vtr.report(model).rows[0].vision_tokens == [tokens * tiles] * 2
    close(got[-3:], want[-3:])
