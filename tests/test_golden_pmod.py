"""p-MoD against the numbers of the official code (MCG-NJU/p-MoD)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official
from tests.official import close
from vtr.schedule import progressive

META = official.meta("pmod")
CONFIG = META["config"]
DEPTH = CONFIG["num_hidden_layers"]
DATA = official.tensors("pmod", "fixtures")
ATTENTIONS = sorted({name.split(".")[0] for name in DATA})
TRAINED = [name.removesuffix(".loss") for name in DATA if name.endswith(".loss")]
"""Such as sdpa.C.train: the cases with a loss, batches of several rows."""


def plain(name: str) -> str | None:
    """A parameter's name without p-MoD's wrapper; None for a router."""
    return None if ".router.router." in name else name.replace(".decoder_layer.", ".")


@functools.cache
def model(attn: str) -> Any:
    return official.given("pmod", plain, attn)


def settings() -> dict[str, Any]:
    """Of the released schedule string, e.g. shiftedcos_decay_0.85_0.15, whose cosine is over at layer 31."""
    kind, _, high, low = CONFIG["mod_target_layers"].split("_")
    assert kind == "shiftedcos"
    numbers = {"high": float(high), "low": float(low), "factor": CONFIG["mod_router_factor"], "period": 31}
    return {**numbers, "norm": CONFIG["mod_weight_norm"], "ties": "official"}


@functools.cache
def policy() -> vtr.PMoD:
    made = vtr.PMoD(**settings())
    routers = {
        f"routers.{name.split('.')[2]}.{name.rpartition('.')[2]}": t
        for name, t in official.tensors("pmod", "weights").items()
        if ".router.router." in name
    }
    made.load_tensors(routers, {"hidden_size": CONFIG["hidden_size"], "num_hidden_layers": DEPTH})
    return made


def prompt(case: str) -> tuple[Any, dict[str, Tensor]]:
    """The model and what it takes in a case such as sdpa.A."""
    made = model(case.split(".")[0])
    embeds, vision = DATA[f"{case}.inputs_embeds"], DATA[f"{case}.mod_target_mask"]
    used = [DATA[f"{case}.{name}"] for name in ("labels", "decode_ids") if f"{case}.{name}" in DATA]
    return made, official.given_prompt(made, embeds, vision, DATA.get(f"{case}.attention_mask"), used)


def routed(case: str) -> list[int]:
    """The layers with a router that a case has numbers of."""
    return [layer for layer in range(DEPTH) if f"{case}.L{layer:02d}.router_raw" in DATA]


def passing(made: Any, b: int, vision: Tensor, mask: Tensor, layer: int) -> list[int]:
    """Slots of row b that pass a layer: the reported vision tokens, and all text."""
    text = (mask[b] & ~vision[b]).nonzero().squeeze(1).tolist()
    return sorted([*vtr.report(made).rows[b].kept(layer), *text])


# ---------------------------------------------------------------------------------------------------------- schedule
def test_the_ratios() -> None:
    want = {int(layer): ratio for layer, ratio in META["ratios"].items()}
    got = policy().layers(DEPTH)
    assert [layer for layer, ratio in enumerate(got) if ratio is not None] == META["mod_target_layer_indices"]
    assert {layer: ratio for layer, ratio in enumerate(got) if ratio is not None} == want
    assert vtr.PMoD().layers(DEPTH) == got  # 31 is the last of its 32 layers


def test_the_ratios_of_another_depth() -> None:
    """Over L - 1 layers the mean stays where the paper has it, and ratios fall to the last layer."""
    for depth in (10, 28, 40, 80):
        ratios = [1.0 if r is None else r for r in progressive(depth)]
        assert ratios == sorted(ratios, reverse=True) and ratios[0] == 1.0 and ratios[-1] == 0.15
        assert abs(sum(ratios) / depth - 0.5375) < 0.015
    official_40 = progressive(40, period=31)
    assert official_40[31] == 0.15 and official_40[39] > 0.15  # the official constant: rises again


# ----------------------------------------------------------------------------------------------- prefill and decoding
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_prefill(attn: str) -> None:
    case = f"{attn}.A"
    made, inputs = prompt(case)
    outs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, a, out: outs.append(out)) for layer in made.get_decoder().layers]
    with torch.no_grad():
        out = made(**inputs, policy=policy(), use_cache=True)
    for hook in hooks:
        hook.remove()
    close(out.logits, DATA[f"{case}.prefill_logits"])
    vision, mask = DATA[f"{case}.mod_target_mask"], inputs["attention_mask"].bool()
    layers = routed(f"{case}.prefill")
    assert layers == META["mod_target_layer_indices"]
    for layer in range(DEPTH):
        name = f"{case}.prefill.L{layer:02d}"
        close(outs[layer], DATA[f"{name}.out"])
        if layer in layers:
            assert passing(made, 0, vision, mask, layer) == DATA[f"{name}.kept_position_ids"][0].tolist()
            entering = outs[layer - 1][0]
            close(policy().at(entering)(layer, entering), DATA[f"{name}.router_raw"][0])
        if f"{name}.key" in DATA:
            keys, values = out.past_key_values.layers[layer].row(0, DATA[f"{name}.key"].shape[2])
            close(keys, DATA[f"{name}.key"])
            close(values, DATA[f"{name}.value"])


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_decoding(attn: str) -> None:
    case = f"{attn}.A"
    made, inputs = prompt(case)
    given, lengths = DATA[f"{case}.decode_ids"], DATA[f"{case}.kv_len_per_step_per_layer"].tolist()
    with torch.no_grad():
        out = made(**inputs, policy=policy(), use_cache=True)
        cache, logits = out.past_key_values, []
        assert [layer.lengths()[0] for layer in cache.layers] == lengths[0]
        for step, token in enumerate(given.tolist(), 1):
            out = made(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1])
            assert [layer.lengths()[0] for layer in cache.layers] == lengths[step]
    close(torch.stack(logits, 1), DATA[f"{case}.decode_logits"])
    # without a cache the row grows, which with official ties is enough to let others pass
    steady = vtr.PMoD(**settings() | {"ties": "lower"})
    steady.share(policy())
    cached, plain = (official.dictate(made, inputs, steady, given[None], use_cache=c).logits for c in (True, False))
    close(torch.stack(plain), torch.stack(cached))


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_text_alone(attn: str) -> None:
    made = model(attn)
    official.mark(made, DATA[f"{attn}.B.input_ids"])
    with torch.no_grad():
        got = made(input_ids=DATA[f"{attn}.B.input_ids"], policy=policy()).logits
    close(got, DATA[f"{attn}.B.logits"])


# ---------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("case", TRAINED)
def test_loss_and_gradients(case: str) -> None:
    """A padded batch of rows with different numbers of vision tokens, one without; routers learn through w alone."""
    batch = case.rpartition(".")[0]
    made, inputs = prompt(batch)
    learns = vtr.PMoD(**settings())
    learns.share(policy())
    assert learns.module is not None
    for module in (made, learns.module):
        module.zero_grad()
        module.requires_grad_(True)
    out = made(**inputs, labels=DATA[f"{batch}.labels"], policy=learns)
    out.loss.backward()
    learns.module.requires_grad_(False)
    close(out.loss.detach()[None], DATA[f"{case}.loss"][None])
    mask = inputs["attention_mask"].bool()
    close(out.logits.detach()[mask], DATA[f"{case}.logits"][mask])
    for layer in routed(case):
        want = DATA[f"{case}.L{layer:02d}.kept_position_ids"]
        for b in range(len(want)):
            passed = passing(made, b, DATA[f"{batch}.mod_target_mask"], mask, layer)
            assert passed == want[b, : len(passed)].tolist() and not want[b, len(passed) :].any()
    parameters = dict(made.named_parameters()) | {f"policy.{n}": p for n, p in learns.module.named_parameters()}
    gradients = [name for name in DATA if name.startswith(f"{case}.grad.")]
    assert gradients
    for name in gradients:
        own = name.removeprefix(f"{case}.grad.")
        new = plain(own)
        mine = official._renamed(new, "") if new else f"policy.routers.{own.split('.')[2]}.{own.rpartition('.')[2]}"
        close(parameters[mine].grad, DATA[name])


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_a_batch_decodes_as_its_rows_do(attn: str) -> None:
    """The official code attends to padding here (meta.json: batched_vs_single): its single rows are what is right."""
    made, inputs = prompt(f"{attn}.C")
    said = torch.randint(1, CONFIG["vocab_size"], (3, 4), generator=torch.Generator().manual_seed(0))
    said[said == made.config.image_token_id] = 0
    mask, pictures = inputs["attention_mask"].bool(), list(made.pictures)
    width = mask.shape[1]
    left = {"input_ids": torch.zeros_like(inputs["input_ids"]), "attention_mask": torch.zeros_like(mask).long()}
    for b in range(3):  # generate wants the padding on the left
        n = int(mask[b].sum())
        left["input_ids"][b, width - n :], left["attention_mask"][b, width - n :] = inputs["input_ids"][b, mask[b]], 1
    together = official.dictate(made, inputs | left, policy(), said)
    images = (inputs["input_ids"] == made.config.image_token_id).any(1)
    for b in range(3):
        made.pictures = [pictures[int(images[:b].sum())]] if images[b] else []
        alone = {"input_ids": inputs["input_ids"][b : b + 1, mask[b]]}
        alone |= {"pixel_values": inputs["pixel_values"][:1]} if images[b] else {}
        single = official.dictate(made, alone, policy(), said[b : b + 1])
        close(torch.stack(together.logits)[:, b], torch.stack(single.logits)[:, 0])
