"""Forwards that a callback makes by hand while ``generate`` runs: they inherit the policy and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

import vtr
from tests import tiny
from tests.tiny import IMAGE

FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl")
ROWS = [["ab", IMAGE, "what"], ["xyz"], [IMAGE, IMAGE, "cde"]]
BLIND = ["uniform:keep=0.3", "m3:tokens=9", "cls:keep=0.3", "globalcom2:retention=0.5", "random:keep=0.3"]
RANKS = ["fastv:keep=0.3,layer=2", "gsearch:schedule=[1.0,0.6,0.4,0.3,0.2]", "pyramid"]
STEPS = 3


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return vtr.patch(getattr(tiny, request.param)())


def whole(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The arguments of a forward over prompt and what was said so far."""
    new = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1]).long()
    mask = torch.cat([inputs["attention_mask"], new], 1)
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def seen(model: Any, inputs: dict[str, Tensor], policy: Any, by_hand: Any, **kwargs: Any) -> list[Tensor]:
    """What ``by_hand(ids)`` gives at every step of a generate under ``policy``, whose words it does not change."""
    found: list[Tensor] = []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        with torch.no_grad():
            found.append(by_hand(ids))
        return scores

    want = tiny.generate(model, inputs, policy=policy, max_new_tokens=STEPS, **kwargs)
    kept = [row.vision_tokens for row in vtr.report(model).rows]
    got = tiny.generate(
        model, inputs, policy=policy, max_new_tokens=STEPS, logits_processor=LogitsProcessorList([look]), **kwargs
    )
    assert torch.equal(got, want)
    assert [row.vision_tokens for row in vtr.report(model).rows] == kept
    return found


@pytest.mark.sample(1)
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("policy", BLIND + RANKS)
def test_another_picture_is_reduced_as_the_main_one(model: Any, policy: str, cached: bool) -> None:
    """Visual contrastive decoding: the same prompt, a distorted picture; the question ranks, not what was decoded."""
    inputs = tiny.batch(model, ROWS)
    noisy = {**inputs, "pixel_values": inputs["pixel_values"] * 0.3}
    alone = tiny.generate(
        model, noisy, policy=policy, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    found = seen(
        model, inputs, policy, lambda ids: model(**whole(noisy, ids), use_cache=False).logits[:, -1], use_cache=cached
    )
    torch.testing.assert_close(found[0], alone.logits[0], atol=1e-5, rtol=1e-5)
    said: list[Tensor] = []
    for step in range(1, STEPS):
        ids = tiny.generate(model, inputs, policy=policy, max_new_tokens=step)
        with torch.no_grad():
            out = model(
                **whole(noisy, ids), policy=policy, use_cache=False, vtr_queries_end=inputs["input_ids"].shape[1]
            )
        said.append(out.logits[:, -1])
    for got, want in zip(found[1:], said, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [*BLIND[:2], RANKS[0]])
def test_it_may_keep_a_cache_of_its_own(model: Any, policy: str) -> None:
    """Step by step beside the main one: each on its own cache, each what it is alone."""
    inputs = tiny.batch(model, ROWS)
    noisy = {**inputs, "pixel_values": inputs["pixel_values"] * 0.3}
    state: dict[str, Any] = {}

    def by_hand(ids: Tensor) -> Tensor:
        mask = whole(noisy, ids)["attention_mask"]
        places = (mask.cumsum(1) - 1).clamp(min=0)
        if "cache" not in state:
            out = model(**noisy, position_ids=places)
        else:
            out = model(
                input_ids=ids[:, -1:], attention_mask=mask, past_key_values=state["cache"],
                position_ids=places[:, -1:],
            )  # fmt: skip
        state["cache"] = out.past_key_values
        return out.logits[:, -1]

    found = seen(model, inputs, policy, by_hand)
    for step, got in enumerate(found):
        ids = inputs["input_ids"]
        if step:
            ids = tiny.generate(model, inputs, policy=policy, max_new_tokens=step)
        with torch.no_grad():
            want = model(
                **whole(noisy, ids), policy=policy, use_cache=False, vtr_queries_end=inputs["input_ids"].shape[1]
            ).logits[:, -1]
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.sample(1)
@pytest.mark.parametrize("policy", [None, BLIND[1], RANKS[0], ["m3:tokens=9", None, RANKS[0]]])
@pytest.mark.parametrize("length", [4, 30, 90])
def test_text_without_pictures_runs_unreduced(model: Any, policy: Any, length: int) -> None:
    """Classifier-free guidance runs a negative prompt, shorter or longer than the main one, with a cache of its own."""
    inputs = tiny.batch(model, ROWS)
    negative = torch.randint(8, 60, (len(ROWS), length), generator=torch.Generator().manual_seed(0))
    state: dict[str, Any] = {}

    def by_hand(ids: Tensor) -> Tensor:
        new = negative if "cache" not in state else ids[:, -1:]
        out = model(input_ids=new, past_key_values=state.get("cache"), use_cache=True)
        state["cache"] = out.past_key_values
        return out.logits[:, -1]

    found = seen(model, inputs, policy, by_hand)
    ids = tiny.generate(model, inputs, policy=policy, max_new_tokens=STEPS)[:, -STEPS:]
    for step, got in enumerate(found):
        with torch.no_grad():
            want = model(input_ids=torch.cat([negative, ids[:, :step]], 1), policy=None).logits[:, -1]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [BLIND[1], RANKS[0]])
