"""Decoders that are not plainly causal, or whose layers are not all alike: they pass the oracles of the others.

Images that look both ways (Gemma3, Gemma4, Molmo2), whole prompts that do (PaliGemma), layers without rope (Muse
Glimmer, Aya Vision) or with rope of their kind, chunks (Llama4), latents in the cache (Kimi-K2.5), heads and arguments
that differ by layer (Gemma4). On tiny random models, whose placeholders are painted.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, ClassVar

import pytest
import torch

import vtr
from tests.models import paint, tiny
from tests.models.oracles import INSIDE, PASSES, TOLERANCE, Oracles
from vtr.base import UnsupportedError
from vtr.engine.install import patch_of

CLASSES = {
    "Gemma3": "Gemma3ForConditionalGeneration", "PaliGemma": "PaliGemmaForConditionalGeneration",
    "Molmo2": "Molmo2ForConditionalGeneration", "Gemma4": "Gemma4ForConditionalGeneration",
    "Llama4": "Llama4ForConditionalGeneration", "Kimi-K2.5": "Kimi_K25ForConditionalGeneration",
    "Muse Glimmer": "MuseGlimmerForConditionalGeneration", "Aya Vision": "AyaVisionForConditionalGeneration",
}  # fmt: skip
BOTH_WAYS = ("Gemma3", "PaliGemma", "Molmo2", "Gemma4")
pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def oracles(name: str, attn: str = "sdpa") -> Oracles:
    model = tiny.build(CLASSES[name], attn)
    paint.paint(model)
    stock = copy.deepcopy(model)
    vtr.patch(model, self_test=False)
    assert patch_of(model).path == "packed", patch_of(model).why
    paint.by_runs(model)
    return Oracles(stock, model)


def alone(name: str, policy: Any, row: int = 0, **kwargs: Any) -> torch.Tensor:
    """[steps, vocabulary]: what a row says by itself under a policy."""
    one = oracles(name)
    return paint.generate(one.model, paint.batch([one.rows[row]]), policy=policy, **kwargs)[0][:, 0]


@pytest.mark.slow  # the fast tests of tests/models ask it of most of them
@pytest.mark.parametrize("name", CLASSES)
def test_off_is_off(name: str) -> None:
    assert oracles(name).off()


@pytest.mark.slow  # the fast tests of tests/models ask it of most of them
@pytest.mark.parametrize("name", CLASSES)
def test_tokens_are_dropped_inside_the_decoder(name: str) -> None:
    assert oracles(name).policy("fastv") == PASSES


@pytest.mark.slow
@pytest.mark.parametrize("policy", [*INSIDE, "random", "m3", "reroute", "ee-mllm", "zipvl", "dynamic-llava"])
@pytest.mark.parametrize("name", CLASSES)
def test_other_policies(name: str, policy: str) -> None:
    said = oracles(name).policy(policy)
    if name == "Molmo2" and policy == "renumbered":
        assert "rotary embeddings of their own" in said
    else:
        assert said == PASSES or (policy == "zipvl" and said == "fails: acts")  # it may find nothing to leave out


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fastv", "gsearch", "random", "renumbered"])
@pytest.mark.parametrize("name", CLASSES)
def test_eager_attention(name: str, policy: str) -> None:
    said = oracles(name, "eager").policy(policy)
    assert said == PASSES or (name == "Molmo2" and policy == "renumbered")


@pytest.mark.parametrize("name", CLASSES)
def test_static_cache(name: str) -> None:
    one = oracles(name)
    inputs, policies = paint.batch(one.rows), ["fastv:keep=0.5,layer=2", "random:keep=0.5,before_decoder=true", None]
    growing = paint.generate(one.model, inputs, policy=policies)[0]
    static = paint.generate(one.model, inputs, policy=policies, cache_implementation="static")[0]
    assert paint.apart(growing, static) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_beams(name: str) -> None:
    one = oracles(name)
    policies = ["fastv:keep=0.5,layer=2", "uniform:keep=0.5", None]
    more = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    more["suppress_tokens"] = list(range(100, 160))  # placeholders, and words that not every embedding has

    def said(rows: list[list[int]], policy: Any) -> torch.Tensor:
        inputs = paint.batch(rows)
        with torch.no_grad():
            return one.model.generate(**inputs, **paint.extras(one.model, inputs), policy=policy, **more)[:, -4:]

    together = said(one.rows, policies)
    assert torch.equal(together, torch.cat([said([r], [p]) for r, p in zip(one.rows, policies, strict=True)]))


class Both(vtr.Policy):
    """Keeps all; notes what a layer is about to pay, and what it then was found to have paid."""

    name: ClassVar[str] = "both"

    def __init__(self) -> None:
        self.ahead: dict[int, torch.Tensor] = {}
        self.found: dict[int, torch.Tensor] = {}

    def needs(self, layer: int) -> Any:
        return "last" if layer else None

    def prune(self, layer: int, tokens: Any) -> None:
        if tokens.scores is not None:
            self.found[layer - 1] = tokens.scores
        self.ahead[layer] = tokens.ahead()

    @property
    def spec(self) -> str:
        return "both"


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_layer_is_about_to_pay_is_what_it_pays(name: str) -> None:
    one, policy = oracles(name), Both()
    inputs = paint.batch([one.rows[1]])
    with torch.no_grad():
        one.model(**inputs, **paint.extras(one.model, inputs), policy=policy, use_cache=False)
    assert policy.found and all(
        torch.allclose(policy.ahead[at], found, atol=1e-6) for at, found in policy.found.items()
    )


@pytest.mark.parametrize("name", ["Gemma3", "PaliGemma", "Molmo2"])
def test_attention_that_ranks_is_the_models_own(name: str) -> None:
    one, seen = oracles(name, "eager"), {}

    class Ranked(Both):
        def needs(self, layer: int) -> Any:
            return "text" if layer == 2 else vtr.Attention("vision", over="each", heads="mean") if layer == 3 else None

        def prune(self, layer: int, tokens: Any) -> None:
            seen[layer] = tokens.scores

    row = one.rows[1]
    inputs = paint.batch([row])
    more = paint.extras(one.stock, inputs)
    with torch.no_grad():
        one.model(**inputs, **more, policy=Ranked(), use_cache=False)
        attentions = one.stock(**inputs, **more, output_attentions=True, use_cache=False).attentions
    ids = torch.tensor(row)
    vision = (ids == paint.marks(one.stock)[0]).nonzero()[:, 0]
    text = torch.tensor([i for i in range(len(row)) if i not in vision.tolist() and i > vision[0]])
    paid = attentions[1][0].mean(0)[text][:, vision]
    sees = (attentions[1][0].mean(0)[text][:, vision] > 0).sum(0)
    assert torch.allclose(seen[2], paid.sum(0) / sees, atol=1e-6)
    assert torch.allclose(seen[3], attentions[2][0].mean(0)[vision][:, vision], atol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_question_and_answer_in_one_forward(name: str) -> None:
    one = oracles(name)
    row, answer = one.rows[0], [70, 71, 72]
    want = alone(name, "fastv:keep=0.5,layer=2")[: len(answer) + 1]
    inputs = paint.batch([[*row, *answer]])
    more = paint.extras(one.model, inputs)
    if name == "PaliGemma":  # the answer is no part of the prompt that sees itself
        more["token_type_ids"][:, len(row) :] = 1
    with torch.no_grad():
        logits = one.model(**inputs, **more, policy="fastv:keep=0.5,layer=2", vtr_queries_end=len(row)).logits[0]
    assert paint.apart(logits[-4:], want) <= TOLERANCE


@pytest.mark.parametrize("name", ["Gemma3", "Gemma4", "Llama4", "Kimi-K2.5", "Muse Glimmer"])
def test_another_turn(name: str) -> None:
    """More text behind the cache of a reduced prompt is as good as the whole conversation without one."""
    one, policy = oracles(name), "uniform:keep=0.5"
    first, second = one.rows[0], [41, 42, 43, 44, 45]
    inputs = paint.batch([first])
    with torch.no_grad():
        kept = one.model(**inputs, **paint.extras(one.model, inputs), policy=policy, use_cache=True)
        cached = kept["cache" if "cache" in kept else "past_key_values"]
        behind = {"input_ids": torch.tensor([second]), "attention_mask": torch.ones(1, len(first) + 5).long()}
        behind |= paint.extras(one.model, {"input_ids": behind["input_ids"]})
        got = one.model(**behind, past_key_values=cached).logits[0, -1]
        whole = paint.batch([[*first, *second]])
        want = one.model(**whole, **paint.extras(one.model, whole), policy=policy, use_cache=False).logits[0, -1]
    assert paint.apart(got, want) <= TOLERANCE


@pytest.mark.parametrize("name", ["Gemma4", "Kimi-K2.5"])
def test_sizes_that_differ_are_counted(name: str) -> None:
    one = oracles(name)
    inputs = paint.batch([one.rows[0]])
    with torch.no_grad():
        cache_of = one.model(**inputs, **paint.extras(one.model, inputs), policy="uniform:keep=0.5", use_cache=True)
    layers = cache_of["cache" if "cache" in cache_of else "past_key_values"].layers
    live = sum(layer.lengths()[0] * (k.shape[1] * k.shape[3] + v.shape[1] * v.shape[3]) for layer in layers
               for k, v in [(layer.buckets[0].keys, layer.buckets[0].values)])  # fmt: skip
    assert vtr.report(one.model).kv_bytes == 4 * live


def test_chunks_begin_behind_the_padding() -> None:
    one = oracles("Llama4")
    inputs = paint.batch([one.rows[0], one.rows[2]])
    with pytest.raises(UnsupportedError, match="position_ids"):
        one.model(**inputs, policy="uniform:keep=0.5")


def test_queries_are_scaled_by_position() -> None:
    """Llama4's layers without rope count columns, which packed rows do not have: a long prompt, made short here."""
    model = tiny.build(CLASSES["Llama4"])
    assert not all(layer.self_attn.use_rope for layer in model.language_model.model.layers)
    for layer in model.language_model.model.layers:
        layer.self_attn.floor_scale = 8
    paint.paint(model)
    stock = copy.deepcopy(model)
    paint.by_runs(vtr.patch(model, self_test=False))
    one = Oracles(stock, model)
    one.__dict__["unsteady"] = []
    assert [one.policy(name) for name in ("fastv", "random")] == [PASSES] * 2
    whole = paint.batch(one.rows)
    policies = ["fastv:keep=0.5,layer=2", "random:keep=0.5,before_decoder=true", None]
    growing = paint.generate(model, whole, policy=policies)[0]
    static = paint.generate(model, whole, policy=policies, cache_implementation="static")[0]
    assert paint.apart(growing, static) <= TOLERANCE
    look, inputs = Both(), paint.batch([one.rows[1]])
    with torch.no_grad():
        model(**inputs, policy=look, use_cache=False)
    assert all(torch.allclose(look.ahead[at], found, atol=1e-6) for at, found in look.found.items())


def test_a_mask_of_the_callers_own_is_refused() -> None:
    one = oracles("Gemma3")
    inputs = paint.batch([one.rows[0]])
    inputs["attention_mask"] = torch.ones(1, 1, len(one.rows[0]), len(one.rows[0])).bool()
    with pytest.raises(UnsupportedError, match="2-D attention_mask"):
        one.model(**inputs, policy="uniform:keep=0.5")


def test_a_search_stops_midway_only_where_layers_are_alike() -> None:
    with pytest.raises(UnsupportedError, match="do not all take the same arguments"):
        patch_of(oracles("Muse Glimmer").model).decoder.check_midway()
