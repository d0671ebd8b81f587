"""Tuning auto: p-values, the sequence of tests, the path of thresholds, and that the promise is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

import vtr
from vtr.data.sources import open_data, usable
from vtr.training import auto
from vtr.training.asked import Asked, ask
from vtr.training.promise import by_unit, kept_up_to, needed, p_value

COSTS = auto.Costs([1.0, 2.0, 10.0], [0.5, 1.5], "time")


def drawn(n: int, seed: int = 0, units: int = 1, tokens: int = 2) -> Asked:
    """n questions under three choices, whose confidence says something of how right they are; ``units`` a picture."""
    rng = np.random.default_rng(seed)
    hard = rng.beta(0.6, 3.0, n)
    sure = np.stack([1 - hard * 0.9, 1 - hard * 0.4], 1) * rng.uniform(0.9, 1.0, (n, 2))
    right = np.stack([rng.random(n) > hard, rng.random(n) > hard * 0.4, rng.random(n) > hard * 0.15], 1)
    shape = (n, 2, tokens)
    return Asked(
        ["m3:tokens=1", "m3:tokens=9", "none"], right.astype(float), np.tile([7, 50, 700], (n, 1)),
        rng.integers(0, 5, shape), np.repeat(sure[..., None], tokens, -1).astype(np.float32), np.ones(shape, bool),
        rng.normal(size=(n, 2, 4)).astype(np.float16) + right[:, :2, None].astype(np.float16),
        np.array([f"picture {i // units}" for i in range(n)]), np.array(["any"] * n), np.array([["x"] * 3] * n),
    )  # fmt: skip


# -- p-values ----------------------------------------------------------------------------------------------------------
def test_p_values_are_those_of_the_formulas() -> None:
    none = np.zeros(299)
    assert p_value(none, 0.01, True) == pytest.approx(0.99**299)
    assert p_value(none, 0.01, False) == pytest.approx(0.99**299)  # Hoeffding's form is the same where nothing is lost
    some = np.array([1.0] * 3 + [0.0] * 697)
    assert p_value(some, 0.01, True) == pytest.approx(binom.cdf(3, 700, 0.01))
    mean = 3 / 700
    h = mean * np.log(mean / 0.01) + (1 - mean) * np.log((1 - mean) / 0.99)
    assert p_value(some, 0.01, False) == pytest.approx(min(np.exp(-700 * h), np.e * binom.cdf(3, 700, 0.01)))
    assert p_value(np.ones(10), 0.5, False) == 1.0


@pytest.mark.parametrize("binary", [True, False])
def test_p_values_are_no_smaller_than_chance(binary: bool) -> None:
    """Under the worst mean that breaks the promise, P(p ≤ u) ≤ u."""
    rng, n, most = np.random.default_rng(0), 400, 0.03
    for u in (0.01, 0.05, 0.2):
        counts = rng.binomial(n, most, 4000)
        found = np.array([p_value(np.arange(n) < k, most, binary) for k in range(counts.max() + 1)])
        below = int((found[counts] <= u).sum())
        assert binomtest(below, 4000, u, alternative="greater").pvalue > 1e-3


def test_how_many_are_needed() -> None:
    for most, confidence in ((0.01, 0.95), (0.05, 0.9), (0.002, 0.99)):
        n = needed(most, confidence)
        assert p_value(np.zeros(n), most, True) <= 1 - confidence < p_value(np.zeros(n - 1), most, True)
    assert needed(0.01, 0.95) == 299


def test_the_sequence_ends_at_the_first_that_is_not_rejected() -> None:
    n = 1000
    path = [np.arange(n) < k for k in (0, 2, 40, 0)]
    assert kept_up_to(path, 0.01, 0.95, True) == 2
    assert kept_up_to([np.arange(n) < 40], 0.01, 0.95, True) == 0
    assert by_unit(np.array([1.0, 0.0, 1.0]), np.array(["a", "a", "b"])).tolist() == [0.5, 1.0]


# -- tuning ------------------------------------------------------------------------------------------------------------
def test_thresholds_spend_what_may_go_wrong_where_it_saves_most() -> None:
    assert auto.thresholds_at(0.0, COSTS) == [1.0, 1.0]
    first, second = auto.thresholds_at(0.5, COSTS)
    assert first > second == 0.5  # going on from the first costs 1.5, from the second 9.5
    assert first == pytest.approx(1 - 0.5 * 1.5 / 9.5)


def test_what_an_outcome_counts() -> None:
    asked = drawn(3)
    asked.score[:] = [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    found = auto.outcome(asked, np.array([[0.9, 0.9], [0.1, 0.9], [0.9, 0.1]]), [0.5, 0.5], COSTS)
    assert found.chosen.tolist() == [0, 1, 0] and found.loss.tolist() == [0.0, 0.0, 1.0]
    assert found.cost.tolist() == [1.0, 2.5, 1.0] and found.tokens.tolist() == [7, 57, 7]
    never = auto.outcome(asked, np.ones((3, 2)) * 0.9, [1.0, 1.0], COSTS)
    assert never.chosen.tolist() == [2, 2, 2] and never.cost.tolist() == [12.0] * 3 and never.loss.sum() == 0


def test_the_tuned_policy_does_what_was_measured() -> None:
    asked = drawn(1500)
    made = auto.tune(asked, COSTS, loss=0.05, confidence=0.9, binary=True, about={"data": "drawn"})
    assert made.promise is not None and made.promise["data"] == "drawn" and made.promise["p_values"] == "binomial"
    steps = [asked.choices.index(name) for name in made.names]
    mine = asked.of(steps)
    estimates = np.stack([made.estimate(s, mine.began(s)).numpy() for s in range(len(steps) - 1)], 1)
    found = auto.outcome(mine, estimates, list(made.thresholds), COSTS.of(steps))  # type: ignore[arg-type]
    assert found.loss.mean() <= 0.05 and found.cost.mean() < 0.9 * COSTS.taken[-1]
    assert 0 < made.promise["seen_loss"] <= 0.05 and made.promise["cost"] < 0.9
    assert "at most 5.00%" in auto.words(dict(made.promise))
    again = auto.tune(asked, COSTS, loss=0.05, confidence=0.9, binary=True, about={"data": "drawn"})
    assert again == made


def gauged(n: int, seed: int = 0) -> Asked:
    """As :func:`drawn`, under choices that drop tokens inside the decoder; their attention says what was right."""
    asked, rng = drawn(n, seed), np.random.default_rng(seed)
    asked.choices = ["fastv:keep=0.1,layer=1", "fastv:keep=0.5,layer=1", "none"]
    right = asked.score[:, :2] >= asked.score[:, 2:]
    asked.stayed = np.clip(0.2 + 0.6 * right + rng.normal(0, 0.1, right.shape), 0.01, 0.99).astype(np.float32)
    return asked


def test_the_signal_that_says_more_is_taken(tmp_path: Path) -> None:
    asked = gauged(1500)
    made = auto.tune(asked, COSTS, loss=0.05, confidence=0.9, binary=True)
    assert made.signal == "attention" and made.promise is not None
    losses = made.promise["signals"]
    assert set(losses) == {"confidence", "attention", "probe"} and losses["attention"] == min(losses.values())
    asked.save(tmp_path / "answers.npz")
    again = Asked.load(tmp_path / "answers.npz")
    assert again.stayed is not None and np.array_equal(again.stayed, asked.stayed)
    assert auto.tune(again, COSTS, loss=0.05, confidence=0.9, binary=True) == made
    asked.stayed = np.random.default_rng(1).random(asked.stayed.shape, np.float32)  # that says nothing
    assert auto.tune(asked, COSTS, loss=0.05, confidence=0.9, binary=True).signal != "attention"


def test_attention_where_some_choice_has_none(tmp_path: Path) -> None:
    asked = drawn(1500)
    asked.save(tmp_path / "answers.npz")
    assert Asked.load(tmp_path / "answers.npz").stayed is None
    with pytest.raises(ValueError, match="says nothing of some of these choices"):
        auto.tune(asked, COSTS, signal="attention")
    assert "attention" not in auto.fit_estimate(asked).compared


@pytest.mark.parametrize("signal", ["confidence", "probe", "attention"])
def test_estimates_are_those_of_the_policy(signal: str) -> None:
    asked = gauged(600)
    fitted = auto.fit_estimate(asked, signal=signal)
    assert fitted.signal == signal and fitted.held_out.shape == (600, 2)
    mine, good = fitted.of(asked), auto.suffices(asked)
    for step in range(2):  # calibrated: as probable as it says, in the mean, and surer where it is right
        assert abs(mine[:, step].mean() - good[:, step].mean()) < 0.03
        assert mine[good[:, step], step].mean() > mine[~good[:, step], step].mean() + 0.05


def test_too_few_questions() -> None:
    with pytest.raises(auto.TooFewError, match=r"takes 349 pictures .* give 49 more"):
        auto.tune(drawn(300), COSTS)
    with pytest.raises(auto.TooFewError, match="there are 200"):  # several questions about a picture are one draw
        auto.tune(drawn(1000, units=5), COSTS)
    with pytest.raises(ValueError, match="between 0 and 1"):
        auto.tune(drawn(1000), COSTS, loss=0.0)


def test_a_score_between_takes_the_other_p_values() -> None:
    asked = drawn(1500)
    asked.score[:, :] = 0.5 + asked.score / 2
    made = auto.tune(asked, COSTS, loss=0.05)
    assert made.promise is not None and made.promise["p_values"] == "Hoeffding-Bentkus"
    assert made.promise["seen_loss"] < 0.05


def broken(pool: Asked, runs: int, size: int, loss: float, confidence: float, costs: auto.Costs = COSTS) -> int:
    """How often a policy tuned on ``size`` questions drawn from ``pool`` loses more than promised on all of it."""
    rng, count = np.random.default_rng(1), 0
    for run in range(runs):
        mine = pool.part(rng.integers(0, len(pool), size))
        mine.group[:] = [f"{i}" for i in range(size)]  # each draw is one of its own
        made = auto.tune(mine, costs, loss=loss, confidence=confidence, binary=True, seed=run, signal="confidence")
        steps = [pool.choices.index(name) for name in made.names]
        part = pool.of(steps)
        estimates = np.stack([made.estimate(s, part.began(s)).numpy() for s in range(len(steps) - 1)], 1)
        found = auto.outcome(part, estimates, thresholds(made), costs.of(steps))
        count += bool(found.loss.mean() > loss)
    return count


def thresholds(made: vtr.AutoPolicy) -> Sequence[float]:
    return made.thresholds if isinstance(made.thresholds, list) else [made.thresholds]  # type: ignore[list-item]


def test_the_promise_is_kept_on_draws() -> None:
    count = broken(drawn(6000), runs=12, size=400, loss=0.05, confidence=0.8)
    assert binomtest(count, 12, 0.2, alternative="greater").pvalue > 0.01


@pytest.mark.slow
def test_the_promise_is_kept_on_two_hundred_draws() -> None:
    count = broken(drawn(20000), runs=200, size=800, loss=0.03, confidence=0.9)
    assert binomtest(count, 200, 0.1, alternative="greater").pvalue > 0.01


# -- asking ------------------------------------------------------------------------------------------------------------
def test_asked_once_is_what_each_choice_says(tmp_path: Path) -> None:
    model, processor = vtr.pocket.load("internvl")
    vtr.patch(model)
    samples = usable(open_data("pocket:split=val,per_scene=1", limit=6), "pocket")
    names = ["m3:tokens=1", "m3:tokens=9", "none"]
    choices = [(name, None if name == "none" else vtr.policy(name)) for name in names]
    asked = ask(model, processor, samples, choices, lambda r, s: float(r == s.answer), max_new_tokens=3, batch_size=4)
    asked.save(tmp_path / "asked.npz")
    again = Asked.load(tmp_path / "asked.npz")
    assert again.choices == names and (again.said == asked.said).all() and (again.group == asked.group).all()
    from vtr.chat import decode, encode

    inputs = encode(processor, [one.asked for one in samples], [one.picture() for one in samples])
    for step, (_, policy) in enumerate(choices):
        with torch.inference_mode():
            out = model.generate(**inputs, policy=policy, do_sample=False, max_new_tokens=3)
        assert decode(processor, out, inputs["input_ids"].shape[1]) == asked.said[:, step].tolist()
        assert [row.vision_tokens[0] for row in vtr.report(model).rows] == asked.tokens[:, step].tolist()
    made = vtr.AutoPolicy(names, [0.9, 0.9])
    estimates = np.stack([made.estimate(s, asked.began(s)).numpy() for s in range(2)], 1)
    found = auto.outcome(asked, estimates, [0.9, 0.9], auto.Costs([1, 2, 3], [1, 2]))
    with torch.inference_mode():
        model.generate(**inputs, policy=made, do_sample=False, max_new_tokens=3)
    assert [row.policy or "none" for row in vtr.report(model).rows] == [names[i] for i in found.chosen]
    costs = auto.measure(model, processor, samples[:1], choices, unit="flops", max_new_tokens=1)
    with torch.inference_mode():
        one = encode(processor, [samples[0].asked], [samples[0].picture()])
        model.generate(**one, policy="m3:tokens=1", do_sample=False, max_new_tokens=1)
    assert costs.taken[0] == costs.tried[0] == vtr.report(model).flops
    assert auto.default_choices(model, processor, samples[0]) == names
    assert asked.stayed is None  # pooled tokens have had no attention


def test_asked_once_is_how_much_attention_stays() -> None:
    """A rule on the record does what the policy does by it."""
    model, processor = vtr.pocket.load("internvl")
    vtr.patch(model)
    samples = usable(open_data("pocket:split=val,per_scene=1", limit=4), "pocket")
    names = ["fastv:keep=0.05,layer=1", "none"]
    choices = [(name, None if name == "none" else vtr.policy(name)) for name in names]
    asked = ask(model, processor, samples, choices, lambda r, s: float(r == s.answer), max_new_tokens=1, batch_size=4)
    assert asked.stayed is not None and asked.stayed.shape == (4, 1) and len(set(asked.stayed[:, 0])) == 4
    made = vtr.AutoPolicy(names, float(np.median(asked.stayed)), signal="attention")
    from vtr.chat import encode

    inputs = encode(processor, [one.asked for one in samples], [one.picture() for one in samples])
    with torch.inference_mode():
        model.generate(**inputs, policy=made, do_sample=False, max_new_tokens=1)
    taken = [row.policy is not None for row in vtr.report(model).rows]
    assert taken == made.accept(0, asked.began(0)).tolist() and sum(taken) == 2


def test_what_signals_say() -> None:
    from vtr.eval.studies.signals import markdown, said

    asked = gauged(800)
    found = {(one.choice, one.signal): one for one in said(asked, draws=100)}
    assert len(found) == 6
    for choice in asked.choices[:2]:
        good = auto.suffices(asked)[:, asked.choices.index(choice)]
        raw = asked.stayed[:, asked.choices.index(choice)]  # type: ignore[index]
        higher = (raw[good][:, None] > raw[~good][None]).mean()
        best = found[choice, "attention"]
        assert best.auc == pytest.approx(higher, abs=1e-3) and best.low < best.auc <= best.high
        assert best.loss < found[choice, "confidence"].loss < best.base
    assert markdown(iter(found.values())).count("\n") == 7
