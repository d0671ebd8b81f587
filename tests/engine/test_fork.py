"""Many questions on the same pictures: forks of a reduced cache, and what goes on with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import vtr
from tests import tiny
from tests.engine.test_oracles import close
from tests.families import FAMILIES, Inputs
from tests.support import POLICIES, Models, why_not
from tests.tiny import IMAGE

PREFIX = ["ab", IMAGE, "looks"]
QUESTIONS = ["what", "is", "whichonehere"]
STEPS = 4
BLIND = ["random", "uniform", "m3", "pool", "globalcom2", "cls", "pmod", "dynamic-llava"]
KINDS = ["llava", "llava_next", "qwen2_5_vl", "internvl"]


@pytest.fixture(scope="module", params=KINDS)
def models(request: pytest.FixtureRequest) -> Models:
    return Models.from_family(next(family for family in FAMILIES if family.kind == request.param))


@pytest.fixture(scope="module")
def llava() -> Models:
    return Models.from_family(next(family for family in FAMILIES if family.kind == "llava"))


def asked(models: Models, question: str) -> Inputs:
    """The whole prompt of one question."""
    return models.family.batch(models.patched, [[*PREFIX[:-1], PREFIX[-1] + question]])


def prefilled(models: Models, policy: Any) -> Any:
    """The cache of what the questions share."""
    inputs = models.family.batch(models.patched, [PREFIX])
    with torch.no_grad():
        return models.patched(**inputs, policy=policy, use_cache=True).past_key_values


def held(cache: Any) -> list[Tensor]:
    """All that its rows hold: keys and values of every layer, row by row."""
    return [t.clone() for layer in cache.layers for row, n in enumerate(layer.lengths()) for t in layer.row(row, n)]


def unchanged(cache: Any, before: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(held(cache), before, strict=True))


def side_by_side(models: Models, padding: str = "left") -> Inputs:
    """The whole prompts of all questions in one batch, without their pictures."""
    rows = [asked(models, question)["input_ids"][0] for question in QUESTIONS]
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), tiny.PAD), torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        here = slice(width - len(row), None) if padding == "left" else slice(len(row))
        ids[b, here], mask[b, here] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", BLIND)
def test_a_fork_answers_as_one_prompt_would(models: Models, name: str) -> None:
    """Question after question and all in one batch, in whatever order, from a cache that stays as it is."""
    if why_not(models.family, name):
        pytest.skip("not on this family")
    family, model = models.family, models.patched
    policy = POLICIES[name](models, asked(models, QUESTIONS[0]), 0)
    want = [family.generate(model, asked(models, q), policy=policy, max_new_tokens=STEPS) for q in QUESTIONS]
    cache = prefilled(models, policy)
    before = held(cache)
    with torch.no_grad():  # M-RoPE: the model notes another prompt's positions
        model(**family.batch(model, [[IMAGE, IMAGE, "abcd"]]))
    for question, (ids, logits, _) in zip(QUESTIONS, want, strict=True):
        got = family.generate(model, asked(models, question), past_key_values=vtr.fork(cache), max_new_tokens=STEPS)
        assert torch.equal(got[0], ids)
        close(got[1], logits)
        unchanged(cache, before)
    forks = vtr.fork(cache, len(QUESTIONS))
    together = family.generate(model, side_by_side(models), past_key_values=forks, max_new_tokens=STEPS)
    for b, (ids, logits, alone) in enumerate(want):
        assert torch.equal(together[0][b], ids[0])
        close(together[1][:, b], logits[:, 0])
        for one, other in zip(together[2].layers, alone.layers, strict=True):
            assert one.lengths()[b] == other.lengths()[0]
    unchanged(cache, before)


def ask(models: Models, question: str, cache: Any, **more: Any) -> tuple[Tensor, Tensor]:
    inputs = asked(models, question)
    if type(cache.layers[0]) is DynamicLayer:  # transformers would look for the pictures' placeholders
        inputs = {name: t for name, t in inputs.items() if name in ("input_ids", "attention_mask")}
    ids, logits, _ = models.family.generate(models.patched, inputs, past_key_values=cache, max_new_tokens=STEPS, **more)
    return ids, logits


def alike(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0])
    close(got[1], want[1])


# ------------------------------------------------------------------------------------------------- ways of forking
M3 = vtr.Matryoshka(9)
COPIES: dict[str, Callable[[Any], Any]] = {
    "fork": vtr.fork,
    "deepcopy": copy.deepcopy,
    "fork of a fork": lambda cache: vtr.fork(vtr.fork(cache, 3), [2]),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("policy", [M3, vtr.Random(0.4, layer=2), None], ids=["m3", "random", "none"])
def test_a_copy_and_its_original_go_their_own_ways(llava: Models, how: str, policy: Any) -> None:
    """Whoever goes on first."""
    caches = [prefilled(llava, policy) for _ in range(3)]
    want = [ask(llava, question, cache, policy=None) for question, cache in zip(QUESTIONS, caches, strict=True)]
    cache = prefilled(llava, policy)
    other, third = COPIES[how](cache), COPIES[how](cache)
    alike(ask(llava, QUESTIONS[0], other, policy=None), want[0])
    alike(ask(llava, QUESTIONS[1], cache, policy=None), want[1])
    alike(ask(llava, QUESTIONS[2], third, policy=None), want[2])


def test_a_fork_reads_what_is_there_until_it_writes(llava: Models) -> None:
    cache = prefilled(llava, M3)
    where = cache.layers[0].buckets[0].keys.data_ptr()
    forks = [vtr.fork(cache), vtr.fork(cache, 4)]
    assert all(f.layers[0].buckets[0].keys.data_ptr() == where for f in forks)
    before = held(cache)
    with torch.no_grad():
        llava.patched(input_ids=torch.full((4, 1), 9), past_key_values=forks[1])
    layer = forks[1].layers[0]
    assert layer.buckets[0].keys.data_ptr() != where and len(layer.place) == 4
    assert layer.lengths() == [cache.layers[0].lengths()[0] + 1] * 4
    assert cache.layers[0].buckets[0].keys.data_ptr() == where
    unchanged(cache, before)
    unchanged(forks[0], before)


def test_a_fork_takes_its_policies_along_and_nothing_that_is_under_way(llava: Models) -> None:
    policy = POLICIES["dynamic-llava"](llava, {}, 0)
    cache = prefilled(llava, policy)
    state, other = cache.layers[0].state, vtr.fork(cache).layers[0].state
    assert other is not state and other.policies[0] is policy
    assert len({id(layer.state) for layer in vtr.fork(cache).layers}) == 1
    assert other.once is not state.once and not other.once._made
    other.shift[0][0] = 7
    assert state.shift[0][0] == 0


def test_the_rows_of_a_batch(llava: Models) -> None:
    """Prefixes of several lengths under several policies, padded on the left; a fork has rows of either."""
    family, model = llava.family, llava.patched
    prefixes, policies = [PREFIX, [IMAGE, "x"], ["abcdefgh"]], [M3, vtr.Random(0.5, layer=1), None]
    inputs = family.batch(model, prefixes)
    with torch.no_grad():
        cache = model(**inputs, policy=policies, use_cache=True).past_key_values
    rows, more = [2, 0, 0, 1], torch.tensor([[20, 21, 22]])
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones(4, 3, dtype=torch.int64)], 1)
    for forked in (vtr.fork(cache, rows), copy.deepcopy(cache)):
        if len(forked.layers[0].place) == 3:
            forked.batch_select_indices(torch.tensor(rows))
        with torch.no_grad():
            got = model(input_ids=more.expand(4, -1), attention_mask=mask, past_key_values=forked).logits
        for b, row in enumerate(rows):
            one = family.single(model, inputs, row)
            with torch.no_grad():
                alone = model(**one, policy=policies[row], use_cache=True).past_key_values
                close(got[b], model(input_ids=more, past_key_values=alone).logits[0])
    twice = vtr.fork(cache, 2)
    assert twice.layers[0].lengths() == [n for n in cache.layers[0].lengths() for _ in range(2)]
    with pytest.raises(IndexError, match="row 3 of a cache of 3"):
        vtr.fork(cache, [0, 3])
    for none in (0, []):
        with pytest.raises(ValueError, match="at least one row"):
            vtr.fork(cache, none)


def test_what_cannot_be_forked_says_so(llava: Models) -> None:
    with pytest.raises(vtr.UnsupportedError, match="StaticCache cannot be repeated"):
        vtr.fork(StaticCache(config=llava.patched.get_decoder().config, max_cache_len=9))
    with pytest.raises(vtr.UnsupportedError, match="tuple cannot be repeated"):
        vtr.fork(())


def test_a_question_is_taken_back(llava: Models) -> None:
    """Crop takes a question off a fork again, never the prefix."""
    want = ask(llava, QUESTIONS[1], prefilled(llava, M3))
    cache = vtr.fork(prefilled(llava, M3))
    past = cache.get_seq_length()
    ask(llava, QUESTIONS[0], cache)
    cache.crop(past - cache.get_seq_length())
    alike(ask(llava, QUESTIONS[1], cache), want)
    with pytest.raises(vtr.UnsupportedError, match="cannot crop"):
        vtr.fork(prefilled(llava, M3)).crop(-2)


def test_a_cache_that_was_reset_begins_anew(llava: Models) -> None:
    """Also with other rows, and positions of its own."""
    family, model, cache = llava.family, llava.patched, prefilled(llava, M3)
    cache.reset()
    inputs = family.batch(model, [["abc", IMAGE, "d"], ["a"]])
    with torch.no_grad():
        want = model(**inputs, policy=M3).logits
        got = model(**inputs, policy=M3, past_key_values=cache)
    close(got.logits, want)
    assert got.past_key_values is cache and cache.get_seq_length() == inputs["input_ids"].shape[1]


# ------------------------------------------------------------------------------------------- what a call may look like
@pytest.mark.parametrize("padding", ["left", "right"])
def test_questions_of_several_lengths_by_hand(llava: Models, padding: str) -> None:
    """New tokens only, padded on either side; and one turn more behind them."""
    model, cache = llava.patched, prefilled(llava, M3)
    past, wide = cache.get_seq_length(), max(map(len, QUESTIONS))
    ids, mask = torch.full((3, wide), tiny.PAD), torch.zeros(3, wide, dtype=torch.int64)
    for b, question in enumerate(QUESTIONS):
        here = slice(wide - len(question), None) if padding == "left" else slice(len(question))
        ids[b, here], mask[b, here] = asked(llava, question)["input_ids"][0, past:], 1
    forks, last = vtr.fork(cache, 3), torch.tensor([[30, 31]])
    whole = torch.cat([torch.ones(3, past, dtype=torch.int64), mask], 1)
    longer = torch.cat([whole, torch.ones(3, 2, dtype=torch.int64)], 1)
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=whole, past_key_values=forks).logits
        then = model(input_ids=last.expand(3, -1), attention_mask=longer, past_key_values=forks).logits
    for b, question in enumerate(QUESTIONS):
        one = asked(llava, question)
        one["input_ids"] = torch.cat([one["input_ids"], last], 1)
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        with torch.no_grad():
            want = model(**one, policy=M3).logits[0, past:]
        close(got[b][mask[b].bool()], want[:-2])
        close(then[b], want[-2:])


def test_new_tokens_with_a_mask_of_all_columns(models: Models) -> None:
    """Through generate; without the shared tokens, and padded between these and the question."""
    family, model = models.family, models.patched
    cache = prefilled(models, vtr.Random(0.5))
    past, batch = cache.get_seq_length(), side_by_side(models)
    want = family.generate(model, batch, past_key_values=vtr.fork(cache, 3), max_new_tokens=STEPS)
    wide = batch["input_ids"].shape[1] - past
    new, mask = torch.full((3, wide), tiny.PAD), torch.zeros(3, wide, dtype=torch.int64)
    for b, question in enumerate(QUESTIONS):
        new[b, wide - len(question) :] = asked(models, question)["input_ids"][0, past:]
        mask[b, wide - len(question) :] = 1
    inputs = {"input_ids": new, "attention_mask": torch.cat([torch.ones(3, past, dtype=torch.int64), mask], 1)}
    got = family.generate(model, inputs, past_key_values=vtr.fork(cache, 3), max_new_tokens=STEPS)
    alike(got[:2], want[:2])


def test_beams_go_on_from_a_row_each(models: Models) -> None:
    search = {"num_beams": 3, "max_new_tokens": STEPS, "output_logits": False, "return_dict_in_generate": False}
    question, policy = asked(models, QUESTIONS[0]), vtr.Random(0.5)
    want = tiny.generate(models.patched, question, policy=policy, **search)
    cache = vtr.fork(prefilled(models, policy), 3)
    got = tiny.generate(models.patched, question, past_key_values=cache, **search)
    assert torch.equal(got, want)


def test_a_prompt_that_does_not_go_on_is_refused(llava: Models) -> None:
    model, cache = llava.patched, prefilled(llava, M3)
    before, past = held(cache), cache.get_seq_length()
    inputs = asked(llava, QUESTIONS[0])
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 2] += 1
    with pytest.raises(ValueError, match=f"row 0 differs from column 2 on, of {past}"):
        tiny.generate(model, other, past_key_values=cache, max_new_tokens=1)
    short = {name: t[:, past:] for name, t in inputs.items() if t.dim() == 2}
    with pytest.raises(ValueError, match="a mask of all columns"):
        tiny.generate(model, short, past_key_values=cache, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"3 rows for a cache of 1: .* vtr\.fork"):
        tiny.generate(model, side_by_side(llava), past_key_values=cache, max_new_tokens=1)
    hidden = {**short, "attention_mask": inputs["attention_mask"].clone()}
    hidden["attention_mask"][0, 1] = 0
    with pytest.raises(ValueError, match="attention_mask does not say of the cached columns"):
        tiny.generate(model, hidden, past_key_values=cache, max_new_tokens=1)
    unchanged(cache, before)


def test_several_pictures_and_a_new_one(llava: Models) -> None:
    """Demonstrations are shared; a question may bring a picture of its own, then its pixels alone are passed."""
    family, model, policy = llava.family, llava.patched, M3
    shown, question = ["ab", IMAGE, "x", IMAGE, "yz"], ["what", IMAGE, "is"]
    whole = family.batch(model, [[*shown[:-1], shown[-1] + question[0], *question[1:]]])
    want = family.generate(model, whole, policy=policy, max_new_tokens=STEPS)
    prefix = family.batch(model, [shown])
    with torch.no_grad():
        cache = model(**prefix, policy=policy, use_cache=True).past_key_values
    last = {**whole, "pixel_values": whole["pixel_values"][2:]}
    got = family.generate(model, last, past_key_values=vtr.fork(cache), policy=policy, max_new_tokens=STEPS)
    alike(got[:2], want[:2])


@pytest.mark.parametrize("name", ["m3", "random", "dynamic-llava"])
def test_decoding_with_constant_shapes(llava: Models, name: str) -> None:
    """Of the prefix's generate, and of forks that get more tokens than it did and name no policy."""
    policy, static = POLICIES[name](llava, asked(llava, ""), 0), {"cache_implementation": "static"}
    family, model = llava.family, llava.patched
    first = {"max_new_tokens": 2, "policy": policy}
    _, _, growing = family.generate(model, family.batch(model, [PREFIX]), **first)
    _, _, cache = family.generate(model, family.batch(model, [PREFIX]), **first, **static)
    new = torch.tensor([[20, 21, 22]] * 2)
    said = growing.get_seq_length()
    inputs = {"input_ids": new, "attention_mask": torch.ones(2, said + 3, dtype=torch.int64)}
    want = family.generate(model, inputs, past_key_values=vtr.fork(growing, 2), max_new_tokens=24)
    for _ in range(2):
        got = family.generate(model, inputs, past_key_values=vtr.fork(cache, 2), max_new_tokens=24)
        alike(got[:2], want[:2])


