"""``vtr.training.m3`` on any model: its gradients, its recipe, going on after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from tests import tiny
from vtr.image import scales
from vtr.training import m3
from vtr.training.data import Collate, as_sample


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_every_scale_run_by_itself(family: str, frozen: bool) -> None:
    model = vtr.patch(getattr(tiny, family)())
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "cd"], ["a", tiny.IMAGE, "another"]])
    tower = model.get_encoder(modality="image")
    tower.requires_grad_(not frozen)
    grid = vtr.engine.install.patch_of(model).adapter.layouts(model, inputs)
    sizes = sorted(scales(next(iter(grid.values()))[0].grid))
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    want = {}
    for size in sizes:
        loss = model(**inputs, labels=labels, policy=vtr.Matryoshka(size), use_cache=False).loss
        (loss / len(sizes)).backward()
        want[size] = loss.item()
    grads = gradients(model)
    model.zero_grad()
    runs: list[int] = []
    handle = tower.register_forward_hook(lambda *_: runs.append(1))
    found = m3.backward_batch(model, inputs, labels, sizes)
    handle.remove()
    assert len(runs) <= 1 + len(sizes) and list(found) == sizes  # the hook fires, the tower's own forward runs once
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.tensor(list(want.values())))
    again = gradients(model)
    assert grads.keys() == again.keys() and any("vision" in name for name in grads) is not frozen
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad, atol=2e-5, rtol=1e-4, msg=name)
    assert "forward" not in tower.__dict__


def test_what_cannot_be_trained_is_said() -> None:
    model = vtr.patch(tiny.llava())
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "cd"]])
    with pytest.raises(ValueError, match="without pictures"):
        m3.backward_batch(model, {"input_ids": inputs["input_ids"]}, inputs["input_ids"], [1])
    with pytest.raises(ValueError, match="not patched"):
        m3.backward_batch(tiny.llava(), inputs, inputs["input_ids"], [1])
    with pytest.raises(ValueError, match="is no scale"):
        m3.backward_batch(model, inputs, inputs["input_ids"], [5])
    assert "forward" not in model.get_encoder(modality="image").__dict__
    assert model(**inputs).logits.isfinite().all()


def test_answers_alone_are_learned() -> None:
    _, processor = vtr.pocket.load()
    rows = list(vtr.pocket.samples(3, split="train"))
    inputs = Collate(processor)([as_sample(r["image"], r["question"], r["answer"]) for r in rows])
    labels = inputs.pop("labels")
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == labels.shape
    for b, row in enumerate(rows):
        learned = labels[b][labels[b] >= 0]
        assert processor.tokenizer.decode(learned[:-1]).strip() == row["answer"]
        assert learned[-1] == processor.tokenizer.eos_token_id
        assert torch.equal(inputs["input_ids"][b][labels[b] >= 0], learned)
    assert torch.equal(inputs["attention_mask"][labels >= 0], torch.ones_like(labels[labels >= 0]))


@pytest.fixture(scope="module")
def data() -> list[tuple[Any, str, str]]:
    return [(r["image"], r["question"], r["answer"]) for r in vtr.pocket.samples(6, split="train", seed=5)]


RECIPE = m3.Recipe(scales=(1, 9), batch_size=2, lr=1e-4, tower_lr=1e-5, save_every=1)


def trained(folder: Path, data: list[Any], recipe: m3.Recipe = RECIPE, **more: Any) -> list[dict[int, float]]:
    model, processor = vtr.pocket.load()
    return m3.train(vtr.patch(model), processor, data, folder, recipe, **more)


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_weights(
    tmp_path: Path, data: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = trained(tmp_path / "whole", data)
    assert len(log) == 3 and not (tmp_path / "whole" / m3.CHECKPOINT).exists()
    real, steps = m3.backward_batch, []

    def interrupted(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(m3, "backward_batch", interrupted)
        trained(tmp_path / "cut", data)
    with pytest.raises(FileExistsError, match="resume=True"):
        trained(tmp_path / "cut", data)
    with pytest.raises(ValueError, match="was made with"):
        trained(tmp_path / "cut", data[:5], resume=True)
    assert trained(tmp_path / "cut", data, resume=True) == log[2:]
    one, other = (vtr.pocket.load(folder=tmp_path / name)[0] for name in ("whole", "cut"))
    before = vtr.pocket.load()[0].state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert one.config.matryoshka_vis_token_scale == [1, 9]
    with pytest.raises(ValueError, match="no data"):
        trained(tmp_path / "none", [])


def test_a_frozen_tower_stays(tmp_path: Path, data: list[Any]) -> None:
    trained(tmp_path, data[:2], m3.Recipe(scales=(9,), batch_size=2, lr=1e-4, tower_lr=None))
    before, after = vtr.pocket.load()[0].state_dict(), vtr.pocket.load(folder=tmp_path)[0].state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and not any("vision_tower" in name for name in changed)


def test_rates_rise_and_fall() -> None:
    recipe = m3.Recipe()
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[:3] == [1 / 3, 2 / 3, 1.0] and rates[3] == 1.0 and rates == rates[:3] + sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.001


@pytest.mark.parametrize("policy", ["m3:tokens=9", "pool:grid=2", "globalcom2:retention=0.5"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_inference_first_does_not_spoil_training(family: str, policy: str) -> None:
    """What is remembered of layouts may have been made in inference mode."""
    model = vtr.patch(getattr(tiny, family)(seed=3))
    grid = vtr.engine.install.patch_of(model)
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "cd"]], seed=3)
    if policy.startswith("m3"):
        layout = next(iter(grid.adapter.layouts(model, inputs).values()))[0]
        policy = f"m3:tokens={sorted(scales(layout.grid))[1]}"
    with torch.inference_mode():
        model(**inputs, policy=policy)
    model(**inputs, labels=inputs["input_ids"], policy=policy).loss.backward()
    assert any(p.grad is not None for p in model.get_input_embeddings().parameters())
