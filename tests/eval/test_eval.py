"""Paired statistics and timing."""

from __future__ import annotations

import numpy as np
import pytest
from vtr.eval.accuracy.blind import Diverse
from vtr.eval.accuracy.stats import paired
from vtr.eval.cost.timing import time_call

import vtr
from tests import tiny


def test_paired_differences() -> None:
    a, b = [1, 1, 1, 0] * 50, [1, 0, 0, 0] * 50
    result = paired(a, b)
    assert result.difference == 0.5 and result.low > 0.4 and result.high < 0.6
    assert (result.wins, result.losses) == (100, 0)
    same = paired(a, a)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    assert str(result).startswith("+50.0 [")


def test_questions_about_one_picture_go_together() -> None:
    """When all questions of a picture agree, eight questions say no more than one: the interval is wider."""
    rng = np.random.default_rng(0)
    once = rng.integers(0, 2, 60).astype(float)
    repeated, groups = np.repeat(once, 8), np.repeat(np.arange(60), 8)
    zeros = np.zeros(480)
    loose, tight = paired(repeated, zeros, groups), paired(repeated, zeros)
    assert loose.high - loose.low > 2 * (tight.high - tight.low)


def test_paired_needs_the_same_questions() -> None:
    with pytest.raises(ValueError, match="same questions"):
        paired([1], [1, 0])


def test_timing_measures_every_part_and_leaves_no_hooks() -> None:
    model = vtr.patch(tiny.llava())
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "cd"]])
    text = model.get_decoder()
    before = list(text._forward_pre_hooks), list(text._forward_hooks)
    timing = time_call(model, inputs, "fastv:keep=0.3", repeats=3, new_tokens=2)
    assert 0 < timing.prefill_ms < timing.first_token_ms and timing.decode_ms is not None
    assert (list(text._forward_pre_hooks), list(text._forward_hooks)) == before


def test_the_question_blind_baseline_keeps_its_budget_and_differs() -> None:
    model = vtr.patch(tiny.llava_next())
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "cd", tiny.IMAGE, "e"]])
    model(**inputs, policy=Diverse(keep=0.25, layer=1))
    row = vtr.report(model).rows[0]
    assert row.vision_tokens[1:] == [row.total // 4] * 4
    other = tiny.batch(model, [["zz", tiny.IMAGE, "cd", tiny.IMAGE, "another question"]])
    model(**other, policy=Diverse(keep=0.25, layer=0))
    at_once = vtr.report(model).rows[0].kept(0)
    model(**inputs, policy=Diverse(keep=0.25, layer=0))
    assert vtr.report(model).rows[0].kept(0) == at_once  # the question does not matter
