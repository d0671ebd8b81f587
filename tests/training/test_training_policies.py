"""Training p-MoD and Dynamic-LLaVA on tiny models: the objectives, the loop, going on after an interruption."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import vtr
from tests import learned, tiny
from tests.tiny import IMAGE
from vtr.engine import compat
from vtr.training import loop, state
from vtr.training.dynamic_llava import DynamicLLaVATraining, masked_attention, temperature
from vtr.training.pmod import PModTraining

ROWS = [["ab", IMAGE, "whatisthere"], ["cd", IMAGE, "b", IMAGE, "andhere"], ["abc", "words"]]


def batch(model: Any, padding: str = "right") -> dict[str, Tensor]:
    inputs = tiny.batch(model, ROWS, padding)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for b in range(len(ROWS)):  # the last five tokens are the answer
        labels[b, tiny.real(inputs, b)[:-5]] = -100
    return {**inputs, "labels": labels}


def objective(kind: str, family: str = "llava", attn: str = "sdpa", seed: int = 0) -> Any:
    model = vtr.patch(getattr(tiny, family)(attn).train())
    if kind == "pmod":
        return PModTraining(model, learned.pmod(seed=seed))
    return DynamicLLaVATraining(model, learned.dynamic(seed=seed), min_answer=5)


# ----------------------------------------------------------------------------------------------------- masked softmax
@pytest.mark.parametrize("mask", ["causal", "left", "window"])
def test_masked_attention_is_the_formula(mask: str) -> None:
    """Against the whole matrix in float64, grouped queries, in blocks; values and gradients."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 21, 8, generator=made).double() for heads in (4, 2, 2))
    keep = torch.bernoulli(torch.full((2, 21), 0.6), generator=made).double()
    seen = torch.ones(21, 21).tril().bool().expand(2, 1, 21, 21).clone()
    if mask == "left":
        seen[1, 0, :, :4] = False
        seen[1, 0, range(4), range(4)] = True
    elif mask == "window":
        seen &= torch.ones(21, 21).triu(-6).bool()

    def formula(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        a = (q @ k.transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
        g = torch.where(torch.eye(21).bool(), 1.0, keep[:, None, None])
        e = (a - a.amax(-1, keepdim=True)).exp() * g
        return (e + 1e-6 / 21) / (e.sum(-1, keepdim=True) + 1e-6) @ v

    grads = []
    for how in (formula, lambda *t: masked_attention(*t, 0.3, None if mask == "causal" else seen, block=8)):
        parts = [t.clone().requires_grad_() for t in (q, k, v, keep)]
        out = how(*parts)
        (out * torch.arange(8)).sum().backward()
        grads.append([out.detach(), *(p.grad for p in parts)])
    for got, want in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert grads[0][-1][keep == 0].abs().max() > 0.1  # dropped keys hear what they would have been good for


def test_the_temperature_falls_exponentially() -> None:
    assert [round(temperature(x), 4) for x in (0.0, 0.5, 1.0)] == [1.0, 0.3162, 0.1]


# --------------------------------------------------------------------------------------------------------- objectives
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("kind", ["pmod", "dynamic"])
def test_gradients_reach_policy_and_model(kind: str, family: str) -> None:
    made = objective(kind, family)
    torch.manual_seed(0)
    out = made(**batch(made.model))
    out["loss"].backward()
    heard = {name for name, p in made.weights.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    deaf = {name for name, p in made.weights.named_parameters() if p.dim() == 2} - heard
    assert deaf == ({"routers.4.weight"} if kind == "pmod" else set())  # nobody reads vision tokens of the last layer
    assert all(layer.mlp.down_proj.weight.grad.abs().max() > 0 for layer in made.model.get_decoder().layers)
    if kind == "dynamic":
        assert 0 < out["image_kept"] < 1 and 0 < out["text_kept"] < 1


@pytest.mark.skipif(compat.HOOKS_ARE_REPLAYED, reason="transformers before 5.23 runs a layer's hooks again")
@pytest.mark.parametrize("kind", ["pmod", "dynamic"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    found = []
    for on in (False, True):
        made = objective(kind)
        if on:
            made.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        loss = made(**batch(made.model))["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in made.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_masked_token_is_as_if_it_were_gone() -> None:
    """Dynamic-LLaVA's training forward against inference: the same images' tokens kept, the same logits of the text."""
    made = objective("dynamic")
    inputs = batch(made.model)
    kept: dict[int, list[int]] = {}
    with torch.no_grad():
        want = made.model(**{name: t for name, t in inputs.items() if name != "labels"}, policy=made.policy)
        rows = vtr.report(made.model).rows
        kept = {b: rows[b].kept(made.policy.layer) for b in range(len(ROWS))}

        def chosen(policy: Any, hidden: Tensor, self: Any) -> None:
            self.keep = hidden.new_ones(hidden.shape[:2])
            for row, slots in self.images:
                self.keep[row, slots] = torch.isin(slots, torch.tensor(kept[row])).to(hidden)

        masking = made._masking(inputs, inputs["labels"])
        masking.decide = lambda policy, hidden: chosen(policy, hidden, masking)
        got = made.model(**inputs, use_cache=False, vtr_masking=masking)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != tiny.IMAGE_ID)
    torch.testing.assert_close(got.logits[text], want.logits[text], atol=2e-4, rtol=0)


def test_short_answers_stay_whole_and_the_model_is_left_as_it_was() -> None:
    made = objective("dynamic")
    made.min_answer = 6
    out = made(**batch(made.model))
    assert out["text_kept"].isnan() and out["image_kept"] > 0
    inputs = {k: v for k, v in batch(made.model).items() if k != "labels"}
    with torch.no_grad():
        within = made.model(**inputs).logits
        made.remove()
        assert torch.equal(made.model(**inputs).logits, within)
        assert torch.equal(tiny.llava()(**inputs).logits, within)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_does_not_matter(padding: str) -> None:
    """Of the image decisions too: rows judged alone and in a padded batch have the same loss (with no noise)."""
    made = objective("dynamic")
    made.policy.forget = False
    made.tau = 1e-4  # what the predictor finds likelier, nearly always

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
            soft = torch.nn.functional.one_hot
            patched.setattr("torch.nn.functional.gumbel_softmax", lambda x, *a, **k: soft(x.argmax(-1), 2).float())
            return made(**inputs)["cross_entropy"]

    inputs = batch(made.model, padding)
    singles = []
    for b in range(len(ROWS)):
        alone = tiny.single(inputs, b, made.model)
        singles.append(loss({**alone, "labels": inputs["labels"][b : b + 1, tiny.real(inputs, b)]}))
    torch.testing.assert_close(loss(inputs), torch.stack(singles).mean(), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- loop
@pytest.mark.parametrize("kind", ["pmod", "dynamic"])
def test_the_loop_learns_and_goes_on(kind: str, tmp_path: Path) -> None:
    """An interrupted run ends where an uninterrupted one does; what it saves belongs together."""
    settings = loop.Settings(steps=6, lr=3e-3, policy_lr=1e-2, save_every=2, accumulate=2)
    made = objective(kind)
    loop.freeze_tower(made.model)
    before = copy.deepcopy(made.weights.state_dict())
    log = loop.run(made, [batch(made.model)], tmp_path / "whole", settings)
    name = "loss" if kind == "pmod" else "cross_entropy"  # the shares are noisy
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6] and log[-1][name] < log[0][name]
    assert any(not torch.equal(before[name], t) for name, t in made.weights.state_dict().items())
    assert len((tmp_path / "whole" / "log.jsonl").read_text().splitlines()) == 6

    policy = vtr.Policy.from_pretrained(tmp_path / "whole" / "policy")
    model = vtr.patch(type(made.model).from_pretrained(tmp_path / "whole" / "model"))
    out = tiny.generate(model, tiny.batch(model, ROWS), policy=policy, max_new_tokens=3)
    assert out.shape[0] == len(ROWS)
    with pytest.raises(ValueError, match="trained with another model"):
        tiny.generate(vtr.patch(tiny.llava()), tiny.batch(model, ROWS), policy=policy, max_new_tokens=3)

    class Interrupted(Exception):
        pass

    class Stopping(list):
        def __getitem__(self, index: int) -> Any:
            self.left -= 1  # type: ignore[attr-defined]
            if self.left < 0:  # type: ignore[attr-defined]
                raise Interrupted
            return super().__getitem__(index)

    first, second = objective(kind), objective(kind)
    for again in (first, second):
        loop.freeze_tower(again.model)
    data = Stopping([batch(first.model)])
    data.left = 7
    with pytest.raises(Interrupted):
        loop.run(first, data, tmp_path / "parts", settings)
    done = json.loads((tmp_path / "parts" / "state" / "at.json").read_text())["step"]
    rest = loop.run(second, [batch(second.model)], tmp_path / "parts", settings)
    assert done == 2 and [line["step"] for line in rest] == [3, 4, 5, 6]
    for got, want in zip(second.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="steps 6 there, 7 here"):
        loop.run(second, [batch(second.model)], tmp_path / "parts", loop.Settings(steps=7))


def test_a_data_loader_of_samples(tmp_path: Path) -> None:
    """Samples that a collate_fn makes batches of; two epochs and a half."""
    made = objective("dynamic")
    loop.freeze_tower(made.model)
    loader = DataLoader([0, 1, 2, 3], batch_size=2, collate_fn=lambda some: batch(made.model))  # type: ignore[arg-type]
    log = loop.run(made, loader, tmp_path, loop.Settings(steps=5, lr=0.0, policy_lr=1e-3))
    assert len(log) == 5 and all(0 <= line["image_kept"] <= 1 for line in log)


class Noisy(torch.utils.data.Dataset):
    """Samples that draw at random, as augmentation does; notes what was asked for, and stops after so many."""

    def __init__(self, left: int = 10**6) -> None:
        self.left, self.seen = left, []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> float:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.seen.append((index, random.random(), float(numpy.random.rand()), float(torch.rand(()))))
        return self.seen[-1][-1]


class Endless(torch.utils.data.IterableDataset):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        return iter([1, 2, 3])


def shuffled(model: Any, data: Noisy, **how: Any) -> DataLoader:
    """Three batches an epoch, the last a small one, whose first word is of the samples."""

    def collate(some: list[float]) -> dict[str, Tensor]:
        made = batch(model)
        made["labels"][:, 1 + int(8 * some[0]) :] = -100
        made["labels"][:, -1] = made["input_ids"][:, -1]
        return made

    return DataLoader(data, batch_size=2, shuffle=True, collate_fn=collate, **how)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished run but for its state."""
    found = [file for file in folder.rglob("*") if file.is_file() and "state" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pmod", "dynamic"])
def test_an_interrupted_run_ends_with_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """Stopped within an epoch, at its edge, while it writes a state or a model: over shuffled, noisy samples."""
    settings = loop.Settings(steps=8, lr=3e-3, policy_lr=1e-2, save_every=2, seed=3)

    def run(out: str, left: int = 10**6) -> Noisy:
        made, data = objective(kind), Noisy(left)
        loop.freeze_tower(made.model)
        torch.rand(left % 7)  # whatever was drawn before
        loop.run(made, shuffled(made.model, data, generator=torch.Generator()), tmp_path / out, settings)
        return data

    whole, twice = run("whole").seen, run("twice").seen
    assert whole == twice and contents(tmp_path / "whole") == contents(tmp_path / "twice")
    epochs = [[index for index, *_ in whole[at : at + 5]] for at in (0, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in epochs) and epochs[0] != epochs[1]
    for left in (1, 5, 7, 11):
        with pytest.raises(KeyboardInterrupt):
            run(f"left{left}", left)
        run(f"left{left}")
        assert contents(tmp_path / f"left{left}") == contents(tmp_path / "whole")

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    def half(at: Path) -> None:
        at.mkdir(parents=True)
        (at / "model.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    places = {"_export": (loop, stop), "replace": (state, stop), "publish": (state, stop), "rmtree": (shutil, stop)}
    for name, (module, how) in places.items():
        with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(module, name, how)
            run(name)
        run(name)
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        save = state.save
        patched.setattr(state, "save", lambda f, step, said, write, *rest: save(
            f, step, said, half if step == 4 else write, *rest))  # fmt: skip
        run("half")
    assert (tmp_path / "half" / "state" / "step-4").is_dir()
    run("half")
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")
    assert [file.name for file in (tmp_path / "half" / "state").glob("step-*")] == ["step-8"]


def test_a_log_is_cut_back_to_the_state(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3, 4)]
    for tail, step, left in [("", 2, 2), ('{"step": 5, "lo', 4, 4), ("{}\n", 9, 4), ("null\n", 4, 4), (lines[3], 0, 0)]:
        (tmp_path / "log.jsonl").write_text("".join(lines) + tail)
        state.cut_log(tmp_path / "log.jsonl", step)
        assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:left])


OTHER: list[tuple[str, dict[str, Any]]] = [
    ("lr 0.003 there, 0.001 here", {"lr": 1e-3}),
    ("policy_lr None there, 0.5 here", {"policy_lr": 0.5}),
    ("seed 0 there, 9 here", {"seed": 9}),
    ("steps 2 there, 3 here", {"steps": 3}),
    ("accumulate 1 there, 2 here", {"accumulate": 2}),
    (r"temperatures \[1\.0, 0\.1\] there", {"temperatures": (1.0, 0.2)}),
    ("what learns differs", {"lr": 0.0, "policy_lr": 1e-2}),
]


def test_a_run_of_another_kind_is_refused(tmp_path: Path) -> None:
    """What differs is named, and nothing is changed; how often states are saved may differ."""
    settings: dict[str, Any] = {"steps": 2, "lr": 3e-3}

    def run(change: Any = None, data: Any = None, also: Any = None, **other: Any) -> None:
        made = objective("dynamic")
        loop.freeze_tower(made.model)
        if change is not None:
            change(made)
        loop.run(made, data or [batch(made.model)], tmp_path, loop.Settings(**settings | other), also)

    def other_tower(made: Any) -> None:
        with torch.no_grad():
            next(p for p in made.model.parameters() if not p.requires_grad).add_(1)

    run()
    before = contents(tmp_path)
    for text, other in OTHER:
        with pytest.raises(ValueError, match=rf"not the same: .*{text}"):
            run(**other)
    changes: list[tuple[str, Any]] = [
        ("text_keep", lambda made: setattr(made, "text_keep", 0.4)),
        ("policy 'dynamic-llava", lambda made: setattr(made.policy, "keep", 0.9)),
        ("what stays as it is differs", other_tower),
    ]
    for text, change in changes:
        with pytest.raises(ValueError, match=text):
            run(change)
    inputs = batch(objective("dynamic").model)
    with pytest.raises(ValueError, match="data differs"):
        run(data=[{**inputs, "input_ids": inputs["input_ids"].roll(1)}])
    with pytest.raises(ValueError, match="batches 1 there, 2 here"):
        run(data=[inputs, inputs])
    with pytest.raises(ValueError, match="source None there, 'b' here"):
        run(also={"source": "b"})
    assert contents(tmp_path) == before
    run(save_every=1)
    note = tmp_path / "state" / "at.json"
    for harm in ("", "[]", "null", '{"step": 2}', '{"step": "x", "run": {}}', '{"step": 2, "run": 3}'):
        kept = note.read_text()
        note.write_text(harm)
        with pytest.raises(ValueError, match="does not say what run"):
            run()
        note.write_text(kept)
    shutil.rmtree(tmp_path / "state" / "step-2")
    with pytest.raises(ValueError, match="step-2 is not there"):
        run()


def two_batches(model: Any) -> list[dict[str, Tensor]]:
    """The second has no image."""
    plain = tiny.batch(model, [["abcd", "words"], ["ef", "others"]], "right")
    labels = plain["input_ids"].masked_fill(plain["attention_mask"] == 0, -100)
    return [batch(model), {**plain, "labels": labels}]


def work(rank: int, folder: str, port: int) -> None:
    """One of two processes, as ``accelerate launch --cpu --num_processes 2`` starts them."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    made = objective("pmod")
    loop.freeze_tower(made.model)
    loop.run(made, two_batches(made.model), folder, loop.Settings(steps=2, lr=1e-3))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    """Each takes one of two batches a step; one process that accumulates both ends at the same weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (str(tmp_path / "two"), port), nprocs=2)
    made = objective("pmod")
    loop.freeze_tower(made.model)
    loop.run(made, two_batches(made.model), tmp_path / "one", loop.Settings(steps=2, lr=1e-3, accumulate=2))
    one, two = (vtr.Policy.from_pretrained(tmp_path / name / "policy") for name in ("one", "two"))
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(two.tensors()[name], tensor, atol=1e-5, rtol=1e-4)
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    assert [line["loss"] for line in logs[1]] == pytest.approx([line["loss"] for line in logs[0]], abs=1e-4)


def test_impossible_runs_are_refused(tmp_path: Path) -> None:
    made = objective("pmod")
    with pytest.raises(ValueError, match="no batches"):
        loop.run(made, [], tmp_path, loop.Settings(steps=1))
    with pytest.raises(ValueError, match="without batch_size"):
        loop.run(made, DataLoader([batch(made.model)], batch_size=None), tmp_path, loop.Settings(steps=1))
    endless = DataLoader(Endless())
    with pytest.raises(ValueError, match="iterable dataset"):
        loop.run(made, endless, tmp_path, loop.Settings(steps=1))
    with pytest.raises(ValueError, match="nothing learns"):
        loop.run(made, [batch(made.model)], tmp_path, loop.Settings(steps=1, lr=0.0))
    with pytest.raises(ValueError, match="steps=0"):
        loop.Settings(steps=0)
    with pytest.raises(ValueError, match="has no weights"):
        PModTraining(made.model, vtr.PMoD())
    with pytest.raises(ValueError, match="a share of the image tokens"):
        DynamicLLaVATraining(made.model, learned.dynamic(keep=7))
    with pytest.raises(ValueError, match="not patched"):
        PModTraining(tiny.llava(), learned.pmod())
    dynamic = objective("dynamic")
    with pytest.raises(ValueError, match="needs labels"):
        dynamic(**{k: v for k, v in batch(dynamic.model).items() if k != "labels"})
