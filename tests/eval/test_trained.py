"""The trained policies shipped for the pocket models, and the tables that measure them."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from vtr.eval.accuracy import contenders
from vtr.eval.accuracy.contenders import Shapes
from vtr.eval.studies import apart, trained

import vtr
from vtr.budget import at_share
from vtr.chat import decode, encode
from vtr.pocket.listing import f1
from vtr.search import Cost, Example

SPECS = ("pmod:weights=pocket-joint", "dynamic-llava:weights=pocket-joint")


@pytest.fixture(scope="module")
def pocket():
    """The joint one."""
    model, processor = vtr.pocket.load("joint")
    return vtr.patch(model), processor


@pytest.fixture(scope="module")
def asked() -> list[Example]:
    return [Example(s["image"], s["question"], s["answer"]) for s in vtr.pocket.samples(24, "val", 5)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("spec", [*SPECS, "pmod:weights=pocket", "dynamic-llava:weights=pocket"])
def test_shipped_weights_answer_questions(pocket, asked, spec: str) -> None:
    model, processor = pocket
    if spec not in SPECS:
        model = vtr.patch(vtr.pocket.load()[0])
    policy = vtr.policy(spec)
    assert policy.spec.startswith(spec) and policy.base is not None
    assert vtr.policy(policy.spec) == policy
    inputs = encode(processor, [one.question for one in asked], [one.image for one in asked])
    with torch.inference_mode():
        out = model.generate(**inputs, policy=policy, max_new_tokens=2)
    said = decode(processor, out, inputs["input_ids"].shape[1])
    assert sum(a == one.answer for a, one in zip(said, asked, strict=True)) >= 20
    assert vtr.report(model).rows[0].mean_keep < 0.6


@pytest.mark.parametrize("weights", vtr.pocket.POLICIES)
def test_each_shipped_policy_is_small_and_of_its_model(pocket, weights: str) -> None:
    for spec in SPECS:
        name = spec.partition(":")[0]
        assert sum(file.stat().st_size for file in (vtr.pocket.POLICIES[weights] / name).iterdir()) < 260_000
        if weights != "pocket-joint":
            with pytest.raises(ValueError, match="were trained with another model"):
                vtr.policy(f"{name}:weights={weights}").check_model(pocket[0])


def test_the_joint_model_lists_and_forgets(pocket) -> None:
    model, processor = pocket
    rows = list(vtr.pocket.listings(4, "val", 5))
    inputs = encode(processor, [row["question"] for row in rows], [row["image"] for row in rows])
    mixed = [None, *SPECS, "m3:tokens=9"]
    with torch.inference_mode():
        out = model.generate(**inputs, policy=mixed, max_new_tokens=96)
    said, found = decode(processor, out, inputs["input_ids"].shape[1]), vtr.report(model).rows
    assert sum(f1(text, row["answer"]) for text, row in zip(said, rows, strict=True)) / 4 > 0.6
    assert min(len(text.split()) for text in said) >= 30
    stays = found[2].remembered(-1)
    assert 0.25 < sum(stays) / len(stays) < 0.75 and all(found[0].remembered(-1)) and all(found[2].remembered(1))


def test_weights_that_are_not_shipped_are_said_to_be_missing() -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=r"weights|vtr_policy\.json"):
        vtr.policy("autoscale:weights=pocket")
    with pytest.raises(FileNotFoundError, match="no such folder; shipped are pocket, pocket-joint"):
        vtr.policy("pmod:weights=pockets")


@pytest.mark.slow
def test_policies_of_equal_cost(pocket, asked) -> None:
    model, processor = pocket
    sizes = trained.prompt_sizes(model, processor, asked[:3])
    assert all(vision >= 300 and 2 <= text < 12 for vision, text in sizes)
    cost = Cost.from_model(model, sizes)
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


@pytest.mark.slow
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
    shapes = Shapes.from_model(pocket[0])
    found, _, _ = contenders.contenders(["all"], shapes, weights="pocket-joint")
    specs = {one.name: one.spec for one in found}
    assert specs["pmod"].startswith(SPECS[0]) and "weights=pocket-joint,keep=0.0625" in specs["dynamic-llava"]
    assert "no weights" in contenders.contenders(["all"], shapes)[2]["pmod"]
    with pytest.raises(ValueError, match="layer 2 of 10"):
        at_share("dynamic-llava:weights=pocket", 0.2, 10, 12)


@pytest.mark.slow
def test_the_command_writes_table_plot_and_figures(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trained, "WINDOW", 2)
    body, short, listed = trained.measure(16, 2, 1, [3], 0)
    text = trained.markdown(body, short, listed)
    assert "| p-MoD |" in text and "FastV = Dynamic-LLaVA" in text and "order-free F1" in text
    said = [(c["policy"], c["measure"]) for c in body["claims"]]
    assert said[:2] == [("p-MoD", "prefill FLOPs"), ("p-MoD", "KV")]
    assert [what for name, what in said if name == "Dynamic-LLaVA"] == list(trained.CLAIMS["Dynamic-LLaVA"])
    assert all(c["here"].endswith("%") for c in body["claims"])
    trained.plot(body, short, listed).savefig(tmp_path / "trained.png")
    assert json.loads(json.dumps(body["long"]))["grown_at"] == [1, 3]
    with pytest.raises(typer.BadParameter, match="choose pocket or pocket-joint"):
        trained.main(tmp_path, model="pocket-internvl")


@pytest.mark.slow
def test_joint_and_separate_training_side_by_side(tmp_path, monkeypatch, capsys) -> None:
    for name in ("pmod", "dynamic"):  # what training alone leaves, here the joint one's
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").symlink_to(vtr.pocket.MODELS["joint"])
        (tmp_path / name / "policies").symlink_to(vtr.pocket.POLICIES["pocket-joint"])
    apart.main(tmp_path / "pmod", tmp_path / "dynamic", tmp_path / "out", questions=8, listings=1)
    body, text = json.loads((tmp_path / "out" / "apart.json").read_text()), (tmp_path / "out" / "apart.md").read_text()
    assert list(body["found"]) == ["joint", "p-MoD alone", "Dynamic-LLaVA alone", "finished before"]
    assert [c["difference"] for c in body["compared"]] == [0.0] * 4  # the same weights
    assert "| p-MoD | finished before |" in text and "| p-MoD joint − p-MoD alone | short | +0.0" in text
    assert text in capsys.readouterr().out
