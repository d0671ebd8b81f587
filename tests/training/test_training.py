"""Training through a reduced model: gradients are those of a dense run that says the same with masks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtr
from tests import oracle, tiny
from tests.conftest import Pair
from tests.engine.test_seams import EveryOther, Mod, Pairs
from tests.loads import FAMILIES, ROWS, gradients, kept, labels, trainable
from vtr.engine import compat

REPLAYED = pytest.mark.skipif(compat.HOOKS_ARE_REPLAYED, reason="transformers before 5.23 runs a layer's hooks again")

LAYERS = 4
SHRINKING = [1.0, 0.6, 0.6, 0.2]
EXACT = 1e-5
"""Of a gradient, relative to its largest entry."""
MIXES: dict[str, list[Any]] = {
    "prune": [vtr.FastV(0.5), vtr.Random(0.3), None, vtr.GSearch(SHRINKING)],
    "prune all": [vtr.FastV(0.0, 1), vtr.Random(0.0), None, vtr.UniformGrid(0)],
    "route": [Mod(), Mod(weighted=False), Mod(), None],
    "compress": [EveryOther(3), Pairs(), Pairs(), EveryOther()],
    "mixed": [Mod(), Pairs(), None, vtr.FastV(0.25)],
    "chains": [Pairs() + vtr.FastV(1.0), EveryOther() + vtr.Random(1.0), None, None],
}


@pytest.fixture(scope="module", params=zip(FAMILIES, itertools.cycle(["sdpa", "eager"])), ids="-".join)
def models(request: pytest.FixtureRequest) -> Pair:
    family, attn = request.param
    stock = trainable(getattr(tiny, family)(attn, layers=LAYERS))
    return Pair(stock, vtr.patch(copy.deepcopy(stock)))


# ------------------------------------------------------------------------------------------- the dense equivalents
def shorter(prompt: oracle.Row, policy: Any, images: list[int]) -> tuple[oracle.Row, Tensor]:
    """The prompt with images shrunk before the decoder, and of each old slot the new one that stands for it."""
    embeds, vision, stays, at = prompt.embeds.clone(), prompt.vision, ~prompt.vision, 0
    for n in images:
        slots = vision.nonzero().squeeze(1)[at : at + n]
        at += n
        if isinstance(policy, Pairs):
            m = n // 2
            places = slots[[(i + 1) * n // m - 1 for i in range(m)]]
            embeds[places] = prompt.embeds[slots[: 2 * m]].view(m, 2, -1).mean(1)
        else:
            places = slots[:: policy.step]
        stays[places] = True
    return oracle.Row(embeds[stays], vision[stays]), stays.cumsum(0) - 1


def routed(model: Any, prompt: oracle.Row, policy: Mod) -> Tensor:
    """p-MoD's arithmetic on all tokens: who goes around a layer is a hidden key there and has its state scaled."""
    x, text, slots = prompt.embeds, model.get_decoder(), prompt.vision.nonzero().squeeze(1)
    positions = torch.arange(len(x))
    for depth, layer in enumerate(text.layers):
        passes, weights = torch.ones(len(x)).bool(), torch.ones(len(x))
        if depth % 2:
            passes[slots] = False
            passes[slots[::2]] = True
            if policy.weighted:
                weights = weights.index_copy(0, slots, 0.8 + 0.4 * torch.sigmoid(x[slots].mean(1)))
        through, _ = oracle.block(
            layer, x, oracle.hidden_keys(passes, positions, None), positions, model.config.text_config, weights
        )
        x = torch.where(passes[:, None], through, weights[:, None] * x)
    return model.lm_head(oracle.norm(text.norm, x))


def dense(model: Any, inputs: dict[str, Tensor], policy: Any, seen: list[list[int]]) -> Tensor:
    """Differentiable logits [n, vocab] of one row, by a dense run of the untouched model."""
    prompt = oracle.row(model, inputs, grad=True)
    policy = policy.policies[0] if isinstance(policy, vtr.Chain) else policy
    if isinstance(policy, Mod) and bool(prompt.vision.any()):
        return routed(model, prompt, policy)
    if isinstance(policy, (Pairs, EveryOther)) and bool(prompt.vision.any()):
        images: dict[str, Tensor] = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        small, shown = shorter(prompt, policy, tiny.lengths(model, images))
        return oracle.run(model, small, grad=True).logits[shown]
    how = None if isinstance(policy, (Mod, Pairs, EveryOther)) else oracle.rule(policy, seen)
    return oracle.run(model, prompt, how, seen, grad=True).logits


