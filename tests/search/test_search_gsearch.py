"""G-Search: against brute force, both methods, interruption, what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vtr
from tests.search.search_models import questions, short
from vtr.search import Prepared, greedy
from vtr.search.prefix import Scorer
from vtr.search.rounds import Search
from vtr.search.state import _digest

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
QUIET: dict[str, Any] = {"progress": False, "check_ranks": False, "start": 1, "levels": LEVELS}


def monotone(levels: tuple[float, ...], layers: int) -> list[list[float]]:
    """All schedules of whole layer 0 and levels (or all tokens) that never grow."""
    return [[1.0, *rest] for rest in itertools.combinations_with_replacement(sorted((*levels, 1.0))[::-1], layers - 1)]


@pytest.mark.slow
def test_gsearch_against_all_monotone_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = short(4)
    data, tolerance = list(questions(4)), 0.1
    prepared = Prepared(model, processor, data)
    found = vtr.search.gsearch(model, processor, prepared, tolerance=tolerance, **QUIET)
    assert found == vtr.search.gsearch(model, processor, data, tolerance=tolerance, **QUIET)
    with pytest.raises(ValueError, match="another model or objective"):
        vtr.search.gsearch(model, processor, prepared, objective="agreement", **QUIET)
    scorer = Scorer(prepared, "text")
    every = monotone(LEVELS, 4)
    scores = scorer.means([1.0], every)
    cost = vtr.search.Cost.from_model(model, scorer.sizes)
    holding = [keeps for keeps, score in zip(every, scores, strict=True) if score is not None and score >= -tolerance]
    best = min(holding, key=cost.flops)
    gap = cost.flops(found) / cost.flops(best) - 1
    with capsys.disabled():
        print(f"\nG-Search {list(found)} costs {gap:.1%} more than the best of {len(every)} schedules, {best}")
    assert list(found) in holding
    assert gap >= 0
    assert found.record["score"] == pytest.approx(scores[every.index(list(found))], abs=1e-5)


class Essential:
    """Stands in for a search: layers each need their own share, whatever the others keep (the paper's assumption)."""

    base_mean = 0.0

    def __init__(self, needs: list[float]) -> None:
        self.needs, self.depth, self.scorer, self.asked = needs, len(needs), self, 0

    def means(self, prefix: Any, candidates: Any, floor: float | None = None) -> list[float]:
        self.asked += len(candidates)
        return [-sum(max(0.0, need - keep) for need, keep in zip(self.needs, one, strict=True)) for one in candidates]


@pytest.mark.parametrize("width", [1, 2, 3, 7])
@pytest.mark.parametrize("needs", [[1.0, 0.4, 0.4, 0.05], [1.0, 0.02, 0.02, 0.02], [1.0, 0.7, 0.2, 0.1]])
def test_where_the_assumption_holds_greedy_is_optimal(width: int, needs: list[float]) -> None:
    fake = Essential(needs)
    keeps, score = [1.0], 0.0
    for _ in needs[1:]:
        keep, score = greedy._bisect(fake, keeps, score, sorted(LEVELS), 0.0, width)  # type: ignore[arg-type]
        keeps.append(keep)
    assert keeps == needs  # no schedule that loses nothing keeps less in any layer
    assert score == 0.0
    assert width > 1 or fake.asked <= 3 * 3  # 6 levels are told apart by 3 questions


def test_bayes_gives_up_no_more_than_the_weight_allows() -> None:
    model, processor = short(4)
    data = list(questions(3))
    found = vtr.search.gsearch(model, processor, data, tolerance=0.2, method="bayes", trials=4, width=2, **QUIET)
    record = found.record
    assert found[1] < 1.0 and list(found) == sorted(found, reverse=True)
    assert record["base"] - record["score"] <= 0.2 * (1 - record["ratios"]["flops"]) + 1e-9
    assert record["method"] == "gsearch-bayes" and record["spent"]["candidates"] == len(record["trials"])


class Stop(Search):
    """A search that is interrupted when it has scored so many rounds."""

    after = 2

    def means(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.tried) >= self.after:
            raise KeyboardInterrupt
        return super().means(*args, **kwargs)


@pytest.mark.parametrize("method", ["bisect", "bayes"])
def test_an_interrupted_search_goes_on_to_the_same_schedule(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = short(4)
    data, state = list(questions(3)), tmp_path / "state.json"
    how = {**QUIET, "tolerance": 0.1, "method": method, "trials": 4, "width": 2}
    whole = vtr.search.gsearch(model, processor, data, **how)
    with monkeypatch.context() as patched:
        patched.setattr(greedy, "Search", Stop)
        with pytest.raises(KeyboardInterrupt):
            vtr.search.gsearch(model, processor, data, state=state, **how)
    kept = json.loads(state.read_text())["body"]["scores"]
    assert 0 < len(kept) < len(whole.record["trials"])
    resumed = vtr.search.gsearch(model, processor, data, state=state, **how)
    assert resumed == whole
    assert resumed.record["resumed"] == len(kept)
    for name in ("score", "trials", "ratios"):
        assert json.dumps(resumed.record[name]) == json.dumps(whole.record[name])  # bit for bit


@pytest.mark.slow
def test_more_trials_a_layer_go_on_from_a_search_that_is_over(tmp_path: Path) -> None:
    model, processor = short(4)
    data, state = list(questions(3)), tmp_path / "state.json"
    how = {**QUIET, "tolerance": 0.1, "method": "bayes", "width": 2}
    whole = vtr.search.gsearch(model, processor, data, trials=6, **how)
    first = vtr.search.gsearch(model, processor, data, state=state, trials=2, **how)
    again = vtr.search.gsearch(model, processor, data, state=state, trials=6, **how)
    assert again == whole and again.record["settings"]["trials"] == 6
    assert json.dumps(again.record["trials"]) == json.dumps(whole.record["trials"])
    assert again.record["resumed"] == first.record["spent"]["candidates"] > 0
    old = json.loads(state.read_text())["body"]  # as it was written once, with the trials among the settings
    old["identity"]["settings"]["trials"] = 6
    state.write_text(json.dumps({"version": 1, "sha256": _digest(old), "body": old}))
    assert vtr.search.gsearch(model, processor, data, state=state, trials=8, **how).record["resumed"] > 0


def _flip(text: str) -> str:
    body = json.loads(text)
    first = next(iter(body["body"]["scores"]))
    body["body"]["scores"][first] = -0.123
    return json.dumps(body)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "", "damaged"),
        (lambda text: '{"version": 1, "sha256": "0", "body": []}', "damaged"),
        (_flip, "checksum"),
        (lambda text: text.replace('"version": 1', '"version": 99'), "another version"),
    ],
)
def test_a_damaged_state_is_refused_and_left_alone(harm: Any, told: str, tmp_path: Path) -> None:
    model, processor = short(4)
    data, state = list(questions(2)), tmp_path / "state.json"
    how = {**QUIET, "tolerance": 0.1, "levels": (0.1, 0.5)}
    vtr.search.gsearch(model, processor, data, state=state, **how)
    state.write_text(harm(state.read_text()))
    before = state.read_bytes()
    with pytest.raises(ValueError, match=told):
        vtr.search.gsearch(model, processor, data, state=state, **how)
    assert state.read_bytes() == before


