"""Attention in which only some vision tokens ask, and some are seen, beside transformers' own layers under a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtr
from tests import tiny
from tests.tiny import IMAGE
from vtr.testing import dense as slow
from vtr.testing import tiny as models

ROWS = [["ab", IMAGE, "what"], ["abcdef"], ["a", IMAGE, "bc", IMAGE, "whichone"], [IMAGE, "cde"]]


@dataclass
class Some(vtr.Policy):
    """From layer 1 on ``a`` of each three vision tokens ask and ``s`` of each four are seen; -1: the same ones."""

    a: int = 1
    s: int = 2

    def attend(self, layer: int, tokens: vtr.Tokens, attention: Any) -> vtr.Attend | None:
        if layer == 0:
            return None
        every = torch.arange(len(tokens))
        asks = every[(every + layer) % 3 < self.a]
        if self.s < 0:
            return vtr.Attend(asks, asks)
        return vtr.Attend(asks, every[(every + layer) % 4 < self.s])

    def masks(self, layer: int, vision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [n] each: who asks, and who is seen, of a row whose vision tokens are marked."""
        asks, seen = ~vision, ~vision
        if layer == 0:
            return asks | True, seen | True
        number = torch.arange(int(vision.sum()))
        asks[vision] = (number + layer) % 3 < self.a
        seen[vision] = (number + layer) % 4 < self.s if self.s >= 0 else asks[vision]
        return asks, seen


@torch.no_grad()
def dense(model: Any, inputs: Any, policy: Some) -> torch.Tensor:
    """A row alone by the layers' own modules: logits [n, vocab]."""
    text, given = model.get_decoder(), slow.row(model, inputs)
    hidden, vision, n = given.embeds[None], given.vision, len(given.vision)
    positions = torch.arange(n)[None]
    rope = text.rotary_emb(hidden, position_ids=positions)
    for number, layer in enumerate(text.layers):
        asks, seen = policy.masks(number, vision)
        mask = torch.zeros(n, n).masked_fill(~(seen[None] & torch.ones(n, n, dtype=torch.bool).tril()), float("-inf"))
        mask[~asks] = 0.0  # (whatever they would get is left out)
        normed = layer.input_layernorm(hidden)
        got = layer.self_attn(
            normed, attention_mask=mask[None, None], position_embeddings=rope, position_ids=positions
        )[0]
        hidden = hidden + got * asks[None, :, None]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.get_output_embeddings()(text.norm(hidden))[0]


CASES = [(1, -1), (0, 4), (1, 2), (2, 1), (3, -1)]


