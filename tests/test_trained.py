"""The trained policies shipped for the pocket model, and the table that measures them."""

from __future__ import annotations

import json

import pytest
import torch
from vtr.eval import contenders, spend, trained
from vtr.eval.contenders import Shapes

import vtr
from vtr.chat import decode, encode
from vtr.search import Cost, Example

SPECS = ("pmod:weights=pocket", "dynamic-llava:weights=pocket")


@pytest.fixture(scope="module")
def pocket():
    model, processor = vtr.pocket.load()
    return vtr.patch(model), processor


@pytest.fixture(scope="module")
def asked() -> list[Example]:
    return [Example(s["image"], s["question"], s["answer"]) for s in vtr.pocket.samples(24, "val", 5)]


@pytest.mark.parametrize("spec", SPECS)
def test_shipped_weights_answer_questions(pocket, asked, spec: str) -> None:
    model, processor = pocket
    policy = vtr.policy(spec)
    assert policy.spec.startswith(spec) and policy.base is not None
    assert vtr.policy(policy.spec) == policy
    inputs = encode(processor, [one.question for one in asked], [one.image for one in asked])
    with torch.inference_mode():
        out = model.generate(**inputs, policy=policy, max_new_tokens=2)
    said = decode(processor, out, inputs["input_ids"].shape[1])
    assert sum(a == one.answer for a, one in zip(said, asked, strict=True)) >= 20
    assert vtr.report(model).rows[0].mean_keep < 0.6


def test_each_shipped_policy_is_small() -> None:
    for spec in SPECS:
        folder = vtr.pocket.POLICIES / spec.partition(":")[0]
        assert sum(file.stat().st_size for file in folder.iterdir()) < 260_000


def test_weights_that_are_not_shipped_are_said_to_be_missing() -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=r"weights|vtr_policy\.json"):
        vtr.policy("autoscale:weights=pocket")


def test_policies_of_equal_cost(pocket, asked) -> None:
    model, processor = pocket
    sizes = trained.prompt_sizes(model, processor, asked[:3])
    assert all(vision >= 300 and 2 <= text < 12 for vision, text in sizes)
    cost = Cost.of(model, sizes)
    for spec in SPECS:
        policy = vtr.policy(spec)
        found = {"itself": policy, **trained.equals(policy, cost)}
        assert {"FastV", "Random", "GSearch"} <= set(found)
        flops = {}
        for name, one in found.items():
            total = 0
            for example in asked[:3]:
                with torch.inference_mode():
                    model(**encode(processor, [example.question], [example.image]), policy=one)
                total += vtr.report(model).prefill_flops
            flops[name] = total
        assert all(abs(n / flops["itself"] - 1) < 0.02 for n in flops.values()), flops


def test_times_and_cache_behind_answers(pocket, asked) -> None:
    model, processor = pocket
    policies = {"none": None, "Dynamic-LLaVA": vtr.policy(SPECS[1])}
    image = asked[0].image
    times = trained.decode_times(model, processor, image, policies, [2, 5])
    assert set(times) == set(policies) and all(t[5]["low"] <= t[5]["median"] <= t[5]["high"] for t in times.values())
    kv = trained.cache_growth(model, processor, image, policies, [1, 9])
    a, b = kv["none"]
    config = model.config.text_config
    assert b - a == 8 * 2 * config.num_hidden_layers * config.hidden_size * 4  # eight more tokens everywhere
    assert 0 < kv["Dynamic-LLaVA"][1] - kv["Dynamic-LLaVA"][0] <= b - a
    flops = trained.without_cache(model, processor, [image], policies, 3)
    assert 0 < flops["Dynamic-LLaVA"] < 0.5 * flops["none"]


def test_trained_policies_take_part_in_all(pocket) -> None:
    shapes = Shapes.of(pocket[0])
    found, _, _ = contenders.contenders(["all"], shapes, weights="pocket")
    specs = {one.name: one.spec for one in found}
    assert specs["pmod"].startswith(SPECS[0]) and "weights=pocket,keep=0.0625" in specs["dynamic-llava"]
    assert "no weights" in contenders.contenders(["all"], shapes)[2]["pmod"]
    with pytest.raises(ValueError, match="layer 2 of 10"):
        spend.trained("dynamic-llava", "pocket", 0.2, 10)


def test_the_command_writes_table_plot_and_figures(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trained, "WINDOW", 2)
    body, short, listed = trained.measure(16, 0, 1, [3], 0)
    text = trained.markdown(body, short, listed)
    assert "| p-MoD |" in text and "FastV = Dynamic-LLaVA" in text and "without cache" in text
    assert [c["policy"] for c in body["claims"]][:3] == ["p-MoD", "p-MoD", "Dynamic-LLaVA"]
    assert all(c["here"].endswith("%") for c in body["claims"])
    trained.plot(body, short, listed).savefig(tmp_path / "trained.png")
    assert json.loads(json.dumps(body["long"]))["grown_at"] == [1]
