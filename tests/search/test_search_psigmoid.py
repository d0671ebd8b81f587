"""P-Sigmoid: budgets are met, points are projected, fits find what was there, interruption, what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtr
from tests.search.search_models import questions, short
from vtr.engine.trace import Geometry
from vtr.schedule import presets
from vtr.search import Cost, Sigmoid, fit, sigmoid
from vtr.search.curve import LEAST, project
from vtr.search.rounds import Search
from vtr.search.suggest import Suggestions

COST = Cost(Geometry(12, 4, 4, 8, (1000,) * 12), [(576, 40), (300, 20)])
QUIET: dict[str, Any] = {"progress": False, "check_ranks": False, "start": 1}


@given(
    st.floats(0.02, 8.0), st.floats(-3.0, 14.0), st.floats(0.25, 1.0), st.sampled_from(["keep", "flops", "kv"]),
    st.integers(1, 2),
)  # fmt: skip
def test_every_point_is_projected_onto_the_budget(
    steepness: float, middle: float, budget: float, measure: Any, start: int
) -> None:
    def cost(keeps: Any) -> float:
        return COST.ratio(keeps, measure)

    shape = project(steepness, middle, budget, cost, 12, start)
    keeps = shape.keeps(12, start)
    assert cost(keeps) <= budget
    assert keeps == sorted(keeps, reverse=True) and keeps[:start] == [1.0] * start and keeps[-1] >= LEAST
    more = Sigmoid(shape.amplitude * 1.02, steepness, middle).keeps(12, start)
    assert cost(more) > budget or more == keeps or shape.amplitude >= 1e6  # it is the largest that costs no more
    vtr.GSearch(keeps).check(12)


def test_a_budget_out_of_reach_is_refused_with_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"budget=0\.1: with 2 whole layers of 12, schedules cost between 0\.1"):
        project(1.0, 5.0, 0.1, lambda keeps: COST.ratio(keeps, "keep"), 12, 2)


@pytest.mark.parametrize("shape", [Sigmoid(0.755, 0.222, 11.2), Sigmoid(0.9, 1.0, 8.0), Sigmoid(0.3, 0.1, 20.0)])
def test_a_fit_finds_the_sigmoid_that_was_there(shape: Sigmoid) -> None:
    keeps = [1.0, 1.0, *[shape.at(layer) for layer in range(2, 32)]]
    found = fit(keeps)
    assert found.rmse < 1e-3
    assert max(abs(found.at(layer) - shape.at(layer)) for layer in range(2, 32)) < 3e-3


def test_the_published_curve_is_fitted_as_in_the_paper() -> None:
    found = fit(presets()["llava-1.5-7b"].schedule)  # the paper's dashed curve: .755 / (1 + exp(.222 (depth - 12.2)))
    assert found.rmse < 0.05
    assert found.steepness == pytest.approx(0.222, abs=0.05)
    assert found.middle + 1 == pytest.approx(12.2, abs=1.5)  # depths count from 1


@pytest.mark.parametrize("keeps", [[1.0, 1.0, 0.5, 0.2], [1.0, 1.0, 1.0, 64, 9, 9]])
def test_what_no_sigmoid_can_be_fitted_to_is_refused(keeps: list[Any]) -> None:
    with pytest.raises(ValueError, match="at least three layers"):
        fit(keeps)


def test_costs_are_those_that_a_call_reports() -> None:
    model, processor = short(5)
    data = list(questions(1))
    inputs = vtr.chat.encode(processor, [data[0].question], [data[0].image])
    keeps = [1.0, 0.9, 0.5, 0.5, 0.1]
    with torch.no_grad():
        model(**inputs, policy=vtr.GSearch(keeps))
    report = vtr.report(model)
    vision = report.rows[0].total
    cost = Cost.from_model(model, [(vision, inputs["input_ids"].shape[1] - vision)])
    assert cost.flops(keeps) == report.prefill_flops
    assert cost.ratio(keeps, "keep") == pytest.approx(report.rows[0].mean_keep)
    with torch.no_grad():
        model(**inputs, policy=vtr.GSearch([1.0] * 5), use_cache=True)
    full = vtr.report(model)
    assert cost.ratio(keeps, "flops") == pytest.approx(report.prefill_flops / full.prefill_flops)
    assert cost.ratio(keeps, "kv") == pytest.approx(report.kv_bytes / full.kv_bytes)


@pytest.mark.parametrize("measure", ["keep", "flops", "kv"])
def test_psigmoid_spends_the_budget(measure: Any) -> None:
    model, processor = short(5)
    found = vtr.search.psigmoid(
        model, processor, list(questions(2)), budget=0.45, measure=measure, trials=5, width=2, **QUIET
    )
    assert 0.43 < found.record["ratios"][measure] <= 0.45
    best = max(one["score"] for one in found.record["trials"])
    assert found.record["score"] == best and len(found.record["trials"]) == 5
    shape = Sigmoid(**found.record["sigmoid"])
    assert shape.keeps(5, 1) == list(found)


def test_the_first_point_is_the_fit_of_the_curve_that_was_given() -> None:
    model, processor = short(5)
    curve = [1.0, 0.8, 0.5, 0.2, 0.1]
    found = vtr.search.psigmoid(
        model, processor, list(questions(2)), budget=0.45, curve=curve, trials=1, width=1, **QUIET
    )
    shape = fit(curve, 1)
    assert found.record["sigmoid"]["steepness"] == pytest.approx(shape.steepness)
    assert found.record["sigmoid"]["middle"] == pytest.approx(shape.middle)


class Stop(Search):
    """A search that is interrupted when it has scored so many rounds."""

    def means(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.tried) >= 6:
            raise KeyboardInterrupt
        return super().means(*args, **kwargs)


def test_an_interrupted_search_goes_on_to_the_same_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = short(5)
    data, state = list(questions(2)), tmp_path / "state.json"
    how: dict[str, Any] = {**QUIET, "budget": 0.45, "trials": 10, "width": 2}
    whole = vtr.search.psigmoid(model, processor, data, **how)
    with monkeypatch.context() as patched:
        patched.setattr(sigmoid, "Search", Stop)
        with pytest.raises(KeyboardInterrupt):
            vtr.search.psigmoid(model, processor, data, state=state, **how)
    resumed = vtr.search.psigmoid(model, processor, data, state=state, **how)
    assert resumed == whole
    assert resumed.record["resumed"] >= 5
    for name in ("score", "trials", "sigmoid"):
        assert json.dumps(resumed.record[name]) == json.dumps(whole.record[name])  # bit for bit
    other = vtr.search.psigmoid(model, processor, data, **{**how, "seed": 1})
    assert other.record["trials"] != whole.record["trials"]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [(4, 10), (2, 6, 8)])
def test_more_trials_go_on_from_a_search_that_is_over(parts: tuple[int, ...], tmp_path: Path) -> None:
    """As many from the start propose and score the same; what was scored is looked up, none of it scored again."""
    model, processor = short(5)
    data, state = list(questions(2)), tmp_path / "state.json"
    how: dict[str, Any] = {**QUIET, "budget": 0.45, "width": 2}
    whole = vtr.search.psigmoid(model, processor, data, trials=parts[-1], **how)
    scored: list[str] = []

    class Counting(Search):
        def means(self, *args: Any, **kwargs: Any) -> Any:
            before = set(self.trials.scores)
            out = super().means(*args, **kwargs)
            scored.extend(set(self.trials.scores) - before)
            return out

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sigmoid, "Search", Counting)
        found = [vtr.search.psigmoid(model, processor, data, state=state, trials=n, **how) for n in parts]
    assert found[-1] == whole and found[-1].record["settings"]["trials"] == parts[-1]
    assert json.dumps(found[-1].record["trials"]) == json.dumps(whole.record["trials"])
    assert len(scored) == len(set(scored)) == len({json.dumps(one["schedule"]) for one in whole.record["trials"]})
    fewer = vtr.search.psigmoid(model, processor, data, state=state, trials=parts[0], **how)
    assert fewer == found[0]
    with pytest.raises(ValueError, match="not the same: settings"):
        vtr.search.psigmoid(model, processor, data, state=state, trials=parts[0], **{**how, "budget": 0.5})


def test_suggestions_find_the_top_of_a_hill() -> None:
    asked = Suggestions({"x": (0.0, 1.0), "y": (-1.0, 1.0)}, seed=0)
    best = -math.inf
    for _ in range(8):
        for point in asked.ask(2):
            value = -((point["x"] - 0.3) ** 2) - (point["y"] - 0.4) ** 2
            asked.tell(point, value)
            best = max(best, value)
    assert best > -0.01


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"budget": 1}, "a float in"),
        ({"budget": 0.0}, "a float in"),
        ({"budget": True}, "a float in"),
        ({"budget": 0.4, "measure": "time"}, "measure='time'"),
        ({"budget": 0.4, "trials": 0}, "at least 1"),
        ({"budget": 0.05}, "schedules cost between"),
        ({"budget": 0.4, "curve": [1.0, 0.5]}, "at least three layers"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], told: str) -> None:
    model, processor = short(5)
    with pytest.raises(ValueError, match=told):
        vtr.search.psigmoid(model, processor, list(questions(2)), **{**QUIET, **settings})