def test_a_state_of_another_search_is_refused(tmp_path: Path) -> None:
    model, processor = short(4)
    data, state = list(questions(2)), tmp_path / "state.json"
    how = {**QUIET, "levels": (0.1, 0.5)}
    vtr.search.gsearch(model, processor, data, state=state, tolerance=0.1, **how)
    with pytest.raises(ValueError, match=r"another search \(not the same: settings\)"):
        vtr.search.gsearch(model, processor, data, state=state, tolerance=0.2, **how)
    with pytest.raises(ValueError, match="not the same: data"):
        vtr.search.gsearch(model, processor, data[:1], state=state, tolerance=0.1, **how)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "binary"}, "method='binary'"),
        ({"tolerance": -0.1}, "can be negative"),
        ({"objective": "bleu"}, "objective='bleu'"),
        ({"start": 0}, "start=0"),
        ({"start": 4}, "start=4"),
        ({"levels": (0.5, 2.0)}, "levels="),
        ({"levels": ()}, "levels="),
        ({"queries": "all"}, "queries='all'"),
        ({"reuse": "none"}, "reuse='none'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"width": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], told: str) -> None:
    model, processor = short(4)
    with pytest.raises(ValueError, match=told):
        vtr.search.gsearch(model, processor, list(questions(2)), **{**QUIET, **settings})


def test_a_model_must_be_patched() -> None:
    model = SimpleNamespace()
    with pytest.raises(ValueError, match=r"vtr\.patch"):
        vtr.search.gsearch(model, None, list(questions(2)), progress=False)


def test_a_model_in_training_is_refused() -> None:
    model, processor = short(4)
    try:
        model.train()
        with pytest.raises(ValueError, match=r"model\.eval\(\)"):
            vtr.search.gsearch(model, processor, list(questions(2)), **QUIET)
    finally:
        model.eval()


def test_a_found_schedule_is_saved_with_its_record_and_curve(tmp_path: Path) -> None:
    model, processor = short(5)
    found = vtr.search.gsearch(model, processor, list(questions(2)), tolerance=0.3, **{**QUIET, "queries": "last"})
    found.save_pretrained(tmp_path / "schedule")
    policy = vtr.GSearch.from_pretrained(tmp_path / "schedule")
    assert policy == vtr.GSearch(found, queries="last") == found.policy()
    assert vtr.GSearch(tmp_path / "schedule").schedule == found
    assert json.loads((tmp_path / "schedule" / "search.json").read_text())["tolerance"] == 0.3
    assert (tmp_path / "schedule" / "curve.png").stat().st_size > 5000
