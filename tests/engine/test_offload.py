"""accelerate's hooks and vtr's on one model: weights that move in and out, whichever of the two came first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import tiny
from tests.engine.test_seams import Mod, Pairs
from tests.loads import FAMILIES, ROWS, close, forward, kept

accelerate = pytest.importorskip("accelerate")
POLICIES: list[Any] = [vtr.FastV(0.25, 2), Pairs(), None, Mod()]
RUN: dict[str, Any] = {"max_new_tokens": 4}


def dispatched(model: Any, folder: Path) -> Any:
    """All on one device, with the hooks that several devices get."""
    return accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def layer_by_layer(model: Any, folder: Path) -> Any:
    """One decoder layer on disk, the rest in memory."""
    text, whole = model.get_decoder(), {model, model.model}
    places = {}
    for name, module in model.named_modules():
        if module not in whole | {text, text.layers}:
            places.update({name: "disk" if module is text.layers[1] else "cpu"} if not in_map(name, places) else {})
    places.update({name: "cpu" for name, _ in model.named_parameters() if not in_map(name, places)})
    return accelerate.dispatch_model(model, device_map=places, main_device="cpu", offload_dir=folder, force_hooks=True)


def in_map(name: str, places: dict[str, str]) -> bool:
    """Whether a module above ``name`` has its place already."""
    return any(name.startswith(above + ".") for above in places)


def on_cpu(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: Any, folder: Path) -> Any:
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


def can_generate(model: Any) -> bool:
    """transformers encodes images outside of forward; parameters beside the vision tower are not moved in for that."""
    return not any(p.is_meta for p in model.model.parameters(recurse=False))


WAYS: list[Callable[[Any, Path], Any]] = [dispatched, layer_by_layer, on_cpu, on_disk]


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request: pytest.FixtureRequest) -> Any:
    return getattr(tiny, request.param)(layers=4)


def logits_and_kept(model: Any, inputs: dict[str, Tensor], policy: Any) -> tuple[Tensor, list[Any]]:
    return forward(model, inputs, policy=policy).logits, [kept(model, b) for b in range(len(ROWS))]


def same(model: Any, here: Any, inputs: dict[str, Tensor], policy: Any) -> None:
    """Both models answer alike, by forward and by generate."""
    (logits, slots), (want, there) = (logits_and_kept(m, inputs, policy) for m in (model, here))
    close(logits, want)
    assert slots == there
    if can_generate(model):
        sequences, expected = (tiny.generate(m, inputs, policy=policy, **RUN) for m in (model, here))
        assert torch.equal(sequences, expected)


def accelerate_hooks(model: Any) -> dict[str, Any]:
    """Which modules carry a hook of accelerate's, and what it wraps."""
    return {
        name: (module._hf_hook, module.__dict__.get("forward"), module.__dict__.get("_old_forward"))
        for name, module in model.named_modules()
        if hasattr(module, "_hf_hook")
    }


@pytest.mark.sample(1)
@pytest.mark.parametrize("first", ["patched first", "offloaded first"])
@pytest.mark.parametrize("offload", WAYS)
def test_offloaded_weights_give_the_same(
    stock: Any, offload: Callable[[Any, Path], Any], first: str, tmp_path: Path
) -> None:
    inputs, model, here = tiny.batch(stock, ROWS), copy.deepcopy(stock), vtr.patch(copy.deepcopy(stock))
    if first == "patched first":
        vtr.patch(model)
    model = offload(model, tmp_path)
    before = accelerate_hooks(model)
    assert before
    vtr.patch(model)
    for policy in (POLICIES, None):
        same(model, here, inputs, policy)
    vtr.unpatch(model)
    assert accelerate_hooks(model) == before
    close(forward(model, inputs).logits, forward(stock, inputs).logits)


@pytest.mark.parametrize("offload", [dispatched, on_cpu])
def test_accelerate_may_take_its_hooks_away(stock: Any, offload: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    """vtr's stay."""
    inputs, model = tiny.batch(stock, ROWS), offload(vtr.patch(copy.deepcopy(stock)), tmp_path)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not accelerate_hooks(model)
    same(model, vtr.patch(copy.deepcopy(stock)), inputs, POLICIES)
