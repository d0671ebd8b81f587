"""Assisted decoding: a draft in the first forward ranks nothing, can be taken back, and changes no word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests import learned, tiny
from tests.families import FAMILIES, Chat
from tests.support import POLICIES, Models
from tests.tiny import IMAGE

ROW = [["ab", IMAGE, "whatisthis"]]  # "is" comes twice: prompt lookup has a draft at once
STEPS = 7
NATIVE = [family for family in FAMILIES if not isinstance(family, Chat)]


def asked(models: Models, **kwargs: Any) -> tuple[list[int], list[list[int]], list[int]]:
    """New tokens, kept slots by layer, tokens in the cache by layer."""
    model, inputs = models.patched, models.family.batch(models.stock, ROW)
    out = tiny.generate(model, inputs, max_new_tokens=STEPS, **kwargs)
    report = vtr.report(model)
    kept = [report.rows[0].kept(layer) for layer in range(5)]
    return out[0, -STEPS:].tolist(), kept, report.rows[0].vision_tokens


@pytest.fixture(scope="module", params=NATIVE, ids=lambda family: family.kind)
def models(request: pytest.FixtureRequest) -> Models:
    return Models.from_family(request.param)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["fastv", "gsearch", "pyramid", "m3", "pool", "uniform", "pmod", None])
def test_drafts_change_neither_words_nor_what_is_kept(models: Models, name: str | None) -> None:
    """Prompt lookup; a draft that is refused (another model) and one that is accepted (the same weights)."""
    inputs = models.family.batch(models.stock, ROW)
    policy = None if name is None else POLICIES[name](models, inputs, 0)
    try:
        want = asked(models, policy=policy)
    except vtr.UnsupportedError as error:
        pytest.skip(str(error))
    ways: dict[str, dict[str, Any]] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "accepted": {"assistant_model": models.stock},
        "refused": {"assistant_model": other(models)},
    }
    for way, given in ways.items():
        try:
            tiny.generate(models.stock, inputs, max_new_tokens=STEPS, **given)
        except (ValueError, TypeError, NotImplementedError):
            continue  # transformers cannot, with this family
        assert asked(models, policy=policy, **given) == want, way


def other(models: Models) -> Any:
    made = models.family.make()
    with torch.no_grad():
        for parameter in made.get_output_embeddings().parameters():
            parameter.copy_(parameter.flip(0))
    return made


def test_a_draft_model_with_a_default_policy_drafts_unreduced() -> None:
    model, draft = vtr.patch(tiny.llava()), vtr.patch(tiny.llava(), "m3:tokens=9")
    inputs = tiny.batch(model, ROW)
    want = tiny.generate(model, inputs, policy="fastv", max_new_tokens=STEPS)
    assert torch.equal(tiny.generate(model, inputs, policy="fastv", max_new_tokens=STEPS, assistant_model=draft), want)
    report = vtr.report(draft)
    assert report is not None and report.rows[0].policy is None
    with vtr.use(draft, "fastv"):
        assert torch.equal(
            tiny.generate(model, inputs, policy="fastv", max_new_tokens=STEPS, assistant_model=draft), want
        )


def test_the_model_may_draft_for_itself() -> None:
    model = vtr.patch(tiny.llava(), "fastv:keep=0.3,layer=2")
    inputs = tiny.batch(model, ROW)
    want = tiny.generate(model, inputs, max_new_tokens=STEPS)
    kept = vtr.report(model).rows[0].vision_tokens
    assert torch.equal(tiny.generate(model, inputs, max_new_tokens=STEPS, assistant_model=model), want)
    assert vtr.report(model).rows[0].vision_tokens == kept


def test_a_conversation_goes_on_after_drafts() -> None:
    """What was refused is gone from the cache. (Drafts in the second turn go wrong in transformers itself.)"""
    model = vtr.patch(tiny.llava())
    inputs = tiny.batch(model, ROW)
    run = {"policy": "m3:tokens=9", "max_new_tokens": 3, "return_dict_in_generate": True}
    said: list[torch.Tensor] = []
    for drafts in ({}, {"prompt_lookup_num_tokens": 2}):
        first = tiny.generate(model, inputs, **run, **drafts)
        ids = torch.cat([first.sequences, torch.tensor([[9, 10, 9, 10, 11]])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        said.append(tiny.generate(model, turn, **run).sequences)
    assert torch.equal(*said)


def test_policies_that_forget_stay_refused() -> None:
    model = vtr.patch(tiny.llava())
    inputs = tiny.batch(model, ROW)
    for drafts in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny.llava()}):
        with pytest.raises(vtr.UnsupportedError, match="takes back drafted tokens"):
            tiny.generate(model, inputs, policy=learned.dynamic(), max_new_tokens=3, **drafts)
