"""Dynamic-LLaVA against the numbers of the official code (Osilly/dynamic_llava)."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official, oracle
from tests.official import close
from vtr.training.dynamic_llava import DynamicLLaVATraining, Masking, masked_attention

META = official.meta("dynamic_llava")
CONFIG, SPARSE = META["config"], META["config"]["sparse_config"]
DATA = official.tensors("dynamic_llava", "fixtures")
PICTURE = tuple(META["cases"]["D.spec(sys,img,instr,ans)"][0][:2])
"""Tokens before the picture, and of it; the same in all cases."""
RERUNS = sorted(int(name.split(".")[1]) for name in DATA if name.startswith("B.") and name.endswith(".logits_last"))


def plain(name: str) -> str | None:
    """None for a predictor."""
    return None if "_score_predictor." in name else name


@functools.cache
def model() -> Any:
    return official.given("dynamic_llava", plain)


@functools.cache
def policy(without_cache: Any = "decision") -> vtr.DynamicLLaVA:
    made = vtr.DynamicLLaVA(
        keep=SPARSE["vision_keep_rate"], layer=SPARSE["sparse_layer"], without_cache=without_cache,
        width=SPARSE["d_model"], heads=SPARSE["nhead"], inner=SPARSE["dim_feedforward"], blocks=SPARSE["num_layers"],
    )  # fmt: skip
    state = official.tensors("dynamic_llava", "weights")
    predictors = {name.removeprefix("model."): t for name, t in state.items() if plain(name) is None}
    made.load_tensors(predictors, {name: CONFIG[name] for name in ("hidden_size", "num_hidden_layers")})
    return made


def prompt(case: str) -> dict[str, Tensor]:
    """What the model takes in a case."""
    embeds = DATA[f"{case}.inputs_embeds"]
    vision = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    vision[:, PICTURE[0] : PICTURE[0] + PICTURE[1]] = True
    used = [DATA[f"{case}.{name}"] for name in ("labels", "decode_ids") if f"{case}.{name}" in DATA]
    return official.given_prompt(model(), embeds, vision, DATA.get(f"{case}.attention_mask"), used)


def predicted(which: str, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return policy().at(hidden)(which, hidden)


def run(inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Any, list[Tensor]]:
    """What a forward gives, and the packed hidden states that come out of every decoder layer."""
    outs: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, a, out: outs.append(out)) for m in model().get_decoder().layers]
    with torch.no_grad():
        out = model()(**inputs, **kwargs)
    for hook in hooks:
        hook.remove()
    return out, outs


# ----------------------------------------------------------------------------------------------- prefill and decoding
def test_prefill() -> None:
    inputs = prompt("A")
    out, outs = run(inputs, policy=policy())
    kept = DATA["A.prefill.L2.position_ids"][0]
    close(out.logits[:, kept], DATA["A.prefill_logits"])
    for layer, got in enumerate(outs):
        close(got, DATA[f"A.prefill.L{layer}.out"])
        stay = DATA[f"A.prefill.L{layer}.position_ids"][0].tolist()
        first, n = PICTURE
        assert vtr.report(model()).rows[0].kept(layer) == [i for i in stay if first <= i < first + n]
    assert [i - PICTURE[0] for i in vtr.report(model()).rows[0].kept(2)] == DATA["A.keep_index_in_image"][0].tolist()
    close(predicted("image", DATA["A.prefill.img_pred_in"]), DATA["A.prefill.img_pred_logits"])


def test_decoding() -> None:
    """Decisions, key/value lengths of every layer and step, logits, and the cached tensors themselves."""
    inputs, lengths = prompt("A"), DATA["A.kv_len_per_step_per_layer"].tolist()
    with torch.no_grad():
        out = model()(**inputs, policy=policy(), use_cache=True)
    cache, logits, states = out.past_key_values, [], []
    assert [layer.lengths()[0] for layer in cache.layers] == lengths[0]
    for step, token in enumerate(DATA["A.decode_ids"].tolist(), 1):
        out, outs = run({"input_ids": torch.tensor([[token]])}, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1])
        states.append(outs[SPARSE["sparse_layer"] - 1][0, 0])
        assert [layer.lengths()[0] for layer in cache.layers] == lengths[step]
    close(torch.stack(logits, 1), DATA["A.decode_logits"])
    judged = predicted("text", torch.stack(states))
    close(judged[None], DATA["A.decode_txt_pred_logits"])
    assert (judged[:, 0] > judged[:, 1]).long().tolist() == DATA["A.decode_keep_decision"].tolist()
    for name in (name for name in DATA if name.startswith("A.final.") and name.endswith(".key")):
        keys, values = cache.layers[int(name.split(".")[2][1:])].row(0, DATA[name].shape[2])
        close(keys, DATA[name])
        close(values, DATA[name.replace(".key", ".value")])


def test_decoding_without_a_cache() -> None:
    """As the official code does it, which ranks words by their keep logit, from the first decoded token on."""
    inputs, said = prompt("A"), DATA["A.decode_ids"][None, : RERUNS[-1]]
    seen: list[Tensor] = []
    at = model().get_decoder().layers[SPARSE["sparse_layer"]]
    hook = at.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
    out = official.dictate(model(), inputs, policy("ranked"), said, use_cache=False)
    hook.remove()
    for step in RERUNS[1:]:
        assert seen[step].tolist() == DATA[f"B.{step}.L2.position_ids"].tolist()
        close(out.logits[step], DATA[f"B.{step}.logits_last"])


def test_the_official_code_doubles_the_last_token_of_the_prompt() -> None:
    """Its first run without a cache has that token twice from layer 2 on; ours is the same as with a cache."""
    inputs, first = prompt("A"), SPARSE["sparse_layer"]
    _, outs = run(inputs, policy=policy())
    positions = DATA["B.0.L2.position_ids"][0]
    kept = DATA["A.prefill.L2.position_ids"][0]
    assert positions.tolist() == [*kept.tolist(), int(kept[-1])]
    x, n = outs[first - 1][0, positions], len(positions)
    mask = torch.full((n, n), -torch.inf).triu(1)
    with torch.no_grad():
        for layer in model().get_decoder().layers[first:]:
            x, _ = oracle.block(layer, x, mask, positions, model().config.text_config)
        logits = model().lm_head(oracle.norm(model().get_decoder().norm, x[-1]))
    close(logits[None], DATA["B.0.logits_last"])
    once = official.dictate(model(), inputs, policy("ranked"), DATA["A.decode_ids"][None, :1], use_cache=False)
    close(once.logits[0], DATA["A.prefill_logits"][:, -1])


@pytest.mark.parametrize("cached", [True, False])
def test_a_batch_decodes_as_its_rows_do(cached: bool) -> None:
    """The official batch attends to padding where decisions differ: its single rows (single0, …) are what is right."""
    inputs, said = prompt("C"), DATA["C.decode_ids"]
    want = torch.cat([DATA[f"C.single{b}.decode_logits"] for b in range(len(said))])
    out = official.dictate(model(), inputs, policy(), said, use_cache=cached)
    close(torch.stack(out.logits[1:], 1), want)
    if cached:
        lengths = DATA["C.true_cache_length"][-1].tolist()
        assert [layer.lengths() for layer in out.past_key_values.layers] == lengths
        assert DATA["C.decode_keep_decision"].sum(1).unique().numel() > 1


def test_a_left_padded_batch_decodes_as_its_rows_do() -> None:
    """The official code attends to padding from layer 1 on (meta.json: left_padded_vs_unpadded)."""
    inputs, said = prompt("C"), DATA["C.decode_ids"]
    pad = {"input_ids": torch.zeros(len(said), 3).long(), "attention_mask": torch.zeros(len(said), 3).long()}
    padded = inputs | {name: torch.cat([pads, inputs[name]], 1) for name, pads in pad.items()}
    out = official.dictate(model(), padded, policy(), said)
    want = torch.cat([DATA[f"C.single{b}.decode_logits"] for b in range(len(said))])
    close(torch.stack(out.logits[1:], 1), want)


def test_text_alone() -> None:
    official.mark(model(), DATA["E.input_ids"])
    with torch.no_grad():
        close(model()(input_ids=DATA["E.input_ids"], policy=policy()).logits, DATA["E.logits"])


# ---------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("block", [3, 256])
def test_masked_softmax(block: int) -> None:
    q, k, v, keep = (DATA[f"F.{name}"] for name in ("q", "k", "v", "policy"))
    close(masked_attention(q, k, v, keep[..., 0], q.shape[-1] ** -0.5, block=block), DATA["F.out"], 1e-6)


def test_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A right-padded batch; the noise of the Gumbel-softmax drawn as the official code drew it."""
    inputs = prompt("D")
    learns = copy.deepcopy(policy())
    made = copy.deepcopy(model())
    official.features_given(made)
    objective = DynamicLLaVATraining(
        made, learns, text_keep=SPARSE["output_text_keep_rate"], weight=SPARSE["mask_loss_weight"],
        min_answer=SPARSE["output_text_len_for_training"],
    )  # fmt: skip
    seen: list[Masking] = []

    def masking(*args: Any) -> Masking:
        seen.append(DynamicLLaVATraining._masking(objective, *args))
        return seen[0]

    monkeypatch.setattr(objective, "_masking", masking)
    objective.tau = META["cases"]["D.tau"]
    torch.manual_seed(META["cases"]["D.manual_seed"])
    out = objective(**inputs, labels=DATA["D.labels"])
    out["loss"].backward()
    assert seen[0].keep is not None
    close(seen[0].keep.detach()[..., None], DATA["D.policy"])
    close(out["loss"].detach()[None], DATA["D.loss"][None])
    assert out["image_kept"] == DATA["D.gumbel.image.hard"][..., 0].mean(1).mean()
    parameters = dict(made.named_parameters()) | {f"policy.{n}": p for n, p in objective.weights.named_parameters()}
    gradients = [name for name in DATA if name.startswith("D.grad.")]
    assert gradients
    for name in gradients:
        own = name.removeprefix("D.grad.")
        mine = f"policy.{own.removeprefix('model.')}" if plain(own) is None else official._renamed(own, "")
        close(parameters[mine].grad, DATA[name])
