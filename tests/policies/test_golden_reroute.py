"""Reroute against the numbers of the official code (elmma/mllm-reroute)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official
from tests.official import close
from tests.policies.stages import prompt_of, text_model, tokens_of

META, GIVEN = official.meta("reroute"), official.tensors("reroute", "fixtures")
DEPTH = META["text_config"]["num_hidden_layers"]
RUNS = [(case, action) for case in META["cases"] for action in case["actions"] if action != "physical_delete"]
"""Removal is another method; its numbers are those of PyramidDrop with positions kept."""


@functools.cache
def model(weights: str) -> Any:
    config = dict(META["text_config"])
    config["num_key_value_heads"] = config["num_key_value_heads"][weights]
    return text_model(config, official.tensors("reroute", f"weights_{weights}"), "model.language_model.")


def policy_of(case: dict[str, Any]) -> vtr.Reroute:
    keeps = [float(keep) for keep in case["keep_ratios"]]
    return vtr.Reroute(keeps, case["drop_layers"], recover=not case["monotonic"])


def inputs_of(case: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    made = model(case["weights"])
    return made, prompt_of(made, GIVEN[f"{case['case']}.ids"], [GIVEN[f"{case['case']}.vision"]])


@pytest.mark.parametrize(("case", "action"), RUNS, ids=[f"{c['case']}-{a}" for c, a in RUNS])
def test_prefill_and_decoding(case: dict[str, Any], action: str) -> None:
    made, inputs = inputs_of(case)
    name, policy = f"{case['case']}.{action}", policy_of(case)
    with torch.no_grad():
        out = made(**inputs, policy=policy, use_cache=True)
    row = vtr.report(made).rows[0]
    text = inputs["input_ids"].shape[1] - case["V"]
    assert [n + text for n in row.vision_tokens] == case["actions"][action]["entering"]
    assert list(row.vision_tokens) == policy.entering(DEPTH, case["V"])
    assert [layer.lengths()[0] for layer in out.past_key_values.layers] == case["actions"][action]["kv"]
    for layer in range(DEPTH):
        if (chosen := GIVEN.get(f"{name}.L{layer}.selected")) is not None:
            assert row.kept(layer) == (chosen + case["start"]).tolist()
    close(out.logits[0, -1], GIVEN[f"{name}.logits"][0])
    said = official.dictate(made, inputs, policy, GIVEN[f"{name}.decode_ids"][None])
    close(torch.cat(said.logits), GIVEN[f"{name}.logits"])


def notes(policy: vtr.Reroute, layer: int, scores: list[float], memo: dict[str, Any]) -> list[int]:
    """Who passes from this layer on."""
    tokens = tokens_of(layer, 8, {"place": torch.arange(len(scores))}, torch.tensor(scores), memo)
    policy.prune(layer, tokens)
    route = policy.route(layer, tokens)
    return list(range(len(scores))) if route is None else route.keep.tolist()  # type: ignore[union-attr]


def test_attention_of_the_layer_before_counts_from_when_a_token_last_took_part() -> None:
    policy, memo = vtr.Reroute([0.5, 0.5], [2, 4], rank="last"), dict[str, Any]()
    assert notes(policy, 2, [0.4, 0.3, 0.2, 0.1], memo) == [0, 1]
    assert notes(policy, 4, [0.4, 0.1, 0.0, 0.0], memo) == [0, 2]  # 2 went around, and had 0.2


def test_who_may_not_recover_stays_out() -> None:
    policy, memo = vtr.Reroute([2, 3], [2, 4], recover=False), dict[str, Any]()
    assert notes(policy, 2, [0.4, 0.3, 0.2, 0.1], memo) == [0, 1]
    assert notes(policy, 4, [0.1, 0.2, 0.3, 0.4], memo) == [0, 1]
    assert policy.entering(5, 4) == [4, 4, 2, 2, 2]
    assert vtr.Reroute([2, 3], [2, 4]).entering(5, 4) == [4, 4, 2, 2, 3]


def test_a_compressor_may_stand_in_front() -> None:
    made = vtr.policy("cls:0.5+reroute")
    assert made.asks("route") and made.entering(32, 576) == vtr.Reroute().entering(32, 576)


@pytest.mark.parametrize("share", [0.15, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("depth", [5, 28, 32])
def test_a_mean_budget(share: float, depth: int) -> None:
    if share * depth < 1.2:
        pytest.skip("the first layers alone are more")
    policy = vtr.Reroute(**vtr.Reroute.settings_at(share, depth, 24))
    counts = policy.entering(depth, 100_000)
    assert sum(counts) / depth / 100_000 == pytest.approx(share, rel=2e-3)


def test_the_default_is_the_published_schedule() -> None:
    assert vtr.Reroute().cuts(32) == [2, 7, 15, 23]
    counts = vtr.Reroute().entering(32, 576)
    assert sum(counts) / 32 == pytest.approx(128, rel=0.01)
    with pytest.raises(ValueError, match="do not fit"):
        vtr.Reroute().check(4)
