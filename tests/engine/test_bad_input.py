"""Misuse: each gets its own exception with a message that names the fix, and the model stays as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import vtr
from tests import tiny


@vtr.register_policy("bad-shape-for-test")
@dataclass
class BadShape(vtr.Policy):
    """Answers with floats."""

    def prune(self, layer: int, tokens: vtr.Tokens) -> torch.Tensor:
        return torch.zeros(3)


@vtr.register_policy("out-of-range-for-test")
@dataclass
class OutOfRange(vtr.Policy):
    """Keeps a token that is not there, in the middle of the decoder."""

    def prune(self, layer: int, tokens: vtr.Tokens) -> torch.Tensor | None:
        return torch.tensor([0, len(tokens)]) if layer == 2 else None


@vtr.register_policy("longer-for-test")
@dataclass
class Longer(vtr.Policy):
    """Makes an image longer."""

    def compress(self, image: vtr.Image) -> vtr.Pooled:
        twice = torch.cat([image.features, image.features])
        return vtr.Pooled(twice, [[i % len(image)] for i in range(len(twice))])


class World:
    """A patched model, a batch of three rows, and what the model says without vtr."""

    def __init__(self) -> None:
        self.model = tiny.llava_next()
        self.inputs = tiny.batch(
            self.model, [["ab", tiny.IMAGE, "cde"], ["a", tiny.IMAGE, "b", tiny.IMAGE, "cd"], ["abcdef"]]
        )
        self.ids = self.inputs["input_ids"]
        self.before = self.answer()
        vtr.patch(self.model)

    def answer(self) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = self.model(**self.inputs).logits
        return logits, tiny.generate(self.model, self.inputs, max_new_tokens=4)

    def unchanged(self) -> None:
        for a, b in zip(self.answer(), self.before, strict=True):
            assert torch.equal(a, b)
        tiny.generate(self.model, self.inputs, policy="random:keep=0.5", max_new_tokens=2)  # and still reduces

    def run(self, policy: Any, **changes: Any) -> Any:
        return self.model(**{**self.inputs, **changes}, policy=policy)

    def generate(self, policy: Any, **changes: Any) -> Any:
        return tiny.generate(self.model, {**self.inputs, **changes}, policy=policy, max_new_tokens=3)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def static_cache(w: World) -> Any:
    return StaticCache(config=w.model.config.text_config, max_cache_len=512)


def filled_cache(w: World) -> Any:
    cache = DynamicCache(config=w.model.config.text_config)
    w.model(**w.inputs, past_key_values=cache)
    return cache


def no_tokens_in_row_2(w: World) -> torch.Tensor:
    mask = w.inputs["attention_mask"].clone()
    mask[2] = 0
    return mask


def ends_in_image(w: World) -> dict[str, Any]:
    return tiny.batch(w.model, [["ab", tiny.IMAGE]])


def enter(manager: Any) -> None:
    with manager:
        pass


F = "fastv:keep=0.5,layer=2"
MISUSES: dict[str, tuple[type[Exception], str, Callable[[World], Any]]] = {
    "unknown policy": (ValueError, r"unknown policy .fastvv. .did you mean fastv.*known: ", lambda w: w.run("fastvv")),
    "unknown setting": (ValueError, "has no setting 'ratio'; it has: keep, layer", lambda w: w.run("fastv:ratio=0.5")),
    "unreadable spec": (ValueError, "write name:key=value", lambda w: w.run("fastv:layer=2,0.5")),
    "ratio above one": (ValueError, "for a count of tokens pass an int", lambda w: w.run("fastv:keep=1.5")),
    "negative count": (ValueError, "cannot be negative", lambda w: w.run("random:keep=-4")),
    "keep is text": (TypeError, "keep must be an int", lambda w: w.run("random:keep=half")),
    "keep is a bool": (TypeError, "keep must be an int", lambda w: vtr.Random(keep=True)),
    "attention before layer 0": (ValueError, "at least 1", lambda w: vtr.FastV(layer=0)),
    "layer beyond the model": (ValueError, "has 5 decoder layers: choose 1…4", lambda w: w.run("fastv:layer=5")),
    "schedule too short": (ValueError, "3 entries, but the model has 5", lambda w: w.run(vtr.GSearch([1.0, 0.5, 0.5]))),
    "schedule cuts layer 0": (ValueError, "must be 1.0", lambda w: vtr.GSearch([0.5] * 5)),
    "schedule grows": (ValueError, "never grows", lambda w: vtr.Schedule([1.0, 0.5, 0.6])),
    "schedule keeps nothing": (ValueError, "a count is at least 1", lambda w: vtr.Schedule([1.0, 0])),
    "policies ≠ rows": (ValueError, "2 policies for 3 rows", lambda w: w.run([F, None])),
    "policies ≠ rows in generate": (ValueError, "4 policies for 3 rows", lambda w: w.generate([F] * 4)),
    "policy of another type": (TypeError, "spec string like", lambda w: w.run(0.5)),
    "no image": (ValueError, "no image: pass pixel_values", lambda w: w.run(F, pixel_values=None, image_sizes=None)),
    "no image in generate": (ValueError, "no image: pass pixel_values", lambda w: w.generate(F, pixel_values=None)),
    "no image sizes": (ValueError, "needs image_sizes beside", lambda w: w.generate(F, image_sizes=None)),
    "an image too few": (
        ValueError,
        "tokenize text and images in one processor call",
        lambda w: w.generate(F, pixel_values=w.inputs["pixel_values"][:2], image_sizes=w.inputs["image_sizes"][:2]),
    ),
    "an image too many": (
        ValueError,
        "left over",
        lambda w: w.generate(
            F,
            pixel_values=w.inputs["pixel_values"][[0, 1, 2, 0]],
            image_sizes=w.inputs["image_sizes"][[0, 1, 2, 0]],
        ),
    ),
    "nothing to rank with": (
        ValueError,
        "put the question behind the image",
        lambda w: w.model(**ends_in_image(w), policy=F),
    ),
    "static cache": (vtr.UnsupportedError, "plain DynamicCache", lambda w: w.run(F, past_key_values=static_cache(w))),
    "offloaded static cache by name": (
        vtr.UnsupportedError,
        "take cache_implementation='static'",
        lambda w: w.generate(F, cache_implementation="offloaded_static"),
    ),
    "a cache filled unreduced": (
        vtr.UnsupportedError,
        "pass the policy from the first call",
        lambda w: w.run(F, past_key_values=filled_cache(w)),
    ),
    "another batch's cache": (
        ValueError,
        "1 rows for a cache of 3",
        lambda w: w.model(input_ids=w.ids[:1, -1:], past_key_values=w.run(F, use_cache=True).past_key_values),
    ),
    "attentions": (vtr.UnsupportedError, "output_attentions=True", lambda w: w.run(F, output_attentions=True)),
    "hidden states": (vtr.UnsupportedError, "policy=None", lambda w: w.generate(F, output_hidden_states=True)),
    "a 4-D mask": (
        vtr.UnsupportedError,
        "2-D attention_mask",
        lambda w: w.run(F, attention_mask=torch.ones(3, 1, w.ids.shape[1], w.ids.shape[1], dtype=torch.bool)),
    ),
    "an empty row": (ValueError, "row 2 has no tokens", lambda w: w.run(F, attention_mask=no_tokens_in_row_2(w))),
    "embeddings only": (
        vtr.UnsupportedError,
        "hold no image placeholder",
        lambda w: w.model(inputs_embeds=torch.randn(3, 50, 48), policy=F),
    ),
    "embeddings without pixels": (
        ValueError,
        "but no image",
        lambda w: w.model(inputs_embeds=w.model.get_input_embeddings()(w.ids), policy=F),
    ),
    "a policy that answers floats": (TypeError, "BadShape.prune must return a 1-D int64", lambda w: w.run(BadShape())),
    "a policy out of range": (ValueError, "OutOfRange.prune must return distinct", lambda w: w.generate(OutOfRange())),
    "a policy that lengthens": (ValueError, "cannot become longer", lambda w: w.generate(Longer())),
    "not a model": (TypeError, "needs a model", lambda w: vtr.patch("llava")),
    "an unknown family": (
        vtr.UnsupportedError,
        "LlamaForCausalLM is no model family.*LLaVA-1.5.*To add one",
        lambda w: vtr.patch(
            LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))
        ),
    ),
    "a default that cannot work": (ValueError, "choose 1…4", lambda w: vtr.patch(w.model, policy="fastv:layer=9")),
    "use of an unpatched model": (ValueError, "call vtr.patch", lambda w: enter(vtr.use(torch.nn.Linear(1, 1), F))),
    "use of a bad policy": (ValueError, "unknown policy", lambda w: enter(vtr.use(w.model, "none-such"))),
    "a report of nothing": (ValueError, "nothing to report yet", lambda w: vtr.report(vtr.patch(tiny.llava()))),
    "a report of an unpatched model": (ValueError, "call vtr.patch", lambda w: vtr.report(tiny.llava())),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_misuse(world: World, name: str) -> None:
    error, message, misuse = MISUSES[name]
    with torch.no_grad(), pytest.raises(error, match=message) as caught:
        misuse(world)
    assert caught.type is error
    world.unchanged()


def test_an_unpatched_model_cannot_go_on_with_a_ragged_cache(world: World) -> None:
    with torch.no_grad():
        cache = world.run(F, use_cache=True).past_key_values
        other = tiny.llava_next()
        mask = torch.cat([world.inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        with pytest.raises(vtr.UnsupportedError, match="rows of different lengths"):
            other(input_ids=world.ids[:, -1:], attention_mask=mask, past_key_values=cache)
    world.unchanged()


def test_unpatch_while_generating_is_refused(world: World) -> None:
    class Unpatcher:
        def put(self, value: Any) -> None:
            vtr.unpatch(world.model)

        def end(self) -> None: ...

    with pytest.raises(RuntimeError, match="it is generating"):
        tiny.generate(world.model, tiny.single(world.inputs, 0, world.model), streamer=Unpatcher(), max_new_tokens=2)
    world.unchanged()
