"""Policies as data: keeps, schedules, spec strings, saving, chains."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtr
from vtr.keep import check_keep, keep_count, top
from vtr.policies.blind.uniform_grid import dither_rank


def test_a_keep_is_a_count_or_a_ratio() -> None:
    assert keep_count(1, 576) == 1
    assert keep_count(1.0, 576) == 576
    assert keep_count(0.1, 744) == 74
    assert keep_count(1 / 3, 576) == 192  # the tolerance: 576 * (1/3) is 191.99999…
    assert keep_count(700, 576) == 576
    assert keep_count(0.5, 0) == 0


@given(st.integers(0, 5000), st.floats(0, 1))
def test_a_ratio_never_keeps_more_than_there_is(total: int, keep: float) -> None:
    assert 0 <= keep_count(keep, total) <= total


@pytest.mark.parametrize("keep", [True, "0.5", None, [0.5]])
def test_a_keep_of_another_type_is_refused(keep: object) -> None:
    with pytest.raises(TypeError, match=r"int \(a count\) or a float"):
        check_keep(keep)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [1.5, -0.1, -3, float("nan"), float("inf")])
def test_an_impossible_keep_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match="keep="):
        vtr.FastV(keep=keep)


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        ("fastv", vtr.FastV()),
        ("fastv:keep=0.25,layer=3", vtr.FastV(0.25, 3)),
        ("fastv:keep=64", vtr.FastV(64)),
        ("random:keep=0.1,seed=7", vtr.Random(0.1, seed=7)),
        ("uniform:keep=9,layer=1", vtr.UniformGrid(9, 1)),
        ("gsearch:schedule=[1.0,0.5,36]", vtr.GSearch([1.0, 0.5, 36])),
        ('gsearch:schedule=[1.0,0.5],queries="last"', vtr.GSearch([1.0, 0.5], queries="last")),
        ("gsearch:schedule=[1.0,0.5],queries=last", vtr.GSearch([1.0, 0.5], queries="last")),
        ("gsearch:llava-1.5-7b", vtr.GSearch("llava-1.5-7b")),
        ("fastv:0.25,layer=3", vtr.FastV(0.25, 3)),
        ("m3:36+gsearch:[1.0,0.5]", vtr.Matryoshka(36) + vtr.GSearch([1.0, 0.5])),
    ],
)
def test_spec_strings(spec: str, made: vtr.Policy) -> None:
    assert vtr.policy(spec) == made
    assert vtr.policy(made.spec) == made


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("fastv:0.25,3", "cannot read '3'"),
        ("fastv:layer=3,0.25", "cannot read '0.25'"),
        ("fastv:", "cannot read ''"),
        ("fstv:0.25", "unknown policy 'fstv'"),
        ("pmod:nowhere", "nowhere"),
        ("chain:m3", "cannot read 'm3'"),
    ],
)
def test_specs_that_cannot_be_read(spec: str, why: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=why):
        vtr.policy(spec)


def test_one_token_is_not_all_tokens_in_specs_and_json(tmp_path) -> None:
    assert vtr.policy("fastv:keep=1").keep == 1 and isinstance(vtr.policy("fastv:keep=1").keep, int)
    assert isinstance(vtr.policy("fastv:keep=1.0").keep, float)
    vtr.FastV(keep=1.0).save_pretrained(tmp_path)
    assert isinstance(vtr.Policy.from_pretrained(tmp_path).keep, float)
    assert vtr.Schedule([1.0]) != vtr.Schedule([1])


@pytest.mark.parametrize("spec", ["fastv:keep=0.3", "gsearch:schedule=[1.0,0.5]", "random:seed=3", "uniform"])
def test_policies_save_and_load(spec: str, tmp_path) -> None:
    made = vtr.policy(spec)
    made.save_pretrained(tmp_path / "p")
    assert vtr.Policy.from_pretrained(tmp_path / "p") == made


def test_a_policy_with_weights_saves_them(tmp_path) -> None:
    @vtr.register_policy("weighted-for-test")
    @dataclass
    class Weighted(vtr.Policy):
        scale: float = 1.0

        def __post_init__(self) -> None:
            self.weight = torch.zeros(3)

        def tensors(self) -> dict[str, torch.Tensor]:
            return {"weight": self.weight}

        def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
            self.weight = tensors["weight"]

    made = Weighted(2.0)
    made.weight = torch.arange(3.0)
    made.save_pretrained(tmp_path)
    loaded = vtr.Policy.from_pretrained(tmp_path)
    assert isinstance(loaded, Weighted) and loaded.scale == 2.0
    assert torch.equal(loaded.weight, torch.arange(3.0))


def test_saved_files_that_are_no_policies(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        vtr.Policy.from_pretrained(tmp_path)
    (tmp_path / "vtr_policy.json").write_text("{")
    with pytest.raises(ValueError, match="not a policy file"):
        vtr.Policy.from_pretrained(tmp_path)
    (tmp_path / "vtr_policy.json").write_text(json.dumps({"policy": "nope", "settings": {}}))
    with pytest.raises(ValueError, match=r"unknown policy 'nope'.*; known: .*fastv"):
        vtr.Policy.from_pretrained(tmp_path)
    vtr.FastV().save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "vtr_policy.safetensors"))
    with pytest.raises(ValueError, match="FastV has no weights"):
        vtr.Policy.from_pretrained(tmp_path)


def test_schedules(tmp_path) -> None:
    schedule = vtr.Schedule([1.0, 0.5, 0.5, 10])
    assert schedule.counts(36) == [36, 18, 18, 10]
    assert schedule.counts(4) == [4, 2, 2, 2]
    assert schedule.mean_keep(36) == pytest.approx((36 + 18 + 18 + 10) / (4 * 36))
    schedule.save(tmp_path / "s.json")
    assert vtr.Schedule.load(tmp_path / "s.json") == schedule
    assert vtr.policy(f"gsearch:schedule={tmp_path / 's.json'}").schedule == schedule


@pytest.mark.parametrize("spec", ["chain", "chain:policies=[]"])
def test_a_chain_of_nothing_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="name one or more, or use policy=None"):
        vtr.policy(spec)
    with pytest.raises(ValueError, match="name one or more, or use policy=None"):
        vtr.Chain([])


def test_a_chain_lets_each_question_be_answered_once() -> None:
    @vtr.register_policy("half-for-test")
    @dataclass
    class Half(vtr.Policy):
        """Drop every other token of an image before the decoder."""

        step: int = 2

        def compress(self, image: vtr.Image) -> torch.Tensor:
            return torch.arange(0, len(image), self.step)

    chain = Half() + vtr.FastV(0.5)
    assert chain.needs(2) == "last" and chain.question_guided
    assert vtr.policy(chain.spec) == chain
    assert vtr.policy("half-for-test:step=3+fastv:keep=4").policies == [Half(3), vtr.FastV(4)]
    with pytest.raises(ValueError, match="FastV and Random both prune"):
        vtr.FastV() + vtr.Random()


def test_registering_names() -> None:
    with pytest.raises(ValueError, match="already registered"):

        @vtr.register_policy("fastv")
        @dataclass
        class Mine(vtr.Policy):
            pass

    with pytest.raises(TypeError, match="@dataclass"):
        vtr.register_policy("thing")(object)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="letters, digits"):
        vtr.register_policy("a b")(vtr.FastV)
    assert {"fastv", "gsearch", "random", "uniform"} <= set(vtr.list_policies())


def test_ties_keep_the_lower_slot() -> None:
    assert top(torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0]), 2).tolist() == [1, 2]
    assert top(torch.zeros(6), 3).tolist() == [0, 1, 2]


@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_the_dither_pattern_spreads_evenly(height: int, width: int, data: st.DataObject) -> None:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rank = dither_rank(y.reshape(-1), x.reshape(-1))
    assert len(rank.unique()) == height * width  # an order without ties
    # any window of 4 × 4 patches holds its share of the kept ones, give or take the window's rim
    keep = data.draw(st.integers(0, height * width))
    kept = torch.zeros(height * width)
    kept[rank.argsort()[:keep]] = 1
    if height >= 8 and width >= 8:
        corner = kept.view(height, width)[:4, :4].sum()
        assert abs(float(corner) - 16 * keep / (height * width)) <= 5
