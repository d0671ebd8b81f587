"""A model over two devices says what it says on one, and no decoded token waits for a device: on pretended ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.eval.cost.pretend import Counts, move, plain, pretended

import vtr
from tests import learned, tiny
from tests.families import FAMILIES, Family
from tests.support import POLICIES, Models, why_not
from tests.tiny import IMAGE
from vtr.engine.devices import execution_device
from vtr.engine.trace import Clock

accelerate = pytest.importorskip("accelerate")
DEVICES = ("cuda:0", "cuda:1")
STEPS = 4
KINDS: dict[str, Family] = {family.kind: family for family in FAMILIES}
"""Llama's language model, Mistral's with windows, one with positions of several axes, one that adds features on."""
SPLIT = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"]


def place(model: Any, at: int) -> Any:
    """The model over two devices as ``device_map`` places it, with the hooks that accelerate puts on each block."""
    text = model.get_decoder()
    move(model, DEVICES[0])
    with pretended():
        for i, block in enumerate([*text.layers, text.norm, model.get_output_embeddings()]):
            device = DEVICES[i >= at]
            accelerate.hooks.add_hook_to_module(move(block, device), hook(device))
        accelerate.hooks.add_hook_to_module(model, hook(DEVICES[0], io_same_device=True))
    return model


def hook(device: str, **settings: Any) -> Any:
    return accelerate.hooks.AlignDevicesHook(device, skip_keys=["past_key_values", "cache"], **settings)


@cache
def both(kind: str) -> tuple[Models, dict[str, Tensor], Any]:
    """A family's models, a batch, and the patched model over two devices: the cuts of most policies fall on layer 2."""
    models = Models.from_family(KINDS[kind])
    return models, models.inputs(), place(vtr.patch(copy.deepcopy(models.stock)), 2)


def said(model: Any, inputs: dict[str, Tensor], policies: Any, **how: Any) -> tuple[Tensor, Tensor | None]:
    """What is generated, and the logits of every step."""
    how = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **how}
    out = tiny.generate(model, inputs, policy=policies, **how)
    return plain(out.sequences), plain(torch.stack(out.logits))


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", SPLIT)
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_two_devices_say_what_one_says(kind: str, name: str) -> None:
    models, inputs, split = both(kind)
    if why_not(KINDS[kind], name):
        pytest.skip("the family cannot have it")
    policies = models.mixed(name, inputs)
    ids, logits = said(models.patched, inputs, policies)
    with pretended():
        got, theirs = said(split, {part: t.to(DEVICES[0]) for part, t in inputs.items()}, policies)
    assert torch.equal(got, ids)
    torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("how", [{"num_beams": 2}, {"use_cache": False}], ids=["beams", "no cache"])
@pytest.mark.parametrize("name", ["dynamic-llava", "pyramid"])
def test_so_do_beams_and_no_cache(kind: str, name: str, how: dict[str, Any]) -> None:
    models, inputs, split = both(kind)
    policies = models.mixed(name, inputs)
    ids, _ = said(models.patched, inputs, policies, **how)
    with pretended():
        got, _ = said(split, {part: t.to(DEVICES[0]) for part, t in inputs.items()}, policies, **how)
    assert torch.equal(got, ids)


def test_where_a_layer_is_going_to_run() -> None:
    def layer() -> Any:
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

    assert execution_device(torch.nn.ReLU()) is None
    assert execution_device(layer()) == torch.device("cpu")
    assert execution_device(layer().to("meta")) is None
    hooks = accelerate.hooks
    offloaded = layer().to("meta")  # as accelerate does where a layer has no parameters of its own
    offloaded[1]._hf_hook = hooks.AlignDevicesHook("cuda:1")
    assert execution_device(offloaded) == torch.device("cuda:1")
    several = layer()
    several._hf_hook = hooks.SequentialHook(hooks.ModelHook(), hooks.AlignDevicesHook(torch.device("cuda")))
    assert execution_device(several) == torch.device("cuda:0")
    numbered = layer()
    numbered._hf_hook = hooks.AlignDevicesHook(1)
    with pretended():
        assert execution_device(numbered) == torch.device("cuda:1")


# -- waits -------------------------------------------------------------------------------------------------------------
EQUAL = [["ab", IMAGE, "what"]] * 3
RAGGED = [["ab", IMAGE, "what"], ["abcdef"], ["a", IMAGE, "bc", IMAGE, "whichone"], ["abcdef" * 4], [IMAGE, "xy"]]


