"""How the pretrained pocket model is trained: the adapter, the projector alone, the whole, on stand-ins."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vtr
from tests.pocket import stand_ins
from vtr.pocket import pretrained
from vtr.pocket.pretrained import adapter, align, build, canvases, drawings, processes, train
from vtr.pocket.pretrained import student as students


@pytest.fixture
def made(tmp_path: Path) -> tuple[object, object]:
    """A fresh model and its processor."""
    found = build.parts(tmp_path, stand_ins.wheels(tmp_path), say=lambda _: None)
    return build.assemble(found, stand_ins.SIDE)


# -- the adapter -------------------------------------------------------------------------------------------------------
def test_weights_as_int8(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    given = {"a": torch.randn(6, 40, generator=draw), "b": torch.randn(5, generator=draw), "none": torch.zeros(2, 3)}
    adapter.save(given, tmp_path / "w" / "x.safetensors")
    found = adapter.load(tmp_path / "w" / "x.safetensors")
    assert found.keys() == given.keys()
    torch.testing.assert_close(found["b"], given["b"])
    step = given["a"].abs().amax(1, keepdim=True) / 127
    assert bool(((found["a"] - given["a"]).abs() <= 0.6 * step).all()) and not found["none"].any()


def test_of_a_diagonal_only_its_numbers_are_kept(tmp_path: Path) -> None:
    given = {"d": torch.arange(1.0, 5.0).diag(), "full": torch.ones(3, 3)}
    adapter.save(given, tmp_path / "x.safetensors")
    assert sum(one.nbytes for one in load_file(tmp_path / "x.safetensors").values()) == 4 * 4 + 9 + 3 * 2
    found = adapter.load(tmp_path / "x.safetensors")
    assert torch.equal(found["d"], given["d"]) and found["full"].shape == (3, 3)


def test_the_weakest_directions_are_left_out() -> None:
    draw = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(9, 9, generator=draw))[0] for _ in range(4)]
    given = {"projector.linear_1.weight": torch.ones(2, 2)}
    for n, values in enumerate(((8.0, 4.0, 0.5), (6.0, 0.25, 0.125))):
        given[f"lora.layers.{n}.x.b"] = turns[2 * n][:, :3] * torch.tensor(values)
        given[f"lora.layers.{n}.x.a"] = turns[2 * n + 1][:3]
    found = adapter.slim(given, 0.5)
    assert found.keys() == given.keys() and torch.equal(found["projector.linear_1.weight"], torch.ones(2, 2))
    for n, (rank, lost) in enumerate(((2, 0.5), (1, (0.25**2 + 0.125**2) ** 0.5))):
        up, down = found[f"lora.layers.{n}.x.b"], found[f"lora.layers.{n}.x.a"]
        assert up.shape == (9, rank) and down.shape == (rank, 9)
        off = (up @ down - given[f"lora.layers.{n}.x.b"] @ given[f"lora.layers.{n}.x.a"]).norm()
        torch.testing.assert_close(float(off), lost, rtol=1e-4, atol=0)
    assert {len(adapter.slim(given, 0.01)[f"lora.layers.{n}.x.a"]) for n in range(2)} == {1}


def test_changes_of_another_model(made: tuple[object, object]) -> None:
    before = {name: value.clone() for name, value in made[0].state_dict().items()}
    projector = {
        adapter.PROJECTOR + name: value for name, value in made[0].model.multi_modal_projector.state_dict().items()
    }
    layer = adapter.LORA + "layers.0.self_attn.q_proj"
    for wrong in (
        {layer + adapter.DOWN: torch.ones(2, 3), layer + adapter.UP: torch.ones(4, 2)},
        {adapter.LORA + "layers.99.mlp.up_proj" + adapter.DOWN: torch.ones(2, 3)},
    ):
        with pytest.raises(ValueError, match="of another model"):
            adapter.put_on(made[0], projector | wrong)
    with pytest.raises(ValueError, match="of another model"):
        adapter.put_on(made[0], {})
    assert all(torch.equal(value, before[name]) for name, value in made[0].state_dict().items())


def test_what_is_shipped_fits_the_packages() -> None:
    found = adapter.load(adapter.SHIPPED)
    assert found["projector.linear_1.weight"].shape == (576, 4 * 384)
    sides = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    sides |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    changed = {name.removesuffix(adapter.DOWN) for name in found if name.endswith(adapter.DOWN)}
    assert len(changed) == 30 * len(adapter.TARGETS)
    for name in changed:
        down, up = found[name + adapter.DOWN], found[name + adapter.UP]
        assert (len(up), down.shape[1]) == sides[name.rpartition(".")[2].removesuffix("_proj")]
        assert len(down) == up.shape[1] <= 8
    curve = json.loads((adapter.SHIPPED.parent / "curve.json").read_text())["curve"]
    assert min(one["loss"] for one in curve) < curve[0]["loss"]


# -- the projector alone ----------------------------------------------------------------------------------------------
def test_a_token_belongs_to_what_covers_it() -> None:
    canvas = canvases.paint(random.Random(5), drawings.held_out())
    owned = align.owners(canvas, 8)
    numbers = {drawings.things().index(one) for one in canvas.shown.values()}
    assert set(owned.tolist()) - {-1} == numbers
    for place, thing in canvas.shown.items():
        covered = canvas.inked[place].reshape(8, 28, 8, 28).mean((1, 3)).reshape(-1)
        mine = owned == drawings.things().index(thing)
        assert float(covered[mine.numpy()].min()) > 0.33


def test_means_of_things() -> None:
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    means, which = align.pooled(tokens, torch.tensor([[4, -1, 4], [4, 9, 9]]))
    assert which.tolist() == [4, 4, 9]
    assert means.tolist() == [[2.0, 3.0], [6.0, 7.0], [9.0, 10.0]]


def test_features_tell_a_place() -> None:
    torch.manual_seed(0)
    at = torch.arange(16)
    half = torch.stack([at // 4 < 2, at % 4 < 2], 1) * 2.0 - 1
    features = torch.randn(50, 16, 12)
    features[..., :2] = half + 5
    map_, middle = align.placed(features)
    found = (features - middle) @ map_.T
    assert bool((found.sign() == half).all()) and 0.9 < float(found.abs().mean()) < 1.1


def test_the_projector_learns_names_and_is_the_map() -> None:
    torch.manual_seed(0)
    words, width = 0.1 * torch.randn(len(drawings.things()), 16), 24
    looks = torch.randn(len(words), width)
    owned = torch.randint(12, (64, 6))
    owned[:, -1] = -1
    features = looks[owned.clamp_min(0)] + 0.1 * torch.randn(64, 6, width)
    seen = align.Seen(features.half(), owned)
    found = align.align(seen, seen, words, epochs=60, rate=1e-2, say=lambda _: None)
    single, whole = align.right(found, seen)
    assert single > 0.9 and whole > 0.9
    projector = torch.nn.Module()
    projector.layer_norm, projector.linear_1 = torch.nn.LayerNorm(width), torch.nn.Linear(width, 16)
    projector.linear_2 = torch.nn.Linear(16, 16)
    grid = torch.randn(200, 16, width)
    found.put_into(projector, align.Seen(grid.half(), owned), torch.zeros(2, 16))
    with torch.no_grad():
        hidden = torch.nn.functional.gelu(projector.linear_1(projector.layer_norm(features)))
        wanted = (found(features) - found.middle) * align.LOUD + found.middle
        straight = (projector.linear_1(projector.layer_norm(features)) > 1).all(-1)
        assert float(straight.float().mean()) > 0.1
        torch.testing.assert_close(projector.linear_2(hidden)[straight], wanted[straight], rtol=0.1, atol=0.02)


# -- training ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def student(made: tuple[object, object]) -> students.Student:
    torch.manual_seed(0)
    return students.Student(*made, students.Recipe(rank=2, batch=2, warmup=2, every=4, canvases=16))


def source(count: int = 6, seed: int = 0) -> train.Source:
    return train.Source({"one": drawings.held_out()[:count]}, seed=seed)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Canvases of the stand-in's size."""
    monkeypatch.setattr(train, "paint", lambda draw, some: canvases.paint(draw, some, stand_ins.SIDE))


