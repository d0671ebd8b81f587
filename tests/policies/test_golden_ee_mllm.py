"""EE-MLLM against reference numbers of its definition, made without vtr, and a peer's attention rows (SAISA)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official, oracle
from tests.official import close
from tests.policies.given_text import attention_of, generated, hidden_of, prompt, text_model

META, DATA = official.meta("ee_mllm"), official.tensors("ee_mllm", "reference")
STATE, PEER = official.tensors("ee_mllm", "weights"), official.tensors("ee_mllm", "saisa_attention")
CONFIG = META["config"]
DEPTH, VOCAB = CONFIG["num_hidden_layers"], CONFIG["vocab_size"]
NONE = [case for case, said in META["cases"].items() if said["mode"] == "none"]
cases = pytest.mark.parametrize("case", NONE)


def numbers(case: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{case}."): t for name, t in DATA.items() if name.startswith(f"{case}.")}


def policy_of(case: str) -> vtr.EEMLLM:
    return vtr.EEMLLM(META["cases"][case]["layers"], META["cases"][case]["mode"])


def given(case: str, row: oracle.Row) -> oracle.Given:
    """The definition: in some layers no vision token asks."""
    return oracle.Given(
        [row.slots] * DEPTH, attend={layer: oracle.Part(row.slots) for layer in META["cases"][case]["layers"]}
    )


@cases
def test_the_slow_reference_says_the_same(case: str) -> None:
    n = numbers(case)
    model, row = text_model(CONFIG, STATE, n["inputs_embeds"], n["vision"]), oracle.Row(n["inputs_embeds"], n["vision"])
    how = given(case, row)
    for states, want in zip(hidden_of(model, row, how), n["hidden"], strict=True):
        close(states, want)
    close(oracle.run(model, row, how).logits[~row.vision][:, :VOCAB], n["logits_text_rows"])
    never = list(range(VOCAB, model.config.text_config.vocab_size))
    tokens, logits = oracle.greedy(model, row, how, len(n["ids"]), never)
    assert tokens == n["ids"].tolist()
    close(logits[:, :VOCAB], n["logits"])


@pytest.mark.parametrize("case", sorted({name.split(".")[0] for name in PEER}))
def test_text_pays_what_it_pays_in_a_peer(case: str) -> None:
    """Which vision tokens ask changes nothing for the text of layer 0."""
    n = numbers(case)
    model, row = text_model(CONFIG, STATE, n["inputs_embeds"], n["vision"]), oracle.Row(n["inputs_embeds"], n["vision"])
    layer, at = model.get_decoder().layers[0], torch.arange(len(row.embeds))
    mask = oracle.hidden_keys(torch.ones(len(at)).bool(), at, None)
    normed = oracle.norm(layer.input_layernorm, row.embeds)
    with torch.no_grad():
        out, probs = oracle.attention(layer.self_attn, normed, mask, at, model.config.text_config, row.vision)
    close(out[~row.vision], PEER[f"{case}.attn_text_rows"])
    close(probs[:, ~row.vision], attention_of(model, row, row.embeds, 0)[:, ~row.vision])
    assert not out[row.vision].any()


@cases
def test_the_model(case: str) -> None:
    n, outs = numbers(case), list[Tensor]()
    model = text_model(CONFIG, STATE, n["inputs_embeds"], n["vision"])
    inputs = prompt(model, n["inputs_embeds"], n["vision"])
    hooks = [layer.register_forward_hook(lambda m, a, out: outs.append(out)) for layer in model.get_decoder().layers]
    with torch.no_grad():
        out = model(**inputs, policy=policy_of(case), use_cache=True)
    for hook in hooks:
        hook.remove()
    close(torch.cat(outs), n["hidden"])
    close(out.logits[0, ~n["vision"], :VOCAB], n["logits_text_rows"])
    assert [layer.lengths()[0] for layer in out.past_key_values.layers] == [len(n["vision"])] * DEPTH
    tokens, logits = generated(model, inputs, policy_of(case), len(n["ids"]), VOCAB)
    assert torch.equal(tokens, n["ids"])
    close(logits, n["logits"])


def flops(text: int, vision: int, config: dict[str, Any], composite: bool) -> int:
    """Of one layer, multiply and add counted apart: all project keys and values, and have the MLP."""
    d, n, m = config["hidden_size"], text + vision, config["intermediate_size"]
    kv = config["num_key_value_heads"] / config["num_attention_heads"]
    asks = text if composite else n
    return int(4 * asks * d**2 + 4 * kv * n * d**2 + 4 * asks * n * d + 6 * n * d * m)


@cases
def test_what_is_saved_is_what_the_formula_says(case: str) -> None:
    n = numbers(case)
    model = text_model(CONFIG, STATE, n["inputs_embeds"], n["vision"])
    with torch.no_grad():
        model(**prompt(model, n["inputs_embeds"], n["vision"]), policy=policy_of(case))
    vision, report = int(n["vision"].sum()), vtr.report(model)
    composite = [layer in META["cases"][case]["layers"] for layer in range(DEPTH)]
    text = len(n["vision"]) - vision
    assert report.prefill_flops == sum(flops(text, vision, CONFIG, here) for here in composite)
    assert report.rows[0].asked == [0 if here else vision for here in composite]
    assert report.rows[0].seen == report.rows[0].vision_tokens == [vision] * DEPTH


def test_the_costs_of_the_paper() -> None:
    """Vicuna-7B, 256 text tokens: 24 % less at 2,880 vision tokens, about 70 % of all at 4,900."""
    vicuna = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    for vision, share in ((576, 0.866), (2880, 0.761), (4900, 0.706)):
        found = flops(256, vision, vicuna, True) / flops(256, vision, vicuna, False)
        assert abs(found - share) < 0.0006


def test_which_layers() -> None:
    def chosen(layers: Any, depth: int = 32) -> list[int]:
        return [layer for layer in range(depth) if vtr.EEMLLM(layers).among(layer, depth)]

    assert chosen(0.5) == list(range(16, 32)) == [layer for layer in range(32) if vtr.EEMLLM().among(layer, 32)]
    assert chosen("all") == list(range(32)) == chosen(1.0)
    assert chosen([3, 1]) == [1, 3] and chosen([]) == [] == chosen(0.0)
    assert chosen(0.5, 5) == [3, 4] and chosen(0.1, 5) == [4]


@pytest.mark.parametrize("mode", sorted({said["mode"] for said in META["cases"].values()} - {"none"}))
def test_other_modes_are_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match="'none'"):
        vtr.EEMLLM(mode=mode)


def test_what_cannot_be_is_refused() -> None:
    for layers in ("some", 1.5, [-1]):
        with pytest.raises(ValueError, match="layers"):
            vtr.EEMLLM(layers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layers"):
        vtr.EEMLLM(5)
    with pytest.raises(ValueError, match="choose"):
        vtr.EEMLLM([5]).check(4)
    assert vtr.EEMLLM().entering(32, 576) == [576] * 32