def dense_loss(model: Any, inputs: dict[str, Tensor], wanted: Tensor, policies: list[Any], seen: list[Any]) -> Tensor:
    """The causal LM loss of a batch, each row by itself and without padding."""
    total = torch.zeros(())
    for b, policy in enumerate(policies):
        logits, row = dense(model, tiny.single(inputs, b, model), policy, seen[b]), wanted[b, tiny.real(inputs, b)]
        total = total + F.cross_entropy(logits[:-1], row[1:], ignore_index=-100, reduction="sum")
    return total / (wanted[:, 1:] != -100).sum()


# ------------------------------------------------------------------------------------------------------ comparisons
def learned(model: Any, *losses: Tensor) -> dict[str, Tensor]:
    """The gradients of ``losses``, and of them alone."""
    model.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()
    return gradients(model)


def same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], exact: float = EXACT) -> None:
    zero = {name for name, grad in want.items() if not bool(grad.any())}
    assert got.keys() - zero == want.keys() - zero
    far = {name: float((got[name] - want[name]).abs().max()) for name in got.keys() & want.keys()}
    far = {name: by for name, by in far.items() if by > exact * max(float(want[name].abs().max()), 1e-6)}
    assert not far


def slots_of(model: Any, inputs: dict[str, Tensor]) -> list[list[list[int]]]:
    """Per row and layer the kept slots of the last call, counted from the row's first real slot."""
    first = [int(tiny.real(inputs, b)[0]) for b in range(len(inputs["input_ids"]))]
    return [[[slot - start for slot in layer] for layer in kept(model, b)] for b, start in enumerate(first)]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("mix", MIXES)
def test_gradients_are_those_of_a_dense_run(models: Pair, mix: str, padding: str) -> None:
    inputs, policies = tiny.batch(models.stock, ROWS, padding), MIXES[mix]
    wanted = labels(inputs)
    loss = models.patched(**inputs, labels=wanted, policy=policies).loss
    got = learned(models.patched, loss)
    seen = slots_of(models.patched, inputs)
    reference = dense_loss(models.stock, inputs, wanted, policies, seen)
    torch.testing.assert_close(loss, reference, atol=EXACT, rtol=0)
    same_gradients(got, learned(models.stock, reference))
    trained = {name for name, p in models.patched.named_parameters() if p.requires_grad}
    assert got.keys() == trained, "every trained parameter has a gradient, as data-parallel training needs"


def test_a_row_without_policy_learns_what_transformers_teaches(models: Pair) -> None:
    """The reference of the comparisons above is the stock model's own loss."""
    inputs = tiny.batch(models.stock, ROWS, "right")
    wanted = labels(inputs)
    want = learned(models.stock, models.stock(**inputs, labels=wanted).loss)
    same_gradients(learned(models.stock, dense_loss(models.stock, inputs, wanted, [None] * 4, [[]] * 4)), want)
    same_gradients(learned(models.patched, models.patched(**inputs, labels=wanted).loss), want)
    keeps_all = vtr.Random(1.0)
    same_gradients(learned(models.patched, models.patched(**inputs, labels=wanted, policy=keeps_all).loss), want)


