"""CDPruner against the numbers of the official code (Theia-4869/CDPruner), and the CLIP text tower that it loads."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official, tiny
from tests.official import IMG, close
from tests.seen import GivenTower, seen
from vtr import settings
from vtr.image import Image, Layout
from vtr.policies.picture._greedy import determinant, unit
from vtr.policies.question._clip_text import TextTower, rows_of_ids
from vtr.policies.question.cdpruner import CDPruner

META = official.meta("cdpruner")
UNIT, E2E, ANYRES, WEIGHTS = (official.tensors("cdpruner", name) for name in ("unit", "e2e", "anyres", "e2e_weights"))
PIXELS = META["e2e_vision_config"]["image_size"]
SIDE = PIXELS // META["e2e_vision_config"]["patch_size"]


def cases(file: str) -> Any:
    found = [case for case in META["cases"] if case["file"] == file]
    return pytest.mark.parametrize("case", found, ids=lambda c: c["case"])


class GivenClip(TextTower):
    """A text tower whose answers are given."""

    def __init__(self, patches: Tensor, texts: Tensor) -> None:
        self.patches, self.texts, self.flops = patches, texts, 0

    def embed(self, text: str, segments: Any = "whole", device: Any = "cpu") -> Tensor:
        return self.texts

    def project(self, states: Tensor) -> Tensor:
        assert states.shape[:2] == self.patches.shape[:2]
        return self.patches


def frames(tiles: int, n: int) -> Layout:
    one = tile_layout(1, n)
    parts = (one.tile, one.y, one.x, one.newline)
    tile, y, x, newline = (part.repeat(tiles) for part in parts)
    return Layout(tile + torch.arange(tiles).repeat_interleave(n), y, x, newline, one.grid)


def given(values: dict[str, Tensor], name: str, keep: int, layout: Layout, **others: Any) -> tuple[CDPruner, Image]:
    features, patches, texts = (values[f"{name}.{part}"] for part in ("features", "image_embeds", "text_embeds"))
    policy = CDPruner(keep, relevance="clip", question="", **others)
    policy._clip = GivenClip(patches, texts)
    tower = GivenTower({None: patches}, norm=lambda states: states)
    return policy, seen(features, layout, tower, values.get(f"{name}.image_newline"))


# -------------------------------------------------------------------------------------------- selection, from numbers
@cases("unit")
def test_picks(case: dict[str, Any]) -> None:
    name, tiles, n, count = case["case"], case["B"], case["N"], case["T"]
    policy, image = given(UNIT, name, count, frames(tiles, n))
    units = unit(UNIT[f"{name}.features"])
    relevance = policy.relevance_of(image, units, None)
    close(relevance, UNIT[f"{name}.relevance"])
    assert (relevance > 0).all()
    close((units * units).sum(-1) * relevance**2, UNIT[f"{name}.kernel_diagonal"])
    if f"{name}.kernel" in UNIT:
        alike = units @ units.transpose(1, 2)
        close(alike, UNIT[f"{name}.similarity"])
        close(relevance[:, :, None] * alike * relevance[:, None], UNIT[f"{name}.kernel"])
    picks, _ = determinant(units, relevance, count)
    assert all(len(set(some)) == count for some in picks.tolist())
    want = UNIT[f"{name}.picks"]
    sure = count if set(case["kept"]) == {count} else units.shape[-1] - 1  # the official code repeats tokens then
    assert picks[:, :sure].tolist() == want[:, :sure].tolist()
    kept = policy.compress(image)
    assert isinstance(kept, Tensor) and len(kept) == tiles * count == policy.kept_of(image.layout)
    if sure == count:
        assert kept.sort().values.tolist() == UNIT[f"{name}.mask"].flatten().nonzero()[:, 0].tolist()


@cases("anyres")
def test_the_whole_prompt(case: dict[str, Any]) -> None:
    """Thumbnail, then the canvas; "flat" is tile after tile, so there the same tokens in another order."""
    name, side = case["case"], case["side"]
    layout = tile_layout(side, side)
    if case["grid_wh"] is not None:
        (width, height), (across, down) = case["image_size_wh"], case["grid_wh"]
        layout = anyres_layout((height, width), ((down * side * 14, across * side * 14),), side * 14, side)
    policy, image = given(ANYRES, name, case["T"], layout, placement="official")
    made = policy.compress(image)
    body = made.features if isinstance(made, vtr.Pooled) else image.features[made.sort().values]
    ids, words, want = ANYRES[f"{name}.input_ids"][0], ANYRES[f"{name}.embed_tokens"], ANYRES[f"{name}.inputs_embeds"]
    at = ids.tolist().index(IMG)
    if case["merge"] == "flat" and len(ANYRES[f"{name}.features"]) > 1:
        mask = ANYRES[f"{name}.mask"]
        assert torch.equal(policy.choose(image, [case["T"]] * len(mask), torch.ones_like(mask)), mask)
        body = ANYRES[f"{name}.features"][mask]
    got = torch.cat([words[ids[:at]], body, words[ids[at + 1 :]]])
    assert len(got) == case["length"] and len(body) == case["visual_token_num"]
    close(got[None], want, 1e-6)


# --------------------------------------------------------------------------------------------------- a CLIP checkpoint
def numbers(text: str) -> dict[str, list[int]]:
    """Words that are CLIP's ids."""
    begin, end = META["e2e_text_config"]["vocab_size"] - 2, META["e2e_text_config"]["vocab_size"] - 1
    return {"input_ids": [begin, *map(int, text.split()), end]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official tiny CLIP as transformers saves it, with a tokenizer of letters."""
    text, vision = CLIPTextConfig(**META["e2e_text_config"]), CLIPVisionConfig(**META["e2e_vision_config"])
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=text.projection_dim))
    named = {k.partition(".")[2]: t for k, t in WEIGHTS.items() if not k.startswith("projector.")}
    missing, unexpected = clip.load_state_dict(named, strict=False)
    assert not unexpected and all("position_ids" in k or k == "logit_scale" for k in missing), (missing, unexpected)
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    letters = [chr(97 + i) for i in range(26)]
    vocab = {token: i for i, token in enumerate([*letters, *(f"{x}</w>" for x in letters)])}
    size = META["e2e_text_config"]["vocab_size"]
    vocab |= {f"[{i}]": i for i in range(len(vocab), size - 2)}
    vocab |= {"<|startoftext|>": size - 2, "<|endoftext|>": size - 1}
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder


@cases("e2e")
def test_from_pixels_and_words(case: dict[str, Any], checkpoint: Path) -> None:
    """Through a whole patched model: LLaVA for one tile, LLaVA-NeXT for a thumbnail and four crops."""
    name, pixels = case["case"], E2E[case["pixel_values"]]
    model = llava(anyres=len(pixels) > 1)
    n = SIDE**2 * len(pixels) + (2 * SIDE if len(pixels) > 1 else 0)
    row = torch.tensor([[1, *[8] * n, 2]])
    images: dict[str, Any] = {"pixel_values": pixels}
    if len(pixels) > 1:
        images = {"pixel_values": pixels[None], "image_sizes": torch.tensor([[2 * PIXELS, 2 * PIXELS]])}
    found: list[tuple[Tensor, Tensor]] = []

    class Spied(CDPruner):
        def choose(self, image: Image, counts: list[int], there: Tensor) -> Tensor:
            assert image.tiles is not None
            found.append((image.tiles, super().choose(image, counts, there)))
            return found[-1][1]

    ids = E2E[f"{name}.question_ids"][0].tolist()
    ids = ids[: len(ids) - ids[::-1].index(META["e2e_text_config"]["vocab_size"] - 1)]  # it may be filled with 0
    text = " ".join(map(str, ids[1:-1]))
    assert numbers(text)["input_ids"] == ids
    policy = Spied(case["T"], placement="official", question=text)
    policy.load_text_tower(checkpoint, clip_tokenizer=numbers)
    assert policy._clip is not None
    close(policy._clip.embed(text, "official"), E2E[f"{name}.text_embeds"])
    with torch.no_grad():
        model(input_ids=row, attention_mask=torch.ones_like(row), **images, policy=policy)
    ((tiles, chosen),) = found
    close(tiles, E2E[f"{name}.projected"])
    assert torch.equal(chosen, E2E[f"{name}.mask"])
    assert len(rows_of_ids(ids, META["e2e_text_config"]["max_position_embeddings"], "official")) == case["segments"]


def llava(anyres: bool) -> Any:
    width = len(WEIGHTS["projector.2.bias"])
    text = LlamaConfig(vocab_size=9, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    vision = CLIPVisionConfig(**META["e2e_vision_config"])
    made = {"vision_config": vision, "text_config": text, "image_token_index": 8, "vision_feature_layer": -2}
    model: Any = (
        LlavaNextForConditionalGeneration(LlavaNextConfig(**made, image_grid_pinpoints=[[2 * PIXELS, 2 * PIXELS]]))
        if anyres
        else LlavaForConditionalGeneration(LlavaConfig(**made))
    )
    tower = model.model.vision_tower
    prefix = "vision_model." if next(iter(tower.state_dict())).startswith("vision_model.") else ""
    start = "vision.vision_model."
    named = {prefix + k.removeprefix(start): t for k, t in WEIGHTS.items() if k.startswith(start)}
    missing, unexpected = tower.load_state_dict(named, strict=False)
    assert not unexpected and all("position_ids" in k for k in missing)
    linear = {"projector.0.": "linear_1.", "projector.2.": "linear_2."}
    projector = {linear[k[:12]] + k[12:]: t for k, t in WEIGHTS.items() if k.startswith("projector.")}
    model.model.multi_modal_projector.load_state_dict(projector)
    model.set_attn_implementation("eager")
    return vtr.patch(model.eval())


class Words:
    """A language model's tokenizer: ids are letters."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(" " if i == 2 else chr(97 + int(i) % 26) for i in ids)


def picture(policy: CDPruner, seed: int = 0) -> Image:
    made = torch.Generator().manual_seed(seed)
    states = torch.randn(1, 36, META["e2e_vision_config"]["hidden_size"], generator=made)
    tower = GivenTower({None: states}, norm=lambda x: x)
    image = seen(torch.randn(1, 36, 20, generator=made), None, tower, question=torch.randn(4, 20, generator=made))
    image.question_ids = torch.tensor([2, 5, 9, 2])
    return image


def test_the_question_is_read_with_both_tokenizers(checkpoint: Path) -> None:
    """The row's ids as text by the language model's, that text as ids by the checkpoint's own."""
    policy = CDPruner(6).load_text_tower(checkpoint, Words())
    assert policy._clip.question(picture(policy)) == "fj"
    size = META["e2e_text_config"]["vocab_size"]
    assert policy._clip.clip_tokenizer("fj")["input_ids"] == [size - 2, 5, 26 + 9, size - 1]
    clip = CLIPModel.from_pretrained(checkpoint)
    features = clip.get_text_features(torch.tensor([[size - 2, 5, 26 + 9, size - 1]]))
    close(policy._clip.embed("fj"), getattr(features, "pooler_output", features).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = policy.compress(picture(policy))
        asked = CDPruner(6).load_text_tower(checkpoint).asking("fj")
        assert kept.tolist() == asked.compress(picture(asked)).tolist()
    image = picture(policy)
    image.question_ids = None
    with pytest.raises(vtr.UnsupportedError, match="question="):
        policy.compress(image)
    with pytest.raises(vtr.UnsupportedError, match="tokenizer"):
        CDPruner(6).load_text_tower(checkpoint).compress(picture(policy))


def test_the_tower_is_no_setting(checkpoint: Path, tmp_path: Path) -> None:
    policy = CDPruner(6).load_text_tower(checkpoint, Words())
    assert policy == CDPruner(6) and policy.spec == "cdpruner:keep=6" and "hidden_states" in policy.wants
    for other in (copy.copy(policy), copy.deepcopy(policy)):
        assert other == policy and other._clip is policy._clip
    policy.save_pretrained(tmp_path)
    assert vtr.Policy.from_pretrained(tmp_path) == policy


def test_the_tower_that_a_setting_names(checkpoint: Path, tmp_path: Path) -> None:
    named = CDPruner(6, text_tower=str(checkpoint), question="ab")
    assert vtr.policy(named.spec) == named and named.asks_clip
    again = dataclasses.replace(named, question="cd")
    assert named._clip is not None and again._clip is not None and again._clip.text is named._clip.text
    by_hand = CDPruner(6).load_text_tower(checkpoint).asking("ab")
    assert named.compress(picture(named)).tolist() == by_hand.compress(picture(by_hand)).tolist()  # type: ignore[union-attr]
    assert CDPruner.names_file(named.config()) and not CDPruner.names_file(CDPruner(6).config())
    with pytest.raises(ValueError, match="name another file"):
        settings.check_names_no_file("cdpruner", named.config())
    with pytest.raises(ValueError, match="call load_text_tower after loading"):
        named.save_pretrained(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
    with pytest.raises(OSError, match="no-such-clip"):
        CDPruner(6, text_tower="./no-such-clip")


def test_a_tower_that_is_not_there_is_told_before_anything_runs(tmp_path: Path) -> None:
    """Making the policy reads no checkpoint; a call asks for it before the model runs."""
    LlamaConfig().save_pretrained(tmp_path)
    policy = CDPruner(6, text_tower=str(tmp_path), question="ab")
    model = vtr.patch(tiny.llava())
    inputs = tiny.batch(model, [["a", tiny.IMAGE, "bc"]])
    model.model.vision_tower.register_forward_pre_hook(lambda *args: pytest.fail("the tower runs"))
    with pytest.raises(ValueError, match="'llama', not of CLIP"):
        model(**inputs, policy=policy)


def test_a_checkpoint_of_something_else(checkpoint: Path, tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama', not of CLIP"):
        CDPruner(6).load_text_tower(tmp_path)
    policy = CDPruner(6).load_text_tower(checkpoint).asking("ab")
    image = picture(policy)
    image.tower = GivenTower({None: torch.randn(1, 36, 7)}, norm=lambda x: x)
    with pytest.raises(vtr.UnsupportedError, match="7: load the text tower"):
        policy.compress(image)


def test_which_one_runs() -> None:
    policy = CDPruner(6)
    with pytest.warns(UserWarning, match="no CLIP text tower") as told:
        first = policy.compress(picture(policy))
        policy.compress(picture(policy))
    assert len(told) == 1 and policy.wants == ("tiles", "question")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = CDPruner(6, relevance="embeddings")
        assert same.compress(picture(same)).tolist() == first.tolist()  # type: ignore[union-attr]
    with pytest.raises(vtr.UnsupportedError, match="load_text_tower"):
        CDPruner(6, relevance="clip").compress(picture(policy))


def test_long_questions() -> None:
    ids = [98, *range(1, 12), 99]
    assert rows_of_ids(ids, 13, "whole") == [ids]
    assert rows_of_ids(ids, 5, "official") == [[98, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 99]]
    whole = [[98, 1, 2, 3, 99], [98, 4, 5, 6, 99], [98, 7, 8, 9, 99], [98, 10, 11, 99]]
    assert rows_of_ids(ids, 5, "whole") == whole and rows_of_ids(ids, 5, "cut") == whole[:1]


# ------------------------------------------------------------------------------------------------------ right behaviour
def test_more_tokens_than_rank_and_equal_relevance() -> None:
    """The most relevant of the others follow; none is taken twice, nothing is NaN."""
    features = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    relevance = torch.linspace(0.1, 1, 30).repeat(2, 1)
    picks, _ = determinant(unit(features), relevance, 12)
    rest = [i for i in range(29, -1, -1) if i not in picks[0, :3].tolist()]
    assert picks[0, 3:].tolist() == rest[:9] and len(set(picks[1].tolist())) == 12
    same, _ = determinant(unit(torch.ones(1, 9, 4)), torch.ones(1, 9), 5)
    assert same[0].tolist() == [0, 1, 2, 3, 4]
    none, _ = determinant(torch.zeros(1, 9, 4), torch.zeros(1, 9), 5)
    assert none[0].tolist() == [0, 1, 2, 3, 4]


def test_padding_takes_no_part() -> None:
    layout = anyres_layout((90, 60), ((168, 84),), 84, 6)
    made = torch.Generator().manual_seed(0)
    tiles, words = torch.randn(3, 36, 16, generator=made), torch.randn(4, 16, generator=made)
    for keep in (0.25, 1, 5, 0, 36):
        for some in (words, words[:0]):
            policy = CDPruner(keep, relevance="embeddings")
            kept = policy.compress(seen(tiles, layout, question=some))
            assert isinstance(kept, Tensor) and len(set(kept.tolist())) == len(kept) == policy.kept_of(layout)


def test_relevance_decides() -> None:
    """theta near 1: the tokens that are the question; 0: it plays no part."""
    tiles = torch.randn(1, 36, 64, generator=torch.Generator().manual_seed(0))
    asked = [seen(tiles, question=tiles[0, a : a + 3]) for a in (0, 10)]
    near = [CDPruner(3, relevance="embeddings", theta=0.95).compress(image).tolist() for image in asked]  # type: ignore[union-attr]
    assert near == [[0, 1, 2], [10, 11, 12]]
    far = [CDPruner(3, relevance="embeddings", theta=0.0).compress(image).tolist() for image in asked]  # type: ignore[union-attr]
    assert far[0] == far[1]


@pytest.mark.parametrize("wrong", [{"relevance": "x"}, {"theta": 1.0}, {"placement": "x"}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CDPruner(**wrong)
    with pytest.raises(TypeError, match="question"):
        CDPruner(question=3)  # type: ignore[arg-type]
