"""Prefix reuse: a prompt run in pieces is the prompt run whole; every way of scoring gives the same search."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests import oracle, tiny
from tests.search.search_models import questions, short
from vtr.engine.midway import enter
from vtr.search import Example, Prepared
from vtr.search.metrics import OBJECTIVES
from vtr.search.prefix import Scorer

A, B = [1.0, 1.0, 0.5, 0.3, 0.1], [1.0, 1.0, 0.2, 0.2, 0.2]
DIVE = [1.0, 1.0, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("lm", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("queries", ["text", "last-max"])
def test_a_prompt_run_in_pieces_is_the_prompt_run_whole(family: str, lm: str, queries: str) -> None:
    model = vtr.patch(getattr(tiny, family)(lm=lm))
    inputs = tiny.batch(model, [[tiny.IMAGE, "abc"], ["x", tiny.IMAGE, "defghij"]])
    first, second, dive = (vtr.GSearch(keeps, queries=queries) for keeps in (A, B, DIVE))
    with torch.inference_mode():
        start = enter(model, inputs, vtr.GSearch([1.0] * 5), inputs["input_ids"].shape[1])
        two = start.go([(0, dive), (1, dive)], 2)
        end = two.go([(0, first), (1, first), (1, second)], 5)
        again = two.go([(1, second)], 5)  # going on leaves the halfway state alone
        whole = [model(**inputs, policy=p).logits for p in (first, second)]
        mine = model.lm_head(end.last([1, 2, 2]))
    assert torch.equal(again.last([2]), end.last([1, 2, 2])[3:])
    expected = torch.cat([whole[0][0, -1:], whole[0][1, -2:], whole[1][1, -2:]])
    assert (mine - expected).abs().max() < 2e-5
    assert end.session.log.lengths[0][2] < end.session.log.lengths[0][1]


@pytest.mark.parametrize("queries", ["last-max", "text-max"])
def test_the_strongest_head_ranks_as_in_the_dense_reference(queries: str) -> None:
    model = tiny.llava("eager")
    policy = vtr.GSearch([1.0, 0.6, 0.4, 0.4, 0.2], queries=queries)
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "cdefg"]])
    row = oracle.row(model, inputs)
    expected = oracle.run(model, row, oracle.rule(policy, [[]] * 5))
    vtr.patch(model)
    with torch.no_grad():
        out = model(**inputs, policy=policy)
    kept = [vtr.report(model).rows[0].kept(layer) for layer in range(5)]
    assert kept == expected.kept
    assert (out.logits[0, -1] - expected.logits[-1]).abs().max() < 2e-5
    mean = model(**inputs, policy=vtr.GSearch(policy.schedule, queries=queries[:4]))
    assert mean is not None
    assert kept != [vtr.report(model).rows[0].kept(layer) for layer in range(5)]


def test_an_answer_to_score_does_not_rank_tokens() -> None:
    model = vtr.patch(tiny.llava())
    policy = vtr.GSearch([1.0, 0.5, 0.3, 0.3, 0.1])
    prompt = tiny.batch(model, [["ab", tiny.IMAGE, "cd"]])
    longer = tiny.batch(model, [["ab", tiny.IMAGE, "cdxyz"]])
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        alone = model(**prompt, policy=policy).logits[0, -1]
        kept = vtr.report(model).rows[0].kept(4)
        scored = model(**longer, policy=policy, vtr_queries_end=length).logits[0, length - 1]
        assert vtr.report(model).rows[0].kept(4) == kept
    assert (alone - scored).abs().max() < 2e-5


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_prefix_reuse_and_batching_score_as_the_naive_search_does(objective: str) -> None:
    model, processor = short(4)
    data = list(questions(3))
    candidates = [[1.0, 0.8, 0.4, 0.4], [1.0, 0.8, 0.1, 0.1], [1.0, 0.8, 0.4, 0.02]]
    scores = {}
    for reuse in ("naive", "prefix", "batched"):
        scorer = Scorer(Prepared(model, processor, data, objective), "text", reuse)  # type: ignore[arg-type]
        scores[reuse] = scorer.means([1.0, 0.8], candidates)
        if reuse == "naive":
            assert (scorer.spent.rows, scorer.spent.tokens) == (scorer.spent.naive_rows, scorer.spent.naive_tokens)
        else:
            assert scorer.spent.rows == 3 * (3 * 2 + 2)  # of 3 × 3 × 4; two layers led there
    for reuse in scores:
        assert scores[reuse] == pytest.approx(scores["naive"], abs=1e-4)


def test_accuracy_needs_answers_that_the_unreduced_model_gives() -> None:
    model, processor = short(4)
    wrong = [Example(one.image, one.question, "zebra") for one in questions(2)]
    with pytest.raises(ValueError, match="answers none of 2 questions"):
        Prepared(model, processor, wrong, "accuracy")
    without = [Example(one.image, one.question) for one in questions(2)]
    with pytest.raises(ValueError, match=r"has none: give answers, or use \"agreement\""):
        Prepared(model, processor, without, "likelihood")


def test_candidates_that_cannot_reach_the_floor_are_dropped_early_and_only_then() -> None:
    model, processor = short(4)
    data = list(questions(4))
    scorer = Scorer(Prepared(model, processor, data, batch_size=2), "text")
    candidates = [[1.0, 0.8, 0.8, 0.8], [1.0, 0.02, 0.02, 0.02]]
    full = scorer.means([1.0], candidates)
    before = scorer.spent.rows
    assert full[0] is not None and full[1] is not None and full[0] > full[1]
    some = scorer.means([1.0], candidates, floor=(full[0] + full[1]) / 2)
    assert some == [full[0], None]
    assert scorer.spent.rows - before <= before


def test_own_answers_are_scored_with_their_end_in_one_pass() -> None:
    model, processor = short(10)
    data = list(questions(3))
    prepared = Prepared(model, processor, data, "agreement", batch_size=3, max_new_tokens=3)
    targets = [one.tolist() for batch in prepared.batches for one in batch.targets]
    assert prepared.base == [1.0] * 3  # the unreduced model agrees with itself
    end = processor.tokenizer.eos_token_id
    assert all(1 <= len(one) <= 3 and end not in one[:-1] for one in targets)