# ----------------------------------------------------------------------------------------- policies that look at text
@pytest.mark.parametrize("how", ["warn", "keep", "error"])
@pytest.mark.parametrize("named", [False, True], ids=["no policy", "policy"])
def test_a_question_guided_policy_says_so(llava: Models, how: str, named: bool) -> None:
    """Whether or not the call that goes on names a policy; a decoded token is no turn."""
    policy = vtr.FastV(0.5, 2, on_continue=how)
    cache, more = prefilled(llava, policy), {"policy": policy} if named else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the conversation goes on")
        with torch.no_grad():
            llava.patched(input_ids=torch.tensor([[9]]), past_key_values=vtr.fork(cache))
        if how == "keep":
            ask(llava, QUESTIONS[0], vtr.fork(cache), **more)
    if how == "warn":
        with pytest.warns(UserWarning, match="kept for the first question"):
            ask(llava, QUESTIONS[0], vtr.fork(cache), **more)
    if how == "error":
        before = held(cache)
        with pytest.raises(vtr.UnsupportedError, match="on_continue='keep'"):
            ask(llava, QUESTIONS[0], vtr.fork(cache), **more)
        unchanged(cache, before)


@pytest.mark.parametrize("positions", ["reindex", "keep"])
def test_positions_that_were_closed_up_go_along(llava: Models, positions: Any) -> None:
    """A fork of a renumbered cache goes on as the cache itself would."""
    policy = vtr.Pyramid([0.6, 0.3], [1, 3], positions=positions, on_continue="keep")
    want = [ask(llava, question, prefilled(llava, policy)) for question in QUESTIONS]
    cache = prefilled(llava, policy)
    assert any(any(shift) for shift in cache.layers[0].state.shift) == (positions == "reindex")
    for question, one in zip(QUESTIONS, want, strict=True):
        alike(ask(llava, question, vtr.fork(cache)), one)
    inputs = side_by_side(llava)
    ids, logits, _ = llava.family.generate(
        llava.patched, inputs, past_key_values=vtr.fork(cache, 3), max_new_tokens=STEPS
    )
    for b, (one, its) in enumerate(want):
        assert torch.equal(ids[b], one[0])
        close(logits[:, b], its[:, 0])


def test_the_report_of_a_fork_is_of_its_own_call(llava: Models) -> None:
    """What was attended to before is not counted again, and the prefix's report stays."""
    cache = prefilled(llava, M3)
    prefix = vtr.report(llava.patched)
    ask(llava, QUESTIONS[2], vtr.fork(cache))
    once = vtr.report(llava.patched)
    ask(llava, QUESTIONS[2], vtr.fork(cache))
    again = vtr.report(llava.patched)
    assert once.flops == again.flops and once.kv_bytes == again.kv_bytes and once.steps == again.steps == STEPS - 1
    assert once.rows[0].total == 0 and prefix.rows[0].vision_tokens == [9] * 5


def test_a_plain_cache_is_forked_too(llava: Models) -> None:
    cache = prefilled(llava, None)
    assert type(cache) is DynamicCache and type(vtr.fork(cache, 2)) is DynamicCache
    assert vtr.fork(cache, 2).layers[0].keys.shape[0] == vtr.fork(cache, [0, 0]).layers[0].keys.shape[0] == 2
