"""Metrics against values worked out by hand, paired tests, and MM-BigBench's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from vtr.eval.accuracy import instructions
from vtr.eval.accuracy.metrics import (
    METRICS,
    anls,
    choice,
    edit_distance,
    exact,
    gain,
    leakage,
    metric,
    picked,
    relaxed,
    vqa,
)
from vtr.eval.accuracy.metrics import vqa_normalized as normal
from vtr.eval.accuracy.stats import interval, mcnemar, outcomes, paired
from vtr.eval.accuracy.summary import needs_picture
from vtr.eval.report import results


@pytest.mark.parametrize(
    ("reply", "answers", "score"),
    [
        ("two", ["two"], 1),
        ("  Two.\n", ["two"], 1),
        ("two  cats", ["Two cats"], 1),
        ("'star'", ["star"], 1),
        ("two cats", ["two"], 0),
        ("", ["two"], 0),
        ("50%", ["50"], 0),  # a unit is part of the answer
        ("-5", ["5"], 0),
        ("b", ["a", "b"], 1),
    ],
)
def test_exact_match(reply: str, answers: list[str], score: float) -> None:
    assert exact(reply, answers) == score


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Cat.", "cat"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("3.5", "3.5"),
        ("3. 5", "3 5"),
        ("1,000", "1000"),  # a comma between digits: all punctuation goes without leaving a space
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("it's, ok", "it's ok"),
        ("line\nbreak\ttab", "line break tab"),
    ],
)
def test_vqa_normalisation(text: str, normalized: str) -> None:
    assert normal(text) == normalized


def test_vqa_accuracy_leaves_one_person_out() -> None:
    assert vqa("red", ["red"] * 10) == 1.0
    assert vqa("blue", ["red"] * 10) == 0.0
    # 3 of 10: left-out ones of the three leave 2 matches (2/3 each), the other seven leave 3 (1 each)
    assert vqa("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    # 2 of 10: 2 × 1/3 and 8 × 2/3; 1 of 10: 0 and 9 × 1/3
    assert vqa("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx((2 / 3 + 16 / 3) / 10)
    assert vqa("The red!", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert vqa("2", ["two"] * 4 + ["three"] * 6) == 1.0


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("0.52", "50%", 1),
        ("50%", "0.5", 1),
        ("50", "50%", 0),
        ("-95", "-100", 1),
        ("0", "0", 1),
        ("0.001", "0", 0),
        ("Yes", "yes", 1),
        ("1,000", "1000", 0),
    ],
)
def test_relaxed_accuracy(reply: str, answer: str, score: float) -> None:
    assert relaxed(reply, [answer]) == score


def test_edit_distance_and_anls() -> None:
    assert [edit_distance(*pair) for pair in [("", "abc"), ("kitten", "sitting"), ("flaw", "lawn"), ("a", "a")]] == [
        3, 3, 2, 0
    ]  # fmt: skip
    assert anls("Kitten", ["kitten"]) == 1.0
    assert anls("sitting", ["kitten"]) == pytest.approx(1 - 3 / 7)
    assert anls("ab", ["ax"]) == 0.0  # NL = 0.5 is not below the threshold
    assert anls("abc", ["abx", "abcd"]) == pytest.approx(0.75)
    assert anls("", ["abc"]) == 0.0
    assert anls("new  york", ["New York"]) == 1.0


CHOICES = ["a dog", "a cat", "two cats", "none"]


@pytest.mark.parametrize(
    ("reply", "index"),
    [
        ("B", 1),
        ("b.", 1),
        ("(C)", 2),
        ("C. two cats", 2),
        ("A cat", 1),  # the article is no letter
        ("two cats", 2),
        ("The answer is D", 3),
        ("Answer: (B) because it meows", 1),
        ("I think it is a dog", 0),
        ("a dog or none", None),
        ("E", None),
        ("", None),
    ],
)
def test_multiple_choice_by_letter_or_text(reply: str, index: int | None) -> None:
    assert picked(reply, CHOICES) == index
    assert choice(reply, ["two cats"], CHOICES) == (index == 2)
    assert choice(reply, ["C"], CHOICES) == (index == 2)


def test_choices_that_are_letters_are_taken_by_text() -> None:
    assert picked("b", ["c", "b", "a"]) == 1
    assert choice("(B) it is", ["B"]) == 1.0 and choice("A", ["B"]) == 0.0  # choices in the question's text


def test_metrics_by_name() -> None:
    auto = metric("auto")
    assert auto.score("A", ["red"], ["red", "blue"]) == 1.0 and auto.score("A", ["red"], None) == 0.0
    assert auto.problem(["green"], ["red", "blue"]) == "the answer 'green' is none of the choices ['red', 'blue']"
    assert "has 3" in str(METRICS["vqa"].problem(["a"] * 3, None)) and METRICS["vqa"].problem(["a"] * 10, None) is None
    with pytest.raises(ValueError, match=r"unknown metric 'vqa2'.*; choose one of exact"):
        metric("vqa2")


def test_multi_modal_gain_and_leakage() -> None:
    assert gain(0.6, 0.25) == pytest.approx(0.35)
    assert leakage(0.25, 0.2) == pytest.approx(0.05) and leakage(0.2, 0.25) == 0.0
    assert leakage(0.25, None) is None


def test_a_sample_that_any_run_without_the_picture_answers_needs_no_picture() -> None:
    wrong, right = {"score": 0.0}, {"score": 1.0}
    assert needs_picture({"no_image": wrong, "gray": wrong})
    for name in ("no_image", "gray", "base_lm"):
        assert not needs_picture({"no_image": wrong, "gray": wrong, "base_lm": wrong, name: right})


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("B", True), ("b. blue", True), (" (b) blue", True), ("Option B", True), ("The answer is b", True),
        ("Blue", True), ("big", True),  # only the letter is looked at
        ("a", False), ("(a)", False), ("", False), ("the blue one", False), ("it is b", False), ("option", False),
        ("the answer is (b)", False), ("The answer is: b", False),
    ],
)  # fmt: skip
def test_answers_as_mmstar_takes_them(reply: str, right: bool) -> None:
    for answer in ("B", "blue"):
        assert METRICS["mmstar"].score(reply, [answer], ["red", "blue"]) == right
    assert METRICS["mmstar"].score(reply, ["B"], None) == right
    assert METRICS["mmstar"].problem(["green"], ["red", "blue"]) is not None


# -- paired tests ------------------------------------------------------------------------------------------------------
def test_mcnemar() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(9, 1) == mcnemar(1, 9)
    assert mcnemar(10, 30) == pytest.approx(0.002663119259943766)  # (|10 − 30| − 1)² / 40 = 9.025 on 1 degree


def test_interval_of_a_mean_is_that_of_the_difference_to_nothing() -> None:
    rng = np.random.default_rng(0)
    scores, groups = rng.integers(0, 2, 80).astype(float), [i // 4 for i in range(80)]
    against = paired(scores, np.zeros(80), groups)
    assert interval(scores, groups) == (against.low, against.high)


def test_wins_and_losses_by_name() -> None:
    assert outcomes([1, 0, 1, 0.5], [0, 1, 1, 0.2], ["p", "q", "r", "s"]) == (["p", "s"], ["q"])


# -- MM-BigBench -------------------------------------------------------------------------------------------------------
SCORES = np.array(
    [
        [[0.5, 0.7, 0.6], [0.2, 0.2, 0.5]],
        [[0.3, 0.1, 0.6], [0.4, 0.2, 0.1]],
    ]
)
"""[2 policies, 2 data sets, 3 instructions]"""


def test_best_performance() -> None:
    best, which = instructions.best_performance(SCORES)
    assert best.tolist() == [[0.7, 0.5], [0.6, 0.4]] and which.tolist() == [[1, 2], [2, 0]]


def test_mean_relative_gain() -> None:
    # policy 0, data 0: means 0.4 0.4 0.6 → +25 %, +75 %, 0 %; data 1: means 0.3 0.2 0.3 → −33.3 %, 0, +66.7 %
    gains = instructions.mean_relative_gain(100 * SCORES)
    np.testing.assert_allclose(gains, [[100 / 3, 100 / 9], [-100 / 3, -100 / 9]], atol=1e-4)
    # instruction 0, data 0: policy 0 is 0.5 of mean 0.6, policy 1 is 0.3 of mean 1/3
    by_instruction = instructions.mean_relative_gain(100 * SCORES, over="instructions")
    assert by_instruction.shape == (3, 2)
    assert by_instruction[0, 0] == pytest.approx((100 * (0.5 / 0.6 - 1) + 100 * (0.3 / (1 / 3) - 1)) / 2, abs=1e-4)
    assert instructions.mean_relative_gain(np.zeros((2, 1, 2))).tolist() == [[-100.0], [-100.0]]


def test_stability() -> None:
    np.testing.assert_allclose(
        instructions.stability(SCORES), [[np.sqrt(2 / 300), np.sqrt(0.02)], [np.sqrt(38) / 30, np.sqrt(14) / 30]]
    )
    np.testing.assert_allclose(
        instructions.stability(SCORES, over="policies"), [[0.1, 0.1], [0.3, 0.0], [0.0, 0.2]], atol=1e-12
    )


def test_adaptability() -> None:
    # top 2 of policy 0: {1, 2} and {2, 1} (0 and 1 are equal, the later counts); of policy 1: {2, 0} and {0, 1}
    np.testing.assert_allclose(instructions.adaptability(SCORES, k=2), [[0, 0.5, 0.5], [0.5, 0.25, 0.25]])
    with pytest.raises(ValueError, match="the top 4 of 3"):
        instructions.adaptability(SCORES, k=4)


def result(instruction: str, name: str, accuracies: dict[str, float]) -> dict[str, Any]:
    rows = [{"policy": p, "accuracy": x, "by_kind": {"a": x, "b": 1.0}} for p, x in accuracies.items()]
    return {"kind": "eval", "instruction": instruction, "data": {"name": name}, "policies": rows}


def test_results_become_a_table(tmp_path: Path) -> None:
    files = [
        result("{question}", "d", {"none": 0.8, "fastv": 0.4}),
        result("please {question}", "d", {"none": 0.6, "fastv": 0.6}),
    ]
    scores, policies, data_sets, wordings = instructions.collect(files)
    assert scores.tolist() == [[[80.0, 60.0]], [[40.0, 60.0]]]
    assert (policies, data_sets, wordings) == (["none", "fastv"], ["d"], ["{question}", "please {question}"])
    assert instructions.collect(files, by_kind=True)[0].shape == (2, 2, 2)
    paths = [str(tmp_path / f"{i}.json") for i in range(2)]
    for path, data in zip(paths, files, strict=True):
        results.save(path, "eval", data, seed=0)
    app = instructions.typer.Typer()
    app.command()(instructions.main)
    printed = CliRunner().invoke(app, [*paths, "--k", "1"]).output
    assert "| none | 80.0% | +16.7% | 10.0 | '{question}' (100%) |" in printed
    assert "| '{question}' | -2.9% | 20.0 |" in printed  # 80 of a mean of 70: +14.3 %, 40 of 50: −20 %
    assert "'{question}' and 'please {question}' (50%) |" in instructions.markdown(files, k=2)
    with pytest.raises(ValueError, match="missing"):
        instructions.collect([files[0], result("please {question}", "d", {"none": 0.1})])
    with pytest.raises(ValueError, match="twice"):
        instructions.collect([files[0], files[0]])
    with pytest.raises(ValueError, match="not written by vtr eval"):
        instructions.collect([json.loads('{"kind": "scale"}')])