def policies(name: str) -> Any:
    made: dict[str, Any] = {
        "fastv": vtr.FastV(0.5, layer=2),
        "gsearch": vtr.GSearch([1.0, 0.8, 0.5, 0.3, 0.2]),
        "pyramid": vtr.Pyramid(),
        "random": vtr.Random(0.4),
        "pmod": learned.pmod(),
        "dynamic-llava": learned.dynamic(),
        "m3": vtr.Matryoshka(9),
    }
    for policy in made.values():
        if getattr(policy, "module", None) is not None:
            move(policy.module)
    return list(made.values()) if name == "all of them" else made[name]


@contextmanager
def steps(model: Any, counts: Counts) -> Iterator[list[Counts]]:
    """What each forward of the decoder asks of the device, the prompt's first."""
    found: list[Counts] = []

    def after(*_: Any) -> None:
        found.append(counts.snapshot())

    text = model.get_decoder()
    hooks = [
        text.register_forward_pre_hook(lambda *_: counts.reset(), prepend=True),
        text.register_forward_hook(after),
    ]
    try:
        yield found
    finally:
        for each in hooks:
            each.remove()


@cache
def on_one(lm: str) -> tuple[Any, Any]:
    stock = tiny.llava(lm=lm)
    return stock, move(vtr.patch(copy.deepcopy(stock)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("lm", ["llama", "mistral"])
@pytest.mark.parametrize("rows", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize(
    "name", ["fastv", "gsearch", "pyramid", "random", "pmod", "dynamic-llava", "m3", "all of them"]
)
def test_no_decoded_token_waits(lm: str, rows: list[list[str]], name: str) -> None:
    stock, model = on_one(lm)
    asked = policies(name)
    if isinstance(asked, list):
        rows = (rows * 3)[: len(asked)]
    inputs = tiny.batch(stock, rows)
    with pretended() as counts, steps(model, counts) as found:
        on = {part: t.to(DEVICES[0]) for part, t in inputs.items()}
        tiny.generate(model, on, policy=asked, max_new_tokens=14)  # buckets grow on the way
    waits = [{place: n for place, n in step.waits.items() if place.line.startswith("vtr/")} for step in found[1:]]
    assert len(found) == 14 and not any(waits), waits
    copies = [sum(n for place, n in step.copies.items() if place.line.startswith("vtr/")) for step in found[2:]]
    assert sum(copies) <= 6, copies  # of all these tokens: indices are sent once


@pytest.mark.parametrize(("rows", "reads"), [(EQUAL, 0), (RAGGED, 5)], ids=["one bucket", "several buckets"])
def test_beams_in_one_bucket_are_reordered_where_they_are(rows: list[list[str]], reads: int) -> None:
    """With several buckets the host reads where rows come from, once a token for all layers."""
    stock, model = on_one("llama")
    inputs, policy = tiny.batch(stock, rows), vtr.FastV(0.5, layer=2)
    how = {"policy": policy, "max_new_tokens": 5, "num_beams": 3}
    want = tiny.generate(vtr.patch(copy.deepcopy(stock)), inputs, **how)
    with pretended() as counts:
        got = tiny.generate(model, {part: t.to(DEVICES[0]) for part, t in inputs.items()}, **how)
    assert torch.equal(plain(got), want)
    assert sum(n for place, n in counts.waits.items() if place.what == "tolist" and "engine" in place.line) == reads


@pytest.mark.parametrize("lm", ["llama", "mistral"])
def test_layers_alike_share_their_masks(lm: str) -> None:
    """Launches of a token on unequal rows, beside those of the model itself."""
    stock, model = on_one(lm)
    inputs = tiny.batch(stock, RAGGED)
    with pretended() as counts, steps(model, counts) as found:
        on = {part: t.to(DEVICES[0]) for part, t in inputs.items()}
        tiny.generate(model, on, policy=vtr.FastV(0.5, layer=2), max_new_tokens=4)
        masks = sum(n for place, n in found[2].launches.items() if place.what == "le")
    assert masks <= 2 * 5  # of layers before and behind the cut, a bucket each


def test_a_clock_counts_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event lies on the stream of the device where what is timed runs, also if another one is current."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.waited = False

        def record(self, stream: Any) -> None:
            self.device = stream

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: Any) -> float:
            assert end.waited and self.device == end.device
            return {"cuda:0": 2.0, "cuda:1": 3.0}[str(self.device)]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    clock = Clock(torch.device("cuda:0"))
    with clock:
        pass
    clock.device = torch.device("cuda:1")
    with clock:
        pass
    assert clock.ms() == pytest.approx(5.0) and clock.ms() == pytest.approx(5.0)
