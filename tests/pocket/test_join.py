"""The pocket model's stage `join` trains what the engine runs; and the task with long answers."""

from __future__ import annotations

import random

import pytest
import torch
from vtr.eval.accuracy.metrics import metric

import vtr
from vtr.pocket import join, listing, train
from vtr.pocket import scenes as S
from vtr.pocket.language import LISTING, embed_pictures, make_batch
from vtr.pocket.model import BOS, EOS, IMAGE, answer_states, encode


@pytest.fixture(scope="module")
def drawn():
    """The pocket model, a batch of one picture, its vision tokens."""
    model, _ = vtr.pocket.load()
    batch = make_batch(random.Random(3), "val", 1, listing=True)
    with torch.no_grad():
        return model, batch, embed_pictures(model, batch, False)


def engine_logits(model, batch, n: int, policy) -> torch.Tensor:
    """Logits of the first question's words, as the patched model gives them."""
    ids = torch.cat([torch.tensor([BOS] + [IMAGE] * n), batch.ids[0][batch.block[0] == 0]])[None]
    size = torch.tensor([[batch.rows * S.TILE, batch.cols * S.TILE]])
    patched = vtr.patch(model)
    try:
        with torch.no_grad():
            out = patched(input_ids=ids, pixel_values=batch.pixels, image_sizes=size, policy=policy)
    finally:
        vtr.unpatch(model)
    return out.logits[0, n + 1 :]


def test_one_sequence_says_what_shared_pictures_say(drawn) -> None:
    model, batch, vision = drawn
    n = vision.shape[1]
    with torch.no_grad():
        whole = join.whole_states(model, vision, batch)
        shared = answer_states(model, vision, torch.arange(1, n + 1)[None], batch.ids, batch.pos + n + 1, batch.block)
    torch.testing.assert_close(whole, shared, atol=2e-5, rtol=1e-5)


