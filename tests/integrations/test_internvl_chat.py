"""InternVL's remote code as its users call it: ``generate(pixel_values, input_ids, attention_mask)`` and ``chat``.

What every policy does on it is in ``tests/integrations/test_support.py``, against transformers' InternVL with the same
weights.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vtr.integrations.internvl_chat import InternVLChat

import vtr
from tests import internvl_chat, tiny
from tests.engine.test_oracles import close
from tests.tiny import IMAGE, IMAGE_ID, SIDE
from vtr.engine.adapters import find_adapter
from vtr.learned import differing, fingerprint

ROWS = [["ab", IMAGE, "what"], ["abcdef"], [IMAGE, "cde"]]
POLICIES = [vtr.FastV(0.3), None, vtr.GlobalCom2(0.5)]
RUN: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": tiny.NEVER, "pad_token_id": tiny.PAD}


@pytest.fixture(scope="module")
def native() -> Any:
    return tiny.internvl(lm="llama")


@pytest.fixture
def chat(native: Any) -> Any:
    return vtr.patch(internvl_chat.converted(native))


class Tokenizer:
    """Letters to ids as ``tests.tiny`` has them, and the three marks that ``chat`` puts around images."""

    MARKS = ("<IMG_CONTEXT>", "</img>", "<img>")
    IDS = (IMAGE_ID, tiny.END_IMG, tiny.IMG)

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.IDS[self.MARKS.index(token)]

    def __call__(self, text: str, return_tensors: str) -> dict[str, Tensor]:
        ids = [tiny.BOS]
        while text:
            mark = next((m for m in self.MARKS if text.startswith(m)), text[0])
            ids.append(self.convert_tokens_to_ids(mark) if mark in self.MARKS else 8 + (ord(mark) - 97) % 50)
            text = text[len(mark) :]
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in ids]


def test_chat_takes_a_policy(native: Any, chat: Any) -> None:
    """In its generation config, from a block, as the default; the answer is that of transformers' class."""
    tiles, tokenizer, policy = torch.randn(5, 3, SIDE, SIDE), Tokenizer(), "fastv:keep=0.2,layer=1"
    asked = tokenizer(f"ab<img>{'<IMG_CONTEXT>' * 45}</img>cd", return_tensors="pt")
    other = vtr.patch(copy.deepcopy(native))
    want = other.generate(**asked, pixel_values=tiles, policy=policy, **RUN)[0, -4:].tolist()
    chat.img_context_token_id = None  # chat sets it
    said = chat.chat(tokenizer, tiles, "ab<image>cd", {**RUN, "policy": policy})
    assert list(map(int, said.split())) == want
    assert vtr.report(chat).rows[0].vision_tokens == [45, 9, 9, 9, 9]
    assert vtr.report(chat).steps == 3
    with vtr.use(chat, policy):
        assert chat.chat(tokenizer, tiles, "ab<image>cd", dict(RUN)) == said
    vtr.patch(chat, policy)
    assert chat.chat(tokenizer, tiles, "ab<image>cd", dict(RUN)) == said
    full = chat.chat(tokenizer, tiles, "ab<image>cd", {**RUN, "policy": None})
    assert full == internvl_chat.converted(native).chat(tokenizer, tiles, "ab<image>cd", dict(RUN))
    assert vtr.report(chat).rows[0].vision_tokens == [45] * 5 and vtr.report(chat).steps == 3


def test_arguments_by_place(native: Any, chat: Any) -> None:
    """pixel_values comes first in this generate."""
    inputs = tiny.batch(native, ROWS)
    given = inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"]
    out = chat.generate(*given, policy=POLICIES, **RUN)
    assert torch.equal(out, chat.generate(**inputs, policy=POLICIES, **RUN))
    assert out.shape == (3, 4)  # new tokens only, as ever


def test_beams_and_sampling_several(native: Any, chat: Any) -> None:
    inputs, other = tiny.batch(native, ROWS), vtr.patch(copy.deepcopy(native))
    search = {**RUN, "num_beams": 3, "num_return_sequences": 2, "policy": POLICIES}
    assert torch.equal(chat.generate(**inputs, **search), other.generate(**inputs, **search)[:, -4:])


def test_a_copy_is_patched_for_itself(native: Any, chat: Any) -> None:
    inputs = tiny.batch(native, ROWS)
    want, made = chat.generate(**inputs, policy=POLICIES, **RUN), copy.deepcopy(chat)
    vtr.unpatch(chat)
    assert torch.equal(made.generate(**inputs, policy=POLICIES, **RUN), want)
    assert not chat.language_model._forward_pre_hooks and not chat._forward_pre_hooks


