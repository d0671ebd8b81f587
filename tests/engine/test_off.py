"""Off is off in every mode of transformers' own tests: without a policy, patched equals stock, bit for bit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

import vtr
from tests import tiny
from tests.conftest import Pair
from tests.loads import gradients, labels, trainable
from tests.tiny import IMAGE

ROWS = [["ab", IMAGE, "what"], ["a", IMAGE, "bc", IMAGE, "whichone"], ["abcdef"], ["abcd", IMAGE, "efg"]]


@pytest.fixture(params=tiny.FAMILIES)
def models(request: pytest.FixtureRequest) -> Pair:
    """The stock model and a patched copy that has already reduced once."""
    stock = getattr(tiny, request.param)()
    patched = vtr.patch(copy.deepcopy(stock))
    tiny.generate(patched, tiny.batch(stock, ROWS), policy="fastv:keep=0.25,layer=2", max_new_tokens=2)
    return Pair(stock, patched)


def generated(model: Any, inputs: dict[str, Tensor], **how: Any) -> list[Tensor]:
    torch.manual_seed(3)
    out = tiny.generate(
        model, inputs, **{"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True, **how}
    )
    return [out.sequences, *out.logits]


def forwarded(model: Any, inputs: dict[str, Tensor], **how: Any) -> list[Tensor]:
    with torch.no_grad():
        out = model(**inputs, **how)
    several = [t for name in ("hidden_states", "attentions") for t in getattr(out, name, None) or ()]
    return [out.logits, *several]


def continued(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """A prompt, then more tokens over its cache, then a generate that goes on from there."""
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        more = torch.full((len(ROWS), 3), 9)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        second = model(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    ids = torch.cat([inputs["input_ids"], more, torch.full((len(ROWS), 1), 9)], 1)
    mask = torch.cat([mask, torch.ones(len(ROWS), 1, dtype=mask.dtype)], 1)
    out = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=second.past_key_values, max_new_tokens=3, do_sample=False,
        suppress_tokens=tiny.NEVER, pad_token_id=tiny.PAD,
    )  # fmt: skip
    return [first.logits, second.logits, out]


def from_embeds(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """inputs_embeds with placeholders and pixel_values, as forward; text embeddings alone, as generate."""
    table, given = model.get_input_embeddings(), dict(inputs)
    given["inputs_embeds"] = table(given.pop("input_ids")).detach()
    text = tiny.batch(model, [["abcd"], ["efghij"]])
    words = {"inputs_embeds": table(text["input_ids"]).detach(), "attention_mask": text["attention_mask"]}
    return [*forwarded(model, given), *generated(model, words)]


def resized(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    model.resize_token_embeddings(80, mean_resizing=False)
    return forwarded(model, inputs)


def trained(model: Any, inputs: dict[str, Tensor], checkpointing: bool) -> list[Tensor]:
    """Loss and gradients of a step, and the logits after it."""
    model = trainable(copy.deepcopy(model))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**inputs, labels=labels(inputs), use_cache=False).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return [loss.detach(), *gradients(model).values(), *forwarded(model.eval(), inputs)]


def assisted(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    one = tiny.single(inputs, 0, model)
    return generated(model, one, prompt_lookup_num_tokens=2, max_new_tokens=8)


def static(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    return generated(model, inputs, cache_implementation="static", disable_compile=True)


def with_hidden_states(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    return forwarded(model, inputs, output_hidden_states=True)


def with_attentions(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True  # transformers refuses it under another name than eager
    return forwarded(model, inputs) + forwarded(model, inputs, output_attentions=True)


def in_half(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    model = copy.deepcopy(model).to(torch.bfloat16)
    given = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in inputs.items()}
    return forwarded(model, given)


MODES: dict[str, Callable[[Any, dict[str, Tensor]], list[Tensor]]] = {
    "forward": forwarded,
    "forward without cache": lambda m, x: forwarded(m, x, use_cache=False),
    "logits_to_keep": lambda m, x: forwarded(m, x, logits_to_keep=2),
    "hidden states": with_hidden_states,
    "attentions": with_attentions,
    "labels": lambda m, x: [m(**x, labels=labels(x)).loss.detach()],
    "greedy": generated,
    "greedy without cache": lambda m, x: generated(m, x, use_cache=False),
    "sample": lambda m, x: generated(m, x, do_sample=True, temperature=0.7, top_k=20),
    "several samples": lambda m, x: generated(m, x, do_sample=True, num_return_sequences=2),
    "beams": lambda m, x: generated(m, x, num_beams=3, num_return_sequences=2),
    "sampled beams": lambda m, x: generated(m, x, num_beams=2, do_sample=True),
    "a generation config": lambda m, x: [
        m.generate(
            **x, generation_config=GenerationConfig(max_new_tokens=4, suppress_tokens=tiny.NEVER, pad_token_id=0)
        )
    ],
    "prompt lookup": assisted,
    "static cache": static,
    "a cache of one's own": lambda m, x: generated(m, x, past_key_values=DynamicCache(config=m.config.text_config)),
    "continue": continued,
    "inputs_embeds": from_embeds,
    "resized embeddings": resized,
    "a training step": lambda m, x: trained(m, x, False),
    "gradient checkpointing": lambda m, x: trained(m, x, True),
    "bfloat16": in_half,
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_patched_without_a_policy_is_the_stock_model(models: Pair, mode: str, padding: str) -> None:
    inputs = tiny.batch(models.stock, ROWS, padding)
    want, got = MODES[mode](models.stock, inputs), MODES[mode](models.patched, inputs)
    assert len(want) == len(got) and want
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


def test_saved_and_loaded(models: Pair, tmp_path: Path) -> None:
    inputs = tiny.batch(models.stock, ROWS)
    models.patched.save_pretrained(tmp_path)
    loaded = type(models.stock).from_pretrained(tmp_path, attn_implementation="sdpa")
    assert torch.equal(forwarded(loaded, inputs)[0], forwarded(models.stock, inputs)[0])
    assert torch.equal(forwarded(vtr.patch(loaded), inputs)[0], forwarded(models.stock, inputs)[0])


def test_attention_functions_stay_the_models_own(models: Pair) -> None:
    inputs = tiny.batch(models.stock, ROWS)
    for attention in ("eager", "sdpa"):
        for model in models:
            model.set_attn_implementation(attention)
            assert model.config._attn_implementation == model.get_decoder().config._attn_implementation == attention
        assert torch.equal(forwarded(models.patched, inputs)[0], forwarded(models.stock, inputs)[0])


def test_what_transformers_reads_off_a_patched_model(models: Pair) -> None:
    stock, patched = models
    assert inspect.signature(patched.generate) == inspect.signature(stock.generate)
    assert inspect.signature(patched.forward) == inspect.signature(stock.forward)
    assert patched.config.to_dict() == stock.config.to_dict()
    assert [name for name, _ in patched.named_modules()] == [name for name, _ in stock.named_modules()]
