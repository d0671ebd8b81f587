"""Tokens that ``prune`` makes out of some that go: rows alone, with and without a cache, positions, the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vtr
from tests import tiny
from tests.tiny import IMAGE
from vtr.testing import dense as slow
from vtr.testing import tiny as models

ROWS = [["ab", IMAGE, "what"], ["abcdef"], ["a", IMAGE, "bc", IMAGE, "whichone"], [IMAGE, "cde"]]
AT = (1, 3)


@dataclass
class Halves(vtr.Policy):
    """At two layers every other token stays, and the others become a few, by turns."""

    made: int = 2
    renumber: bool = False

    @property
    def renumbers(self) -> bool:
        return self.renumber

    def prune(self, layer: int, tokens: vtr.Tokens) -> Any:
        if layer not in AT:
            return None
        gone = list(range(1, len(tokens), 2))
        sources = [gone[i :: self.made] for i in range(min(self.made, len(gone)))]
        states = torch.stack([tokens.hidden[one].mean(0) for one in sources])
        return vtr.Merged(torch.arange(0, len(tokens), 2), states, sources)


@torch.no_grad()
def dense(model: Any, inputs: Any, policy: Halves) -> torch.Tensor:
    """A row alone, layer by layer, by the layers of transformers: logits of its last token."""
    text, given = model.get_decoder(), slow.row(model, inputs)
    hidden, vision = given.embeds, given.vision
    positions = torch.arange(len(hidden))
    for number, layer in enumerate(text.layers):
        if number in AT and vision.any():
            at = vision.nonzero().squeeze(1)
            gone = at[1::2]
            new = [hidden[gone[i :: policy.made]].mean(0) for i in range(min(policy.made, len(gone)))]
            stay = torch.ones(len(hidden), dtype=torch.bool)
            stay[gone] = False
            front = stay[: at[-1] + 1].nonzero().squeeze(1)
            back = torch.arange(int(at[-1]) + 1, len(hidden))
            hidden = torch.cat([hidden[front], torch.stack(new), hidden[back]])
            positions = torch.cat([positions[front], positions[front][-1:].expand(len(new)), positions[back]])
            vision = torch.cat([vision[front], torch.ones(len(new), dtype=torch.bool), vision[back]])
            if policy.renumber:
                positions = torch.arange(len(hidden))
        rope = text.rotary_emb(hidden[None], position_ids=positions[None])
        mask = torch.full((len(hidden), len(hidden)), float("-inf")).triu(1)[None, None]
        hidden = layer(hidden[None], attention_mask=mask, position_embeddings=rope, position_ids=positions[None])[0]
    return model.get_output_embeddings()(text.norm(hidden[-1]))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("renumber", [False, True])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_rows_are_what_the_definition_says(family: str, renumber: bool, padding: str) -> None:
    model: Any = vtr.patch(getattr(models, family)())
    inputs = tiny.batch(model, ROWS, padding)
    policy = [Halves(3, renumber), Halves(2, renumber), Halves(2, renumber), vtr.FastV(0.5, layer=2)]
    with torch.no_grad():
        together = model(**inputs, policy=policy).logits
    for b in range(3):
        last = torch.arange(together.shape[1])[tiny.real(inputs, b)][-1]
        want = dense(model, tiny.single(inputs, b, model), policy[b])
        torch.testing.assert_close(together[b, last], want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("renumber", [False, True])
def test_as_many_new_tokens_as_went(renumber: bool) -> None:
    """The row is as long as before, but its tokens stand elsewhere: alone, and beside another one."""
    model: Any = vtr.patch(models.internvl())
    inputs, policy = tiny.batch(model, [["a", IMAGE, "b"], ["a", IMAGE, IMAGE, "what"]]), Halves(99, renumber)
    with torch.no_grad():
        together = model(**inputs, policy=[policy, None]).logits[0, tiny.real(inputs, 0)]
        alone = model(**tiny.single(inputs, 0, model), policy=policy).logits[0]
    (row,) = vtr.report(model).rows
    assert set(row.vision_tokens) == {row.total} and row.sources(AT[0]) != row.sources(0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone[-1], dense(model, tiny.single(inputs, 0, model), policy), atol=2e-5, rtol=0)


@pytest.mark.parametrize("renumber", [False, True])
def test_a_cache_changes_nothing(renumber: bool) -> None:
    model: Any = vtr.patch(models.llava_next())
    inputs = tiny.batch(model, ROWS)
    said = [
        tiny.generate(model, inputs, policy=Halves(2, renumber), max_new_tokens=5, **way)
        for way in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert said[0].tolist() == said[1].tolist() == said[2].tolist()


def test_the_report_says_what_tokens_were_made_of() -> None:
    model: Any = vtr.patch(models.llava())
    inputs = tiny.batch(model, ROWS[:1])
    with torch.no_grad():
        model(**inputs, policy=Halves(2))
    (row,) = vtr.report(model).rows
    slots = (inputs["input_ids"][0] == tiny.IMAGE_ID).nonzero().squeeze(1).tolist()
    n = len(slots)
    first, second = row.sources(AT[0]), row.sources(AT[1])
    assert row.sources(0) == [[slot] for slot in slots] and row.kept(AT[0]) == slots[::2]
    assert first == [[slot] for slot in slots[::2]] + [slots[1::4], slots[3::4]]
    assert len(second) == (len(first) + 1) // 2 + 2 and sorted({s for one in second for s in one}) == slots
    assert row.vision_tokens == [n, len(first), len(first), *[len(second)] * (len(row.vision_tokens) - 3)]


def test_what_is_no_merge_is_refused() -> None:
    model: Any = vtr.patch(models.llava())
    inputs = tiny.batch(model, ROWS[:1])
    states = torch.zeros(1, model.get_decoder().config.hidden_size)
    some = torch.arange(3)
    cases = [
        (vtr.Merged(some[:0], states, [[4]]), "keeps at least one"),
        (vtr.Merged(some, states[:, 1:], [[4]]), "need states of"),
        (vtr.Merged(some, states, [[99999]]), "sources are indices"),
        (vtr.Merged(some, states.expand(999, -1), [[4]] * 999), "cannot become longer"),
        (vtr.Merged(some, states.long(), [[4]]), "are floats"),
    ]
    for answer, words in cases:
        policy = Halves()
        policy.prune = lambda layer, tokens, answer=answer: answer  # type: ignore[method-assign, misc]
        with pytest.raises((TypeError, ValueError), match=words):
            model(**inputs, policy=policy)