def test_guidance_of_transformers_mixes_text_and_picture(model: Any, policy: str) -> None:
    """guidance_scale with negative_prompt_ids: g · with picture, reduced + (1 - g) · text, unreduced."""
    inputs, g = tiny.batch(model, ROWS[:1]), 1.5
    negative = torch.tensor([[1, 9, 10, 11]])
    out = tiny.generate(
        model, inputs, policy=policy, max_new_tokens=1, guidance_scale=g, negative_prompt_ids=negative,
        return_dict_in_generate=True, output_scores=True, suppress_tokens=None,
    )  # fmt: skip
    with torch.no_grad():
        text = model(input_ids=negative, policy=None).logits[:, -1].log_softmax(-1)
        picture = model(**inputs, policy=policy).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(out.scores[0], g * (picture - text) + text, atol=1e-4, rtol=1e-4)


def test_other_prompts_have_other_pictures(model: Any) -> None:
    """Another number of rows, another question, other pictures: nothing of the main prompt is laid over them."""
    inputs, other = tiny.batch(model, ROWS), tiny.batch(model, [["zz", IMAGE, "quest"]], seed=7)
    with torch.no_grad():
        want = model(**other, policy=RANKS[0]).logits
    for got in seen(model, inputs, RANKS[0], lambda ids: model(**other).logits):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_the_call_may_name_a_policy_of_its_own(model: Any) -> None:
    inputs = tiny.batch(model, ROWS)
    with torch.no_grad():
        want = {p: model(**inputs, policy=p).logits for p in (None, "m3:tokens=9")}
    for policy, logits in want.items():
        for got in seen(model, inputs, RANKS[0], lambda ids, p=policy: model(**inputs, policy=p).logits):
            torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-5)


def test_rows_with_policies_of_their_own_are_repeated_or_asked_for(model: Any) -> None:
    inputs, each = tiny.batch(model, ROWS), [BLIND[1], None, RANKS[0]]
    with torch.no_grad():
        want = model(**inputs, policy=each).logits
    for got in seen(model, inputs, each, lambda ids: model(**inputs).logits):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    one = tiny.batch(model, ROWS[:1])
    with pytest.raises(vtr.UnsupportedError, match="name the policy"):
        seen(model, inputs, each, lambda ids: model(**one).logits)


def test_stopping_criteria_may_run_the_model(model: Any) -> None:
    inputs = tiny.batch(model, ROWS)
    with torch.no_grad():
        want = model(**inputs, policy=BLIND[1]).logits
    found: list[Tensor] = []

    def stop(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            found.append(model(**inputs).logits)
        return torch.zeros(len(ids), dtype=torch.bool)

    tiny.generate(model, inputs, policy=BLIND[1], max_new_tokens=2, stopping_criteria=StoppingCriteriaList([stop]))
    for got in found:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [BLIND[1], RANKS[0]])
def test_beams_go_on_beside_it(model: Any, policy: str) -> None:
    inputs = tiny.batch(model, ROWS)
    noisy = {**inputs, "pixel_values": inputs["pixel_values"] * 0.3}
    with torch.no_grad():
        want = model(**noisy, policy=policy).logits
    for got in seen(model, inputs, policy, lambda ids: model(**noisy).logits, num_beams=2):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