def test_routing_in_training_is_the_engine_s(drawn) -> None:
    model, batch, vision = drawn
    pmod, _ = join.new_policies(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in pmod.module.parameters():
        parameter.data.normal_(0, 0.003, generator=generator)
    with torch.no_grad():
        plain = model.lm_head(join.whole_states(model, vision, batch))[0][batch.block[0] == 0]
        with join.routed(model, pmod, 1, vision.shape[1] + 1):
            states = join.whole_states(model, vision, batch)
        mine = model.lm_head(states[0][batch.block[0] == 0])
        after = model.lm_head(join.whole_states(model, vision, batch))[0][batch.block[0] == 0]
    torch.testing.assert_close(mine, engine_logits(model, batch, vision.shape[1], pmod), atol=1e-4, rtol=1e-5)
    assert (mine - plain).abs().max() > 0.1  # it was routed
    assert torch.equal(after, plain)  # and is no longer


def test_what_dynamic_llava_may_forget_is_the_long_answer(drawn) -> None:
    _, batch, vision = drawn
    n = vision.shape[1]
    masking = join.masking_of(batch, n, 1.0)
    assert [slots.tolist() for _, slots in masking.images] == [list(range(1, n + 1))]
    ((row, first, end),) = masking.answers
    words = batch.ids[row, first - n - 1 : end - n - 1]
    assert words[-1] == EOS and (batch.kind[row, first - n - 1 : end - n - 1] == LISTING).all()
    assert batch.ids[row, first - n - 1 - len(encode(listing.QUESTION)) : first - n - 1].tolist() == encode(
        listing.QUESTION
    )


@pytest.mark.slow
def test_every_view_gives_gradients_to_what_it_trains(drawn) -> None:
    model = vtr.pocket.load()[0].requires_grad_(True)
    batch, rng = make_batch(random.Random(4), "val", 1, listing=True), random.Random(0)
    pmod, dynamic = join.new_policies(model)
    objective = join.DynamicLLaVATraining(model, dynamic, 0.5)
    steps = {
        "plain": lambda: join.plain_step(model, batch, "prune", rng),
        "small": lambda: join.plain_step(model, batch, "at36", rng),
        "pmod": lambda: join.pmod_step(model, pmod, batch),
        "dynamic": lambda: join.dynamic_step(objective, batch, 0.5),
    }
    for name, step in steps.items():
        for module in (model, pmod.module, dynamic.module):
            module.zero_grad()
        pmod.module.requires_grad_(True)
        figures = step()
        assert figures["loss"] > 0 and model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
        learnt = {
            "pmod": any(p.grad is not None and p.grad.abs().max() > 0 for p in pmod.module.parameters()),
            "dynamic": any(p.grad is not None and p.grad.abs().max() > 0 for p in dynamic.module.parameters()),
        }
        assert learnt == {key: key == name for key in learnt}
    objective.remove()


@pytest.mark.slow
def test_the_stages_leave_one_model_for_both_policies(tmp_path, monkeypatch) -> None:
    short = {"list": {"steps": 2, "lr": 1e-3, "pictures": 1}, "join": {"steps": 6, "lr": 1e-3, "pictures": 1}}
    monkeypatch.setattr(train, "JOINT", short)
    monkeypatch.setitem(join.VIEWS, "join", {"pmod": 0.5, "dynamic": 0.5})
    run(monkeypatch, "--joint", "--out", str(tmp_path))
    model, _ = vtr.pocket.load(folder=tmp_path / "weights")
    before = vtr.pocket.load()[0].state_dict()
    moved = {n.split(".")[1] for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert moved >= {"language_model", "multi_modal_projector"} and "vision_tower" not in moved
    assert model.generation_config.max_new_tokens == 96
    for name in ("pmod", "dynamic-llava"):
        policy = vtr.policy(f"{name}:weights={tmp_path / 'policies' / name}")
        policy.check_model(model)
        assert any(w.abs().max() > 0 for w in policy.tensors().values())
        with pytest.raises(ValueError, match="trained with another model"):
            policy.check_model(vtr.pocket.load()[0])
    first = torch.load(tmp_path / "join.pt", weights_only=True)
    run(monkeypatch, "--joint", "--out", str(tmp_path))  # finished: nothing is trained again
    assert torch.equal(first["model"]["lm_head.weight"], torch.load(tmp_path / "join.pt")["model"]["lm_head.weight"])
    assert (tmp_path / "times.jsonl").read_text().count("join") == 1
    run(monkeypatch, "--joint", "--alone", "dynamic", "--out", str(tmp_path / "alone"))
    assert torch.load(tmp_path / "alone" / "join.pt", weights_only=True)["step"] == 3  # half of the steps


def run(monkeypatch, *words: str) -> None:
    """The command, in this process."""
    monkeypatch.setattr("sys.argv", ["train", *words, "--workers", "1"])
    threads = torch.get_num_threads()
    try:
        train.main()
    finally:
        torch.set_num_threads(threads)


def test_a_policy_alone_is_for_the_joint_stages(monkeypatch, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--alone", "pmod", "--out", str(tmp_path))
    assert "--start and --alone are for --joint" in capsys.readouterr().err
    assert join.alone(train.JOINT["join"], "pmod")["views"] == {"pmod": 1.0}


def test_listing_and_its_metric() -> None:
    rng = random.Random(1)
    scene = S.make_scene(rng)
    wanted = listing.answer(scene, rng)
    assert sum(listing.items(wanted).values()) == len(scene.objects) and len(wanted.split()) >= 40
    assert listing.f1(listing.answer(scene, random.Random(9)), wanted) == 1.0  # in another order
    assert set(encode(wanted)) and listing.QUESTION not in wanted
    assert listing.f1("top-left red star k", "top-left red star k top-left blue digit 7") == pytest.approx(2 / 3)
    assert listing.f1("top-left red star", "top-left red star k") == 0.0  # its letter is missing
    assert listing.f1("red star top-left top blue digit", "top red star") == 0.0  # no region; no name
    assert listing.f1("", "") == 1.0 and metric("listing").score("top red star", ["top red star"], None) == 1.0


def test_listings_are_drawn_and_read_as_data() -> None:
    from vtr.eval.accuracy.data import open_data

    drawn = list(vtr.pocket.listings(2))
    read = list(open_data("pocket:task=listing", limit=2))
    assert [one.answers[0] for one in read] == [one["answer"] for one in drawn]
    assert read[0].group != read[1].group and read[0].kind == "listing"
    with pytest.raises(ValueError, match=r"task=questions .*listing"):
        open_data("pocket:task=poem")