@pytest.mark.parametrize(("asks", "seen"), CASES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_rows_are_what_the_definition_says(family: str, padding: str, asks: int, seen: int) -> None:
    model: Any = vtr.patch(getattr(models, family)())
    inputs, policy = tiny.batch(model, ROWS, padding), Some(asks, seen)
    mixed = [policy, policy, policy, vtr.FastV(0.5, layer=2)]
    with torch.no_grad():
        together = model(**inputs, policy=mixed).logits
    rows = vtr.report(model).rows
    for b in range(3):
        want = dense(model, tiny.single(inputs, b, model), policy)
        torch.testing.assert_close(together[b, tiny.real(inputs, b)], want, atol=3e-5, rtol=0)
        vision = inputs["input_ids"][b] == tiny.IMAGE_ID
        marks = [policy.masks(layer, vision) for layer in range(len(rows[b].vision_tokens))]
        assert rows[b].asked == [int(a[vision].sum()) for a, _ in marks]
        assert rows[b].seen == [int(s[vision].sum()) for _, s in marks]
        assert set(rows[b].vision_tokens) == {int(vision.sum())}


@pytest.mark.parametrize(("asks", "seen"), CASES)
@pytest.mark.parametrize("lm", ["llama", "mistral", "qwen3"])
def test_a_cache_changes_nothing(lm: str, asks: int, seen: int) -> None:
    model: Any = vtr.patch(models.llava_next(lm=lm))
    inputs = tiny.batch(model, ROWS)
    policy = [Some(asks, seen), None, vtr.Random(0.4), Some(asks, seen)]
    said = [
        tiny.generate(model, inputs, policy=policy, max_new_tokens=5, **way)
        for way in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert said[0].tolist() == said[1].tolist() == said[2].tolist()
    for b in range(len(ROWS)):
        alone = tiny.generate(model, tiny.single(inputs, b, model), policy=policy[b], max_new_tokens=5)
        assert alone[0, -5:].tolist() == said[0][b, -5:].tolist()


@pytest.mark.parametrize(("asks", "seen"), [(1, -1), (0, 4), (1, 2)])
def test_flops_are_those_that_were_done(asks: int, seen: int) -> None:
    model: Any = vtr.patch(models.llava(layers=4))
    model.set_attn_implementation("eager")
    inputs = tiny.batch(model, [ROWS[0]])
    counted = []
    for policy in (vtr.FastV(1.0, layer=1), Some(asks, seen)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs, policy=policy, logits_to_keep=1)
        within = counter.get_flop_counts()
        name = next(key for key in within if key.endswith(".language_model"))
        report = vtr.report(model)
        counted.append((sum(within[name].values()), report.prefill_flops + report.selector_flops))
    (_, full), (done, said) = counted
    assert said < full and abs(done - said) / done < 0.02


def test_a_cache_holds_what_was_seen() -> None:
    model: Any = vtr.patch(models.llava())
    inputs = tiny.batch(model, ROWS)
    with torch.no_grad():
        out = model(**inputs, policy=Some(1, 2), use_cache=True)
    rows, texts = (
        vtr.report(model).rows,
        [
            int((m.bool() & (i != tiny.IMAGE_ID)).sum())
            for m, i in zip(inputs["attention_mask"], inputs["input_ids"], strict=True)
        ],
    )
    for layer, cache in enumerate(out.past_key_values.layers):
        assert cache.lengths() == [row.seen[layer] + text for row, text in zip(rows, texts, strict=True)]


def test_attention_received_is_what_the_layer_pays() -> None:
    found: list[Any] = []

    @dataclass
    class Looks(vtr.Policy):
        def attend(self, layer: int, tokens: vtr.Tokens, attention: Any) -> None:
            if layer == 2:
                found.append((attention.received(tokens.text_place[-3:]), tokens.text_place[-3:]))

    model: Any = vtr.patch(models.llava_next())
    inputs = tiny.batch(model, ROWS)
    with torch.no_grad():
        model(**inputs, policy=Looks())
        model.set_attn_implementation("eager")
        for (paid, rows), b in zip(found, (0, 2, 3), strict=True):
            whole = model(**tiny.single(inputs, b, model), output_attentions=True, policy=None).attentions[2][0]
            torch.testing.assert_close(paid, whole.mean(0)[rows].sum(0), atol=1e-6, rtol=1e-4)


def test_text_may_be_left_out_too() -> None:
    @dataclass
    class NoText(vtr.Policy):
        def attend(self, layer: int, tokens: vtr.Tokens, attention: Any) -> vtr.Attend:
            some = torch.arange(0, len(tokens), 2)
            return vtr.Attend(some, some, torch.arange(1, len(tokens.text)))

    model: Any = vtr.patch(models.llava())
    inputs = tiny.batch(model, ROWS[:1])
    with torch.no_grad():
        out = model(**inputs, policy=NoText(), use_cache=True)
    n = (inputs["input_ids"][0] != tiny.IMAGE_ID).sum() - 1 + -(-vtr.report(model).rows[0].total // 2)
    assert [layer.lengths() for layer in out.past_key_values.layers] == [[int(n)]] * len(out.past_key_values.layers)


def test_what_is_no_answer_is_refused() -> None:
    model: Any = vtr.patch(models.llava())
    inputs = tiny.batch(model, ROWS[:1])
    for answer, words in (
        (7, "must return vtr.Attend"),
        (vtr.Attend(torch.tensor([-1])), "distinct indices"),
        (vtr.Attend(seen=torch.tensor([0.5])), "int64"),
    ):
        policy = Some()
        policy.attend = lambda layer, tokens, attention, answer=answer: answer  # type: ignore[method-assign, misc]
        with pytest.raises((TypeError, ValueError), match=words):
            model(**inputs, policy=policy)

    class Both(Some):
        def route(self, layer: int, tokens: vtr.Tokens) -> None:
            return None

    with pytest.raises(ValueError, match="route and attend"):
        model(**inputs, policy=Both())
    with pytest.raises(ValueError, match="drop one"):
        Some() + vtr.FastV(0.5)