def checkpointing(model: Any, reentrant: bool, call: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of ``call`` with every decoder layer checkpointed."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    try:
        return learned(model, call())
    finally:
        model.gradient_checkpointing_disable()


@REPLAYED
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mix", ["prune", "prune all", "compress", "chains", "route", "mixed"])
def test_checkpointing_changes_no_gradient(models: Pair, mix: str, reentrant: bool) -> None:
    inputs, model = tiny.batch(models.stock, ROWS, "right"), models.patched
    wanted, policies = labels(inputs), [Mod(False) if reentrant and p == Mod() else p for p in MIXES[mix]]

    def loss() -> Tensor:
        return model(**inputs, labels=wanted, policy=policies).loss

    want = learned(model, loss())
    before = kept(model)
    same_gradients(checkpointing(model, reentrant, loss), want)
    assert kept(model) == before


def test_checkpointing_that_runs_hooks_again_is_refused(models: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "HOOKS_ARE_REPLAYED", True)
    inputs, model = tiny.batch(models.stock, ROWS), models.patched
    with pytest.raises(vtr.UnsupportedError, match=r"5\.23 or newer"):
        checkpointing(model, False, lambda: model(**inputs, labels=labels(inputs), policy=MIXES["prune"]).loss)
    model.zero_grad(set_to_none=True)
    assert torch.isfinite(model(**inputs, labels=labels(inputs), policy=MIXES["prune"]).loss)


@REPLAYED
def test_reentrant_checkpointing_of_weighted_routes_is_refused(models: Pair) -> None:
    """It sees gradients of a layer's first argument only, and the weights are another way in."""
    inputs, model = tiny.batch(models.stock, ROWS), models.patched
    with pytest.raises(vtr.UnsupportedError, match="use_reentrant"):
        checkpointing(model, True, lambda: model(**inputs, labels=labels(inputs), policy=MIXES["route"]).loss)
    model.zero_grad(set_to_none=True)


def test_accumulated_steps_add_up(models: Pair) -> None:
    """Two reduced forwards before their backwards, and backwards in the other order: graphs do not share state."""
    inputs, model = tiny.batch(models.stock, ROWS), models.patched
    wanted = labels(inputs)

    def loss(mix: str) -> Tensor:
        return model(**inputs, labels=wanted, policy=MIXES[mix]).loss

    alone = [learned(model, loss("prune")), learned(model, loss("route"))]
    first, second = loss("prune"), loss("route")
    both = learned(model, second, first)
    same_gradients(both, {name: alone[0][name] + alone[1][name] for name in alone[0]})


def test_a_label_may_follow_a_dropped_slot(models: Pair) -> None:
    """The text behind an image is predicted from the image's last slot: if that is gone, from the last state before."""
    inputs = tiny.batch(models.stock, [["ab", tiny.IMAGE, "what"]])
    last = int((inputs["input_ids"][0] == tiny.IMAGE_ID).nonzero()[-1])
    only = torch.full_like(inputs["input_ids"], -100)
    only[0, last + 1] = inputs["input_ids"][0, last + 1]
    for policy in (vtr.Random(0.0, 2), vtr.FastV(3, 1), EveryOther(8)):
        out = models.patched(**inputs, labels=only, policy=policy)
        seen = slots_of(models.patched, inputs)
        survivor = max([*seen[0][-1], 2])  # BOS, a, b stand in front of the image
        assert survivor < last
        torch.testing.assert_close(out.logits[0, last], out.logits[0, survivor])
        want = dense_loss(models.stock, inputs, only, [policy], seen)
        same_gradients(learned(models.patched, out.loss), learned(models.stock, want))


def test_frozen_embeddings_and_a_trained_projector(models: Pair) -> None:
    """The first stage of LLaVA's training: only the projector learns, through a frozen decoder."""
    inputs = tiny.batch(models.stock, ROWS, "right")
    wanted = labels(inputs)
    want = learned(models.patched, models.patched(**inputs, labels=wanted, policy=MIXES["mixed"]).loss)
    model = copy.deepcopy(models.patched)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    got = learned(model, model(**inputs, labels=wanted, policy=MIXES["mixed"]).loss)
    assert got and all("multi_modal_projector" in name for name in got)
    same_gradients(got, {name: want[name] for name in got})


@vtr.register_policy("gate-for-test")
@dataclass
class Gate(vtr.Policy):
    """A routing policy with a weight of its own."""

    start: float = 0.3

    def __post_init__(self) -> None:
        self.gate = torch.tensor(self.start, requires_grad=True)

    def route(self, layer: int, tokens: vtr.Tokens) -> vtr.Route:
        return vtr.Route(torch.arange(0, len(tokens), 2), 4 * torch.sigmoid(self.gate + tokens.hidden[:, 0]))


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=REPLAYED)])
def test_a_policy_can_learn(models: Pair, checkpointing: bool) -> None:
    """The weight of a routing policy gets the slope that finite differences say."""
    inputs, model, gate = tiny.batch(models.stock, ROWS[:1]), copy.deepcopy(models.patched), Gate()
    wanted, step = labels(inputs), 0.05
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss() -> Tensor:
        return model(**inputs, labels=wanted, policy=gate).loss

    loss().backward()
    with torch.no_grad():
        gate.gate += step
        above = loss()
        gate.gate -= 2 * step
        slope = (above - loss()) / (2 * step)
    assert abs(float(slope)) > 1e-3
    torch.testing.assert_close(gate.gate.grad, slope, atol=EXACT / step, rtol=0.01)
