"""The device is never waited for between a prefill's first layer and its last, nor in a decode step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vtr
from tests import learned, tiny
from tests.tiny import IMAGE
from vtr.engine import cache, questions

ROWS = [["ab", IMAGE, "what"], ["a", IMAGE, "bc", IMAGE, "whichone"], ["abcdef"], ["abcd", IMAGE, "efg"]]
POLICIES = [
    [vtr.FastV(0.5, layer=2), None, vtr.Random(0.5), vtr.GSearch([1.0, 0.8, 0.5, 0.3, 0.2])],
    [vtr.Pyramid(), vtr.UniformGrid(0.25, layer=1), None, vtr.Pyramid(positions="keep")],
    [learned.pmod(), learned.dynamic(), learned.dynamic(), learned.pmod(seed=1)],
]
WAITS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default", "aten.is_nonzero.default")
"""What reads a tensor's values on the host: .item(), int(), .tolist(), boolean indexing, torch.equal."""


class NoReading(TorchDispatchMode):
    """Raises where a tensor's values are read on the host while ``on``."""

    on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on and str(func) in WAITS:
            raise AssertionError(f"{func} makes the device wait")
        return func(*args, **(kwargs or {}))


@contextmanager
def between_layers(model: Any) -> Iterator[list[int]]:
    """NoReading from the first decoder layer's pre-hooks to the last one's hooks; the list counts the forwards."""
    layers, mode, seen = model.get_decoder().layers, NoReading(), [0]

    def enter(*_: Any) -> None:
        mode.on = True
        seen[0] += 1

    def leave(*_: Any) -> None:
        mode.on = False

    hooks = [
        layers[0].register_forward_pre_hook(enter, prepend=True),
        layers[-1].register_forward_hook(leave),
    ]
    try:
        with mode:
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a policy's indices reads them, and a cache what was forgotten, on the CPU only: leave it out."""

    monkeypatch.setattr(cache, "READABLE", ())
    monkeypatch.setattr(questions, "checked_keep", lambda answer, *_: answer.sort().values)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_values_are_not_read_between_layers(family: str, policies: list[Any]) -> None:
    model = vtr.patch(getattr(tiny, family)())
    inputs = tiny.batch(model, ROWS)
    want = tiny.generate(model, inputs, policy=policies, max_new_tokens=4)
    with between_layers(model) as seen:
        got = tiny.generate(model, inputs, policy=policies, max_new_tokens=4)
    assert torch.equal(got, want) and seen == [4]


def test_reading_is_noticed() -> None:
    model = tiny.llava()
    model.get_decoder().layers[2].register_forward_pre_hook(lambda _, args: print(args[0].sum().item()))
    with pytest.raises(AssertionError, match="makes the device wait"), between_layers(model):
        model(**tiny.batch(model, ROWS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_is_not_waited_for(policies: list[Any], dtype: torch.dtype) -> None:
    model = vtr.patch(tiny.llava_next(head_dim=16).to("cuda", dtype))
    inputs = {name: t.to("cuda") for name, t in tiny.batch(model.cpu(), ROWS).items()}
    model.to("cuda")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model(**inputs, policy=policies)
    layers = model.get_decoder().layers
    layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"), prepend=True)
    layers[-1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        model(**inputs, policy=policies)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_kernel_for_all_rows_is_row_by_row() -> None:
    model = vtr.patch(tiny.llava_next(head_dim=16).to("cuda", torch.bfloat16))
    inputs = {name: t.to("cuda") for name, t in tiny.batch(tiny.llava_next(), ROWS).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    together = model(**inputs, policy=POLICIES[0]).logits
    for b in range(len(ROWS)):
        cpu = {name: t.cpu() for name, t in inputs.items()}
        one = {name: t.to("cuda") for name, t in tiny.single(cpu, b, tiny.llava_next().to(torch.bfloat16)).items()}
        alone = model(**one, policy=POLICIES[0][b]).logits[0]
        real = inputs["attention_mask"][b].bool()
        torch.testing.assert_close(together[b, real].float(), alone.float(), atol=0.1, rtol=0.1)
