"""Forwards over question and answer: the tokens kept are those that ``generate`` keeps for the question alone."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vtr
from tests import learned, tiny
from tests.families import FAMILIES, Chat, Family
from tests.support import POLICIES, Models
from tests.tiny import IMAGE

STEPS = 4
ROWS = [["ab", IMAGE, "what"], ["abcdef"], [IMAGE, "cde"], ["a", IMAGE, "bc", IMAGE, "whichone"]]
LEARNT = sorted(set(POLICIES) - {"autoscale"})


def answered(inputs: dict[str, Tensor], answers: Tensor, padding: str) -> tuple[dict[str, Tensor], list[int]]:
    """``inputs`` (padded on the left) with each row's answer behind its prompt, and labels; where the answers begin."""
    rows, n = answers.shape
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    more = {
        "input_ids": answers,
        "attention_mask": torch.ones_like(answers),
        "labels": answers,
        "mm_token_type_ids": torch.zeros_like(answers),
    }
    whole = {**inputs, "labels": torch.full_like(inputs["input_ids"], -100)}
    width = whole["input_ids"].shape[1] + n
    for name in more.keys() & whole.keys():
        joined = torch.cat([whole[name], more[name].to(whole[name])], 1)
        whole[name] = joined if padding == "left" else torch.stack([joined[b].roll(-pads[b]) for b in range(rows)])
    return whole, [width - n - (pad if padding == "right" else 0) for pad in pads]


def kept(model: Any) -> list[list[int]]:
    return [row.vision_tokens for row in vtr.report(model).rows]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.kind)
def models(request: pytest.FixtureRequest) -> Models:
    return Models.from_family(request.param)


@pytest.mark.sample(3)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", LEARNT)
def test_answers_have_the_probabilities_that_generate_gave_them(models: Models, name: str, padding: str) -> None:
    """Logits of the generated tokens, recomputed with ``labels``; rows of different lengths, one without an image."""
    family, model = models.family, models.patched
    inputs = family.batch(models.stock, ROWS)
    try:
        policies = [POLICIES[name](models, inputs, b) for b in range(len(ROWS))]
        model.generate(**inputs, policy=policies, max_new_tokens=1)
    except vtr.UnsupportedError as error:
        pytest.skip(str(error))
    ids, logits, _ = family.generate(model, inputs, policy=policies, max_new_tokens=STEPS)
    want, slots = kept(model), [row.kept(4) for row in vtr.report(model).rows]
    whole, starts = answered(inputs, ids, padding)
    got = family.logits(model, whole, policy=policies)
    assert kept(model) == want
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    moved = [pad if padding == "right" else 0 for pad in pads]
    assert [[s + m for s in row.kept(4)] for row, m in zip(vtr.report(model).rows, moved, strict=True)] == [
        [s if s >= 0 else s + m for s in row] for row, m in zip(slots, moved, strict=True)
    ]
    for b, start in enumerate(starts):
        torch.testing.assert_close(got[b, start - 1 : start - 1 + STEPS], logits[:, b], atol=1e-5, rtol=1e-4)


RANKING = ["fastv", "gsearch:schedule=[1.0,0.8,0.5,0.5,0.2]", "pyramid"]


@pytest.fixture(scope="module")
def llava() -> Any:
    return vtr.patch(tiny.llava())


def said(model: Any, policy: Any) -> tuple[dict[str, Tensor], Tensor, list[list[int]]]:
    inputs = tiny.batch(model, ROWS)
    ids = tiny.generate(model, inputs, policy=policy, max_new_tokens=STEPS)[:, -STEPS:]
    return inputs, ids, kept_slots(model)


def kept_slots(model: Any) -> list[list[int]]:
    return [row.kept(4) for row in vtr.report(model).rows]


@pytest.mark.parametrize("policy", RANKING)
def test_ends_given_by_hand_say_what_labels_say(llava: Any, policy: str) -> None:
    """As one number for all rows, one a row, a tensor; and through every way of calling the model."""
    inputs, ids, want = said(llava, policy)
    whole, starts = answered(inputs, ids, "left")
    labels = whole.pop("labels")
    with torch.no_grad():
        for ends in (starts[0], starts, torch.tensor(starts), torch.tensor(starts[0])):
            llava(**whole, policy=policy, vtr_queries_end=ends)
            assert kept_slots(llava) == want
        for call in (
            lambda: llava.forward(**whole, labels=labels, policy=policy),
            lambda: llava.model(**whole, vtr_queries_end=starts, policy=policy),
            lambda: llava(**whole, shift_labels=torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100),
                          labels=labels, policy=policy),
            lambda: llava(**whole, labels=torch.where(labels == -100, -100, 9), policy=policy),
        ):  # fmt: skip
            call()
            assert kept_slots(llava) == want
        llava(**whole, policy=policy)
        assert kept_slots(llava) != want  # an answer that nobody says is one ranks as the question does


