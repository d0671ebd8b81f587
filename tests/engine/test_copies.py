"""Copies of a patched model: deep copies, pickles and checkpoints. None of them holds on to the original."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vtr
from tests import tiny
from tests.loads import FAMILIES, ROWS, snapshot

F = vtr.FastV(0.25, 2)
RUN: dict[str, Any] = {"max_new_tokens": 4}
ROOT = Path(__file__).parents[2]
READ_BACK = """
import sys, torch, vtr
from tests import tiny
torch.set_num_threads(1)
tiny.llava(layers=1), tiny.llava_next(layers=1)  # transformers learns what it may record when a model is made
folder = sys.argv[1]
model, inputs, want, plain = torch.load(folder + "/all.pt", weights_only=False)
run = {"do_sample": False, "suppress_tokens": [5, 4], "pad_token_id": 0, "max_new_tokens": 4}
assert torch.equal(model.generate(**inputs, policy="fastv:keep=0.25,layer=2", **run), want)
assert vtr.report(model).rows[0].policy == "fastv:keep=0.25"
assert torch.equal(model.generate(**inputs, **run), plain)
vtr.unpatch(model)
assert torch.equal(model.generate(**inputs, **run), plain)
assert "generate" not in vars(model) and not model._forward_pre_hooks
vtr.patch(model)
assert torch.equal(model.generate(**inputs, policy="fastv:keep=0.25,layer=2", **run), want)
print("read back")
"""


@pytest.fixture(params=FAMILIES)
def stock(request: pytest.FixtureRequest) -> Any:
    model = getattr(tiny, request.param)(layers=3)
    tiny.generate(model, tiny.batch(model, ROWS), max_new_tokens=2)  # transformers adds lazy hooks of its own
    return model


@pytest.fixture
def fresh(stock: Any) -> Any:
    """The same model, not called yet: those lazy hooks cannot be pickled."""
    return getattr(tiny, stock.config.model_type)(layers=3)


@pytest.fixture
def inputs(stock: Any) -> dict[str, Tensor]:
    return tiny.batch(stock, ROWS)


def specs(model: Any) -> list[str | None]:
    return [row.policy for row in vtr.report(model).rows]


def hooks(model: Any) -> dict[str, list[int]]:
    """How many hooks of each kind every module has."""
    return {
        name: [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        for name, module in model.named_modules()
    }


class Copier:
    """A streamer that copies the model while it generates."""

    def __init__(self, model: Any) -> None:
        self.model, self.copies = model, []  # type: ignore[var-annotated]

    def put(self, value: Any) -> None:
        self.copies.append(copy.deepcopy(self.model))

    def end(self) -> None: ...


# ------------------------------------------------------------------------------------------------------ deep copies
def test_a_copy_can_be_unpatched(stock: Any, inputs: dict[str, Tensor]) -> None:
    """As the original can; and neither notices what happens to the other."""
    before, hooks_before, plain = snapshot(stock), hooks(stock), tiny.generate(stock, inputs, **RUN)
    model = vtr.patch(stock)
    want = tiny.generate(model, inputs, policy=F, **RUN)
    first = copy.deepcopy(model)
    second = copy.deepcopy(first)
    vtr.unpatch(first)
    assert {name: seen[:2] for name, seen in snapshot(first).items()} == {name: s[:2] for name, s in before.items()}
    assert hooks(first) == hooks_before
    assert torch.equal(tiny.generate(first, inputs, **RUN), plain)
    for patched in (model, second):
        assert torch.equal(tiny.generate(patched, inputs, policy=F, **RUN), want)
    vtr.unpatch(model)
    assert snapshot(model) == before
    assert torch.equal(tiny.generate(second, inputs, policy=F, **RUN), want)


def test_a_copy_runs_its_own_weights(stock: Any, inputs: dict[str, Tensor]) -> None:
    model = vtr.patch(stock)
    want = tiny.generate(model, inputs, policy=F, **RUN)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(tiny.generate(other, inputs, policy=F, **RUN), want)
    assert not torch.equal(tiny.generate(model, inputs, policy=F, **RUN), want)


def test_a_copy_made_in_use_has_the_default_only(stock: Any, inputs: dict[str, Tensor]) -> None:
    model = vtr.patch(stock, policy="random:keep=0.5")
    with vtr.use(model, F):
        want = tiny.generate(model, inputs, **RUN)
        other = copy.deepcopy(model)
        tiny.generate(other, inputs, **RUN)
        assert specs(other) == ["random:keep=0.5"] * 4 and specs(model) == [F.spec] * 4
        with vtr.use(other, F):
            assert torch.equal(tiny.generate(other, inputs, **RUN), want)
    vtr.patch(other)
    tiny.generate(model, inputs, **RUN)
    assert specs(model) == ["random:keep=0.5"] * 4


def test_a_copy_made_while_generating(stock: Any, inputs: dict[str, Tensor]) -> None:
    model, one = vtr.patch(stock), tiny.single(inputs, 0, stock)
    want, copier = tiny.generate(model, one, policy=F, **RUN), Copier(model)
    assert torch.equal(tiny.generate(model, one, policy=F, streamer=copier, **RUN), want)
    assert len(copier.copies) == 1 + RUN["max_new_tokens"]
    for other in copier.copies:
        assert torch.equal(tiny.generate(other, one, policy=F, **RUN), want)


# ------------------------------------------------------------------------------------------------- pickles and files
@pytest.mark.slow
def test_a_pickle_is_read_in_another_process(stock: Any, fresh: Any, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    plain = tiny.generate(stock, inputs, **RUN)
    want = tiny.generate(vtr.patch(stock), inputs, policy=F, **RUN)
    torch.save((vtr.patch(fresh), inputs, want, plain), tmp_path / "all.pt")
    done = subprocess.run([sys.executable, "-c", READ_BACK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "read back\n", done.stderr


def test_a_loaded_pickle_is_as_good_as_a_copy(
    stock: Any, fresh: Any, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    before, want = snapshot(fresh), tiny.generate(vtr.patch(stock), inputs, policy=F, **RUN)
    torch.save(vtr.patch(fresh, policy=F), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    unused = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(tiny.generate(loaded, inputs, **RUN), want)
    assert torch.equal(tiny.generate(vtr.patch(loaded), inputs, policy=F, **RUN), want)
    vtr.unpatch(unused)
    assert {name: seen[1] for name, seen in snapshot(unused).items()} == {
        name: seen[1] for name, seen in before.items()
    }


def test_checkpoints_are_those_of_the_unpatched_model(stock: Any, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    stock.save_pretrained(tmp_path / "stock")
    model = vtr.patch(stock, policy=F)
    tiny.generate(model, inputs, **RUN)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "patched")
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == files
    for name in files:
        if name.endswith(".json"):
            assert (tmp_path / "patched" / name).read_text() == (tmp_path / "stock" / name).read_text()
    stored = [load_file(tmp_path / folder / "model.safetensors") for folder in ("stock", "patched")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
    model.load_state_dict(state)
    assert specs(model) == [F.spec] * 4