@torch.no_grad()
@pytest.mark.usefixtures("small")
def test_questions_of_one_picture_do_not_see_each_other(student: students.Student) -> None:
    batch = source().batch(student.processor, 2)
    features = student.look(batch.pixels)
    together, answers, where = student.forward(features, batch.asked, None)
    for n, questions in enumerate(batch.asked):
        for one, place in zip(questions, where[n], strict=True):
            alone, said, _ = student.forward(features[n : n + 1], [[one]], None)
            assert torch.equal(said, answers[place])
            torch.testing.assert_close(alone, together[place], rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.usefixtures("small")
def test_a_sequence_is_the_processors(student: students.Student) -> None:
    from vtr.chat import encode

    batch = source().batch(student.processor, 1)
    asked = batch.asked[0][0]
    row = student._row(student.projector(student.look(batch.pixels))[0], [asked], None)
    inputs = encode(student.processor, [asked.text], [batch.canvases[0].image])
    whole = [*inputs["input_ids"][0].tolist(), *student.ids(asked.answer + student.end)]
    assert row.places.tolist() == list(range(len(whole)))
    text = [n for n, one in enumerate(whole) if one != student.model.config.image_token_id]
    torch.testing.assert_close(row.embeds[text], student.words[[whole[n] for n in text]])
    torch.testing.assert_close(inputs["pixel_values"], batch.pixels, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("small")
def test_training_learns_and_is_shipped(student: students.Student, tmp_path: Path) -> None:
    some = source()
    look = [source(seed=1).batch(student.processor, 4)]
    said: list[str] = []
    student.start(student.see(some.batch(student.processor, 4) for _ in range(4)), student.see(look), said.append)
    assert len(said) == 8 and "the right name is nearest to" in said[-1]
    curve = train.train(student, some, look, tmp_path, say=lambda _: None)
    assert [one["canvases"] for one in curve] == [0, 8, 16]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert json.loads((tmp_path / "curve.json").read_text())["curve"] == curve
    train.plot(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    wrong = train.score(student, look, wrong=True)
    assert wrong.keys() == train.score(student, look).keys() and wrong["loss"] > 0


@torch.no_grad()
@pytest.mark.usefixtures("small")
def test_what_is_shipped_is_what_was_trained(student: students.Student, tmp_path: Path) -> None:
    for name, value in student.decoder.named_parameters():
        if "lora_B" in name:
            value.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    batch = source().batch(student.processor, 2)
    ours, _, _ = student.forward(student.look(batch.pixels), batch.asked, None)
    adapter.save(student.weights(), tmp_path / "x.safetensors")
    parts = build.parts(tmp_path, stand_ins.wheels(tmp_path), say=lambda _: None)
    fresh, processor = build.assemble(parts, stand_ins.SIDE)
    plain = students.Student(build.assemble(parts, stand_ins.SIDE)[0], processor, dataclasses.replace(student.recipe))
    adapter.put_on(fresh, adapter.load(tmp_path / "x.safetensors"))
    theirs, _, _ = students.Student(fresh, processor, student.recipe).forward(
        student.look(batch.pixels), batch.asked, None
    )
    other, _, _ = plain.forward(student.look(batch.pixels), batch.asked, None)
    assert float((theirs - ours).abs().mean()) < 0.1 * float((other - ours).abs().mean())


@torch.no_grad()
def test_training_goes_on_from_a_file(student: students.Student, made: tuple[object, object], tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    for _, value in student.lora():
        value.normal_(std=0.3, generator=draw)
    student.projector.linear_1.weight.normal_(generator=draw)
    adapter.save(student.weights(), tmp_path / "x.safetensors")
    saved, parts = adapter.load(tmp_path / "x.safetensors"), build.parts(tmp_path, stand_ins.wheels(tmp_path))
    other = students.Student(*build.assemble(parts, stand_ins.SIDE), student.recipe)
    other.go_on(saved)
    again = other.weights()
    assert again.keys() == student.weights().keys()
    for name, value in again.items():
        close = dict(rtol=0.02, atol=1e-3) if name.startswith(adapter.LORA) else {}  # LoRA is in bfloat16
        torch.testing.assert_close(value, saved[name], **close)
    smaller = adapter.slim(saved, 0.5)
    other.go_on(smaller)
    layer = adapter.LORA + "layers.0.self_attn.q_proj"
    again, want = other.weights(), smaller[layer + adapter.UP] @ smaller[layer + adapter.DOWN]
    got = again[layer + adapter.UP] @ again[layer + adapter.DOWN]
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.02 * float(want.abs().max()))


def _in_two(folder: str) -> None:
    rank = processes.rank()
    own = [torch.full((2, 3), float(rank)), torch.tensor([4.0 * rank])]
    processes.average(own)
    shared = torch.full((2,), float(rank + 5))
    processes.share([shared])
    told = [processes.count(), own[0].tolist(), own[1].tolist(), shared.tolist(), processes.gather(f"from {rank}")]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(told))


def test_processes_share_the_work(tmp_path: Path) -> None:
    processes.run(2, _in_two, str(tmp_path))
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told == [2, [[0.5] * 3] * 2, [2.0], [5.0, 5.0], ["from 0", "from 1"]]
    processes.run(1, _in_two, str(tmp_path))
    assert json.loads((tmp_path / "0.json").read_text()) == [1, [[0.0] * 3] * 2, [0.0], [5.0, 5.0], ["from 0"]]


def test_the_state_is_said(student: students.Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTR_CACHE", str(tmp_path))
    adapter.save(student.weights(), tmp_path / "x.safetensors")
    model, processor = build.assemble(
        build.parts(tmp_path, stand_ins.wheels(tmp_path), say=lambda _: None), stand_ins.SIDE
    )
    build.save(model, processor, pretrained.folder(), weights=tmp_path / "x.safetensors")
    assert (pretrained.folder() / adapter.FILE).read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vtr.pocket.load("pretrained")
    build.save(model, processor, pretrained.folder())
    with pytest.warns(UserWarning, match="pretrained build --anew"):
        vtr.pocket.load("pretrained")
