"""Policies that own weights: on disk, in memory, and on the model they were trained with."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vtr
from tests import learned, tiny
from tests.tiny import IMAGE
from vtr.learned import fingerprint

ROWS = [["ab", IMAGE, "what"], ["a", IMAGE, "b", IMAGE, "cd"]]
BOTH = [learned.pmod(), learned.dynamic()]


@pytest.fixture(scope="module")
def model() -> Any:
    return vtr.patch(tiny.llava())


def said(model: Any, policy: Any) -> Any:
    return tiny.generate(model, tiny.batch(model, ROWS), policy=policy, max_new_tokens=6)


# --------------------------------------------------------------------------------------------------------- as data
@pytest.mark.parametrize("policy", BOTH)
def test_saved_and_loaded(model: Any, policy: Any, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    loaded = vtr.Policy.from_pretrained(tmp_path)
    assert loaded == policy and loaded.config() == policy.config()
    assert torch.equal(said(model, loaded), said(model, policy))
    assert loaded.spec.startswith(f"{policy.name}:weights={tmp_path}")
    assert vtr.policy(loaded.spec) == loaded
    named = vtr.policy(f"{policy.name}:weights={tmp_path}")
    assert named == policy and vtr.report(model).rows[0].policy == policy.spec


def test_a_spec_names_a_folder_and_other_settings(tmp_path: Path) -> None:
    folder = tmp_path / "a, b"
    learned.dynamic().save_pretrained(folder)
    changed = vtr.policy(f'dynamic-llava:weights="{folder}",keep=0.7')
    assert isinstance(changed, vtr.DynamicLLaVA) and changed.keep == 0.7 and changed.width == 16
    assert vtr.policy(changed.spec) == changed and changed != learned.dynamic()
    with pytest.raises(ValueError, match="holds a policy 'dynamic-llava', not 'pmod'"):
        vtr.policy(f'pmod:weights="{folder}"')
    with pytest.raises(FileNotFoundError, match=r"no vtr_policy\.json"):
        vtr.policy(f"pmod:weights={tmp_path}")
    learned.dynamic(seed=1).save_pretrained(folder)  # read again once the files are others
    assert vtr.policy(f'dynamic-llava:weights="{folder}"') == learned.dynamic(seed=1)


def test_a_chain_takes_its_weights_along(model: Any, tmp_path: Path) -> None:
    chain = vtr.Pool(2) + learned.pmod()
    chain.save_pretrained(tmp_path)
    loaded = vtr.Policy.from_pretrained(tmp_path)
    assert isinstance(loaded, vtr.Chain) and list(loaded.policies) == list(chain.policies)
    assert torch.equal(said(model, loaded), said(model, chain))


@pytest.mark.parametrize("policy", BOTH)
def test_copies_and_equality(model: Any, policy: Any) -> None:
    want = said(model, policy)
    for again in (copy.deepcopy(policy), copy.copy(policy), pickle.loads(pickle.dumps(policy))):
        assert again == policy and torch.equal(said(model, again), want)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        next(other.module.parameters()).add_(1e-3)
    assert other != policy and policy != vtr.FastV() and type(policy)() != policy
    fewer = dataclasses.replace(policy)  # a new policy of the same settings has no weights
    with pytest.raises(ValueError, match="has no weights: load trained ones"):
        said(model, fewer)


def test_a_folder_of_another_policy_is_left_without_weights(tmp_path: Path) -> None:
    BOTH[0].save_pretrained(tmp_path)
    vtr.FastV(0.3).save_pretrained(tmp_path)
    assert vtr.Policy.from_pretrained(tmp_path) == vtr.FastV(0.3)


# ------------------------------------------------------------------------------------------------------- bad folders
def broken(folder: Path, how: str) -> None:
    weights, config = folder / "vtr_policy.safetensors", folder / "vtr_policy.json"
    tensors, data = load_file(weights), json.loads(config.read_text())
    name = sorted(tensors)[0]
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "gone":
        weights.unlink()
    elif how == "incomplete":
        save_file({k: v for k, v in tensors.items() if k != name}, weights)
    elif how == "foreign":
        save_file({"lm_head.weight": torch.zeros(2, 2)}, weights)
    elif how == "shape":
        save_file(tensors | {name: torch.zeros(3, 7)}, weights)
    else:
        del data["weights"]
        config.write_text(json.dumps(data))


@pytest.mark.parametrize("policy", BOTH)
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("cut off", "no whole safetensors file"),
        ("empty", "no whole safetensors file"),
        ("gone", r"lacks vtr_policy\.safetensors"),
        ("incomplete", "missing [a-z_]+"),
        ("foreign", r"unknown lm_head\.weight \[2, 2\]"),
        ("shape", r"is \[3, 7\], not"),
        ("sizes", "nothing says the hidden_size and num_hidden_layers"),
    ],
)
def test_broken_folders_say_what_is_wrong(policy: Any, how: str, text: str, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    broken(tmp_path, how)
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        vtr.Policy.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("policy", BOTH)
def test_weights_belong_to_a_model(policy: Any, tmp_path: Path) -> None:
    model, other = vtr.patch(tiny.llava()), vtr.patch(tiny.llava(seed=1))
    mine = copy.deepcopy(policy).fit(model)
    mine.save_pretrained(tmp_path)
    loaded = vtr.Policy.from_pretrained(tmp_path)
    want = said(model, loaded)
    with pytest.raises(ValueError, match="were trained with another model"):
        said(other, loaded)
    with pytest.raises(ValueError, match="were trained with another model"):
        vtr.patch(other, policy=f"{policy.name}:weights={tmp_path}")
    forced = vtr.Policy.from_pretrained(tmp_path, allow_mismatch=True)
    assert said(other, forced).shape == want.shape
    assert said(other, f"{policy.name}:weights={tmp_path},allow_mismatch=true").shape == want.shape
    assert torch.equal(said(model, loaded), want)


def test_a_fingerprint_knows_a_model_in_any_dtype() -> None:
    model = tiny.llava()
    policy = learned.pmod().fit(model)
    for dtype in (torch.bfloat16, torch.float16):
        policy.check_model(copy.deepcopy(model).to(dtype))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.get_decoder().layers[3].mlp.down_proj.weight.mul_(1.02)
    with pytest.raises(ValueError, match=r"1 of its 36 matrices .*\(layers\.3\.mlp\.down_proj\.weight"):
        policy.check_model(tuned)
    assert fingerprint(model) == fingerprint(tiny.llava())


@pytest.mark.parametrize("policy", BOTH)
def test_models_of_other_sizes_are_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match="for 5 decoder layers, this model has 4"):
        vtr.patch(tiny.llava(layers=4), policy)
    wide = type(policy)()
    wide.start(64, 5)
    with pytest.raises(ValueError, match="hidden states of 64, this model's have 48"):
        vtr.patch(tiny.llava(), wide)


@pytest.mark.parametrize("policy", BOTH)
def test_weights_follow_the_dtype(policy: Any) -> None:
    model = vtr.patch(tiny.llava().to(torch.bfloat16))
    inputs = tiny.batch(model, ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    out = tiny.generate(
        model, inputs, policy=policy, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
    )
    assert all(step.isfinite().all() for step in out.logits)
    kinds = {p.dtype for p in policy.module.parameters()}
    assert kinds == {torch.float32}  # the policy's own stay what they are
    with torch.no_grad():
        changed = copy.deepcopy(policy)
        changed.at(torch.zeros(1, dtype=torch.bfloat16))
        for parameter in changed.module.parameters():
            parameter.zero_()
        assert not any(p.any() for p in changed.at(torch.zeros(1, dtype=torch.bfloat16)).parameters())


def test_new_weights_begin_as_the_papers_do(model: Any) -> None:
    routers = vtr.PMoD().init_weights(model).module
    assert not any(p.any() for p in routers.parameters())
    predictors = vtr.DynamicLLaVA(width=16, heads=2).init_weights(model).module
    linear = [m for m in predictors.modules() if isinstance(m, torch.nn.Linear)]
    assert all(0.005 < m.weight.std() < 0.04 and (m.bias is None or not m.bias.any()) for m in linear)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: vtr.PMoD(high=0.1), "0 <= low <= high"),
        (lambda: vtr.PMoD(norm="relu_1_1"), "norm='relu_1_1'"),
        (lambda: vtr.PMoD(norm="tanh_1"), "norm='tanh_1'"),
        (lambda: vtr.PMoD(shape="sine"), "choose 'cosine'"),  # type: ignore[arg-type]
        (lambda: vtr.PMoD(ties="upper"), "choose 'lower'"),  # type: ignore[arg-type]
        (lambda: vtr.PMoD(period=0), "period=0"),
        (lambda: vtr.PMoD(ratios=[2.0]), "each lies in"),
        (lambda: vtr.PMoD(ratios=[0.5]).start(8, 2), "ratios has 1 entries, the model 2"),
        (lambda: vtr.DynamicLLaVA(keep=1.5), "keep=1.5"),
        (lambda: vtr.DynamicLLaVA(width=30), "width=30"),
        (lambda: vtr.DynamicLLaVA(layer=-1), "layer=-1"),
        (lambda: vtr.DynamicLLaVA(without_cache="guess"), "choose 'decision'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_assisted_decoding_is_refused_where_words_are_forgotten(model: Any) -> None:
    inputs = tiny.single(tiny.batch(model, ROWS), 0, model)
    with pytest.raises(vtr.UnsupportedError, match="leave out the assistant"):
        tiny.generate(model, inputs, policy=BOTH[1], prompt_lookup_num_tokens=3)
    assert tiny.generate(model, inputs, policy=BOTH[0], prompt_lookup_num_tokens=3, max_new_tokens=4).shape[0] == 1
