"""Sliders are made of what a policy's class says: every policy's, also one that was registered a moment ago."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

import vtr
from vtr import settings
from vtr.play.ask import Player
from vtr.play.knobs import BUDGET, MOST, NONE, first_spec, knobs, spec_at

NAMES = [name for name in vtr.list_policies() if name != "chain" and not name.endswith("-for-test")]
STEPS = {"m3", "globalcom2"}


@pytest.mark.parametrize("name", NAMES)
def test_a_slider_begins_where_the_policy_is_itself(name: str, player: Player) -> None:
    found = knobs(name)
    assert len(found) <= MOST
    for knob in found:
        assert knob.low <= knob.value <= knob.high and knob.label and knob.step > 0
    made = vtr.policy(first_spec(name, player.model))
    assert made.name == name
    fields = {field.name: field.default for field in dataclasses.fields(vtr.policy_class(name))}
    for knob in found:
        if knob.setting != BUDGET:
            assert getattr(made, knob.setting) == fields[knob.setting] == knob.value


@pytest.mark.parametrize("name", [name for name in NAMES if [k.setting for k in knobs(name)] == [BUDGET]])
def test_a_budget_is_kept(name: str, player: Player) -> None:
    """Its mean over layers is near the slider's share, by the policy's own account where that follows from sizes."""
    from vtr.budget import mean_of, typical

    layout = typical(player.model)
    assert layout is not None
    for share in (0.25, 0.5):
        try:
            made = vtr.policy(spec_at(name, [share], player.model))
            found = mean_of(made, player.depth, layout) / len(layout)
        except ValueError:  # no step is near, or what stays depends on the picture
            assert name in STEPS
            continue
        assert found == pytest.approx(share, abs=0.1), made.spec


def test_most_policies_have_a_budget() -> None:
    """So the test above is about something."""
    assert sum([k.setting for k in knobs(name)] == [BUDGET] for name in NAMES) > 35
    assert [k.setting for k in knobs("zipvl")] == ["tau", "recent"] and knobs(NONE) == [] == knobs("by_image")


def test_a_budget_of_all_and_one_that_cannot_be(player: Player) -> None:
    assert spec_at("uniform", [1.0], player.model) == "uniform:keep=1.0"
    assert spec_at("m3", [0.3], player.model) == "m3:tokens=36"  # the nearest, though it is above
    with pytest.raises(ValueError, match="layer 0 takes all tokens"):
        spec_at("gsearch", [0.02], player.model)
    assert first_spec("gsearch", player.model).startswith("gsearch:schedule=[1.0,")


def test_settings_that_are_no_budget_are_set_as_they_are(player: Player) -> None:
    assert spec_at("zipvl", [0.5, 32.0], player.model) == "zipvl:tau=0.5,recent=32"
    assert spec_at("downsample", [0.30000000000000004], player.model) == "downsample:scale=0.3"
    assert spec_at("pmod", [0.7, 0.1], player.model).startswith("pmod:weights=pocket,high=0.7,low=0.1")
    assert spec_at("pmod", [0.7, 0.1], player.model, "pocket-joint").startswith("pmod:weights=pocket-joint,")
    assert spec_at(NONE, [], player.model) == NONE


def test_a_new_policy_has_sliders_by_itself(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))

    @vtr.register_policy("new-scores")
    @dataclass
    class Scores(vtr.ScorePolicy):
        def score(self, tokens: Any) -> Any:
            return tokens.hidden.float().norm(dim=-1)

    @vtr.register_policy("new-numbers")
    @dataclass
    class Numbers(vtr.Policy):
        """Numbers.

        Args:
            word: no number. heat: how hot. steps: how many. more: and more.
        """

        word: str = "a"
        heat: float = 2.0
        flag: bool = True
        steps: int = 3
        more: float = 0.5

    assert [knob.setting for knob in knobs("new-scores")] == [BUDGET]
    assert spec_at("new-scores", [0.5], player.model).startswith("new-scores:keep=")
    heat, steps = knobs("new-numbers")
    assert (heat.setting, heat.label, heat.high, heat.whole) == ("heat", "heat: how hot.", 8.0, False)
    assert (steps.setting, steps.low, steps.high, steps.whole) == ("steps", 1, 12, True)
    assert spec_at("new-numbers", [0.5, 4.0], player.model) == 'new-numbers:word="a",heat=0.5,steps=4'