def test_a_wrapper_that_calls_forward_hands_its_labels_on(llava: Any) -> None:
    """As peft does: neither hook nor keyword argument below the model's forward has the labels."""

    class Wrapper(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, labels: Tensor, **kwargs: Any) -> Any:
            return self.model.forward(labels=labels, **kwargs)

    inputs, ids, want = said(llava, "fastv")
    whole, _ = answered(inputs, ids, "left")
    with torch.no_grad(), vtr.use(llava, "fastv"):
        Wrapper(llava)(**whole)
    assert kept_slots(llava) == want


def test_labels_of_another_module_are_not_the_answer(llava: Any) -> None:
    """A module around the language model may have labels of its own: classes, rewards."""

    class Classifier(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inner = model.model

        def forward(self, labels: Tensor, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    inputs = tiny.batch(llava, ROWS)
    with torch.no_grad():
        llava(**inputs, policy="fastv")
        want = kept_slots(llava)
        Classifier(llava)(labels=torch.tensor([1, 0, 1, 1]), **inputs, policy="fastv")
    assert kept_slots(llava) == want


def test_several_turns_end_at_the_first_answer_behind_the_last_image(llava: Any) -> None:
    first = tiny.batch(llava, [["ab", IMAGE, "what"]])
    tiny.generate(llava, first, policy="fastv:keep=0.3,layer=2", max_new_tokens=1)
    want = kept_slots(llava)
    whole = tiny.batch(llava, [["ab", IMAGE, "what", "answ", "more", "answ"]])
    labels = whole["input_ids"].clone()
    labels[:, :-12], labels[:, -8:-4] = -100, -100
    with torch.no_grad():
        llava(**whole, labels=labels, policy="fastv:keep=0.3,layer=2")
    assert kept_slots(llava) == want


def test_labels_that_leave_no_question_warn_where_something_ranks(llava: Any) -> None:
    """Plain language modeling labels all text: it says nothing of answers, so all ranks, as without labels."""
    inputs = tiny.batch(llava, ROWS)
    with torch.no_grad():
        llava(**inputs, policy="fastv")
        want = kept_slots(llava)
        with pytest.warns(UserWarning, match=r"do not tell the answer from the question.*vtr_queries_end"):
            llava(**inputs, labels=inputs["input_ids"], policy="fastv")
        assert kept_slots(llava) == want
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            llava(**inputs, labels=inputs["input_ids"], policy="uniform")  # nothing ranks
        with pytest.raises(ValueError, match=r"no text after its last image.*vtr_queries_end"):
            llava(**inputs, vtr_queries_end=0, policy="fastv")


@pytest.mark.parametrize(
    ("ends", "error", "match"),
    [
        ([3, 4], ValueError, "2 entries for 4 rows"),
        (10_000, ValueError, "outside"),
        (-1, ValueError, "outside"),
        (0.5, TypeError, "column where a row's answer begins"),
        (True, TypeError, "column where a row's answer begins"),
    ],
)
def test_ends_that_are_none(llava: Any, ends: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        llava(**tiny.batch(llava, ROWS), policy="fastv", vtr_queries_end=ends)


def test_labels_of_another_length_are_refused(llava: Any) -> None:
    inputs = tiny.batch(llava, ROWS)
    labels = torch.nn.functional.pad(inputs["input_ids"], (0, 1), value=-100)
    with pytest.raises(ValueError, match="labels"):
        llava(**inputs, labels=labels, policy="fastv")


def test_forgetting_policies_run_without_a_cache(llava: Any) -> None:
    inputs, ids, _ = said(llava, None)
    whole, _ = answered(inputs, ids, "left")
    assert llava(**whole, policy=learned.dynamic()).past_key_values is None
    with pytest.raises(vtr.UnsupportedError, match="pass none"):
        llava(**whole, policy=learned.dynamic(), past_key_values=DynamicCache())


def test_gradients_flow_and_the_loss_is_that_of_the_logits(llava: Any) -> None:
    inputs, ids, _ = said(llava, "fastv")
    whole, _ = answered(inputs, ids, "right")
    out = llava(**whole, policy="fastv")
    out.loss.backward()
    logits, labels = out.logits[:, :-1].flatten(0, 1), whole["labels"][:, 1:].flatten()
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, labels))
    assert llava.lm_head.weight.grad is not None
    llava.zero_grad()


def test_families_are_all_there() -> None:
    assert {type(f) for f in FAMILIES} >= {Family, Chat}
