"""What whole models cost beside other packages': with made-up sides, and the meter on a small model of ours."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from vtr.eval.peers import costs, meter, random_models, selection, wrapped
from vtr.eval.peers.cases import Case
from vtr.eval.peers.channel import PeerError
from vtr.eval.peers.random_models import LLAVA, QWEN, SMALL

import vtr

CUT = Case(LLAVA, "cut", "fastv:keep=0.25,layer=1", {"rate": 0.75})
STEPS = 3


class Side:
    """Takes ``speed`` ms a call and a tenth for every further word, however many rows; its memory is the test's."""

    def __init__(self, speed: float, alone_only: bool = False, forgets: bool = False, padded: bool = False) -> None:
        self.speed, self.alone_only, self.forgets, self.padded = speed, alone_only, forgets, padded
        self.process, self.asked = SimpleNamespace(pid=os.getpid()), list[tuple[str, dict[str, Any]]]()

    def ask(self, do: str, timeout: float, **request: Any) -> Any:
        self.asked.append((do, request))
        if do != "time":
            return None
        seeds = request["seeds"]
        if self.alone_only and len(seeds) > 1:
            raise PeerError("ValueError: one prompt a call")
        said = [[seed, len(self.asked) if self.forgets else 0, len(seeds) * self.padded * (seed % 2)] for seed in seeds]
        prefill = None if self.padded else self.speed - 1
        return {"ids": said, "first_ms": self.speed, "prefill_ms": prefill, "decode_ms": self.speed / 10}


def measure(theirs: Side, ours: Side, case: Case = CUT) -> dict[str, Any]:
    return costs.measure(case, theirs, ours, rounds=2)  # type: ignore[arg-type]


def test_ratios_are_ours_over_theirs_and_a_batch_is_throughput() -> None:
    theirs, ours = Side(41.0, alone_only=True), Side(21.0)
    found = measure(theirs, ours)
    assert found["prefill"] == {"theirs": 40.0, "ours": 20.0, "ratio": {"median": 0.5, "low": 0.5, "high": 0.5}}
    assert found["decode"]["ratio"]["median"] == pytest.approx(21 / 41)
    for name in ("first", "decode", "all"):  # eight calls of 41 over one of 21
        assert found["batch"][name]["median"] == pytest.approx(8 * 41 / 21)
    assert found["together"] == "ValueError: one prompt a call" and found["ours_together"] == 1.0
    assert theirs.asked[0] == ("prepare", {"kind": LLAVA, "method": "cut", "settings": {"rate": 0.75}})
    assert ours.asked[0] == ("prepare", {"kind": LLAVA, "method": CUT.ours})
    assert [len(r["seeds"]) for do, r in ours.asked if do == "time"].count(8) == 2


def test_what_a_batch_changes_is_seen_and_a_tower_that_was_not_called_is_no_time() -> None:
    found = measure(Side(10.0, padded=True), Side(10.0))
    assert found["together"] == 0.5 and found["prefill"] is None and found["first"]["ratio"]["median"] == 1.0
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(costs.table([(LLAVA, "cut_r0.75", found)]))
    assert {"cut", "–", "1.00", "8.00"} <= set(console.export_text().split())


def test_answers_must_not_change_from_call_to_call() -> None:
    with pytest.raises(PeerError, match="theirs: prompt 0 is answered otherwise"):
        measure(Side(10.0, forgets=True), Side(10.0))
    drawn = measure(Side(10.0, forgets=True), Side(10.0), Case(LLAVA, "random", "random:keep=0.25", drawn=True))
    assert drawn["together"] is None and drawn["ours_together"] is None


def test_costs_are_kept_with_the_row_and_shown() -> None:
    row = wrapped.Row("made up", LLAVA, "cut", CUT.ours, costs=measure(Side(10.0, alone_only=True), Side(10.0)))
    row.versions, row.error = {"x": "1"}, None
    short = wrapped._short(row)
    assert set(short) == {"peer", "model", "method", "ours", "costs"}
    console = Console(width=110, record=True, file=io.StringIO())
    wrapped.show([wrapped.Row(**short)], console)
    said = console.export_text()
    assert "eight prompts in a call: ValueError: one prompt a call" in said and "8.00" in said


@pytest.mark.parametrize("kind", [LLAVA, QWEN])
def test_the_meter_times_whole_calls_and_rows_of_a_batch_say_what_they_say_alone(kind: str) -> None:
    model = vtr.patch(random_models.build(kind))
    tower = model.model.vision_tower if kind == LLAVA else model.model.visual
    with torch.inference_mode():
        found = [
            meter.generate(model, tower, random_models.batch(kind, seeds, SMALL), STEPS, policy=CUT.ours)
            for seeds in ([0], [1], [0, 1])
        ]
    alone, other, both = found
    assert both["ids"] == [alone["ids"][0], other["ids"][0]] and len(alone["ids"][0]) == 1 + STEPS
    assert 0 < alone["prefill_ms"] < alone["first_ms"] and alone["decode_ms"] > 0


def test_what_the_tower_does_behind_the_first_word_is_not_taken_from_the_prefill() -> None:
    model = random_models.build(LLAVA)
    tower, inputs = model.model.vision_tower, random_models.batch(LLAVA, [0], SMALL)
    words: list[int] = []

    def look_again(*_: Any) -> None:  # as models do that decode without a cache
        if words:
            for _i in range(20):
                tower(inputs["pixel_values"])
        words.append(1)

    model.lm_head.register_forward_pre_hook(look_again)
    with torch.inference_mode():
        found = meter.generate(model, tower, inputs, STEPS)
    assert len(words) == 1 + STEPS and 0 < found["prefill_ms"] < found["first_ms"]


def test_a_tower_that_is_not_called_gives_no_prefill() -> None:
    model = random_models.build(LLAVA)
    with torch.inference_mode():
        found = meter.generate(model, torch.nn.Identity(), random_models.batch(LLAVA, [0], SMALL), STEPS)
    assert found["prefill_ms"] is None and found["first_ms"] > 0


def test_all_selectors_can_be_told_a_count() -> None:
    names = selection.names()
    made = [vtr.policy(f"{name}:64{selection.EMBEDDINGS.get(name, '')}") for name in names]
    assert len(made) >= 17 and set(selection.THEIRS) <= set(names) and all(policy.asks("compress") for policy in made)