def breaks(*_: Any) -> None:
    raise RuntimeError("broke")


def test_the_language_model_by_itself_is_left_alone(native: Any, chat: Any) -> None:
    """Also under a default policy, also with ids that would be vision tokens, also after a forward that broke off."""
    ids = tiny.batch(native, ROWS)["input_ids"]
    plain = internvl_chat.converted(native).language_model
    vtr.patch(chat, "random:keep=0.2")
    with torch.no_grad():
        want = plain(input_ids=ids).logits
        assert torch.equal(chat.language_model(input_ids=ids).logits, want)
        inputs = tiny.batch(native, ROWS)
        flags = torch.ones(len(inputs["pixel_values"]), 1)
        broken = chat.mlp1.register_forward_hook(breaks)
        with pytest.raises(RuntimeError, match="broke"):  # the request has been made, the language model not reached
            chat(**inputs, image_flags=flags)
        broken.remove()
        assert torch.equal(chat.language_model(input_ids=ids).logits, want)


def test_text_without_images(native: Any, chat: Any) -> None:
    inputs = tiny.batch(native, [["abc"], ["defgh"]])
    want = internvl_chat.converted(native).generate(**inputs, **RUN)
    assert torch.equal(chat.generate(**inputs, policy="fastv", **RUN), want)


def test_what_it_cannot_do(native: Any, chat: Any) -> None:
    inputs = tiny.batch(native, ROWS)
    features = chat.extract_feature(inputs["pixel_values"])
    with pytest.raises(vtr.UnsupportedError, match="not visual_features"):
        chat.generate(**inputs, visual_features=features, policy="fastv", **RUN)
    flags = torch.ones(len(inputs["pixel_values"]) + 1, 1)
    flags[0] = 0
    more = torch.cat([torch.zeros(1, 3, SIDE, SIDE), inputs["pixel_values"]])
    with pytest.raises(vtr.UnsupportedError, match="leave such tiles out"):
        chat(**{**inputs, "pixel_values": more}, image_flags=flags, policy="fastv")
    chat.ps_version = "v1"
    with pytest.raises(vtr.UnsupportedError, match="on its side"):
        chat.generate(**inputs, policy="fastv", **RUN)
    chat.ps_version, chat.img_context_token_id = "v2", None
    with pytest.raises(ValueError, match="convert_tokens_to_ids"):
        chat.generate(**inputs, policy="fastv", **RUN)


def test_flags_of_a_batch_without_images(native: Any, chat: Any) -> None:
    """Training pads such batches with a tile that belongs to nobody."""
    inputs = {**tiny.batch(native, [["abc"], ["defgh"]]), "pixel_values": torch.zeros(1, 3, SIDE, SIDE)}
    with torch.no_grad():
        got = chat(**inputs, image_flags=torch.zeros(1, 1), policy="random:keep=0.1").logits
        want = native(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    real = inputs["attention_mask"].bool()
    close(got[real], want[real])


def test_it_is_known_by_its_parts(native: Any) -> None:
    """Forks call the class otherwise."""
    made = internvl_chat.converted(native)
    made.__class__ = type("MyInternVL", (internvl_chat.InternVLChatModel,), {})
    assert isinstance(find_adapter(made), InternVLChat)
    made = types.SimpleNamespace()
    with pytest.raises(TypeError, match="needs a model"):
        vtr.patch(made)


def test_weights_know_the_model_in_either_shape(native: Any, chat: Any) -> None:
    """Learned on transformers' class, used on the remote code; and not with another model's weights."""
    ours, theirs = fingerprint(native), fingerprint(chat)
    assert ours == theirs
    assert differing(fingerprint(tiny.internvl(seed=1)), theirs)


class Layer(nn.Module):
    """A decoder layer with InternLM2's names for its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = nn.Linear(4, 4), nn.Linear(4, 4)


class InternLM2ForCausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer()])


@pytest.mark.parametrize("kind", ["InternLM2", "Phi3"])
def test_other_language_models_are_refused_with_a_way_out(native: Any, kind: str) -> None:
    language = InternLM2ForCausalLM()
    if kind == "Phi3":  # that of the repository: rope is made in every attention
        language.model.layers[0].self_attn, language.model.layers[0].mlp = nn.Linear(4, 4), nn.Linear(4, 4)
    config = native.config
    model = internvl_chat.InternVLChatModel(PretrainedConfig(), config.vision_config, config.text_config, language)
    with pytest.raises(vtr.UnsupportedError, match="Qwen2"):
        vtr.patch(model)
    assert "generate" not in vars(model)
