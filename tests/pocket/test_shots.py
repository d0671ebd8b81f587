"""Prompts with demonstrations whose labels have to be read, and the training that teaches it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import vtr
from vtr.pocket.changes import FILE
from vtr.pocket.model import VOCAB
from vtr.pocket.shots.__main__ import POSITIONS, Shown, learnt, loss_of, make_row, show, states, write
from vtr.pocket.shots.prompts import WORDS, Prompt, pictures, prompts, turns


@pytest.fixture(scope="module")
def eight() -> list[Prompt]:
    return list(prompts(6, 8, seed=3))


def test_the_query_can_be_answered_from_the_demonstrations(eight: list[Prompt]) -> None:
    for one in eight:
        read = {d.seen: d.answer for d in one.demonstrations}
        assert read[one.query.seen] == one.query.answer
        assert set(read) == set(WORDS[one.type]) == set(read.values())  # one permutation, every word once
        assert all(one.type == "shape" or d.question.startswith("what color") for d in one.demonstrations)
        assert not any(d.image is one.query.image for d in one.demonstrations)
    assert {one.type for one in eight} == set(WORDS)


def test_fewer_demonstrations_are_among_more_and_prompts_are_seeded(eight: list[Prompt]) -> None:
    for shots in (0, 1, 4):
        for few, many in zip(prompts(6, shots, seed=3), eight, strict=True):
            assert few.query.question == many.query.question and few.query.answer == many.query.answer
            said = [(d.question, d.answer, d.image.tobytes()) for d in many.demonstrations]
            mine = [(d.question, d.answer, d.image.tobytes()) for d in few.demonstrations]
            assert len(mine) == shots and all(one in said for one in mine)
            assert shots == 0 or few.query.seen in [d.seen for d in few.demonstrations]
    again, other = next(prompts(1, 2, seed=3)), next(prompts(1, 2, seed=4))
    assert again.query.question == eight[0].query.question
    assert other.query.image.tobytes() != again.query.image.tobytes()


def test_answers_are_turns_of_the_assistant(eight: list[Prompt]) -> None:
    said = turns(eight[0])
    assert [turn["role"] for turn in said] == ["user", "assistant"] * 8 + ["user"]
    processor = vtr.pocket.load()[1]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    assert text.count("<image>") == len(pictures(eight[0])) == 9 and text.count("<eos>") == 8
    first = eight[0].demonstrations[0]
    assert text.split("<eos>")[0].split("<image>")[1].split() == [*first.question.split(), first.answer]


@pytest.fixture(scope="module")
def shown() -> list[Shown]:
    model, rng = vtr.pocket.load()[0], random.Random(0)
    return [show(model, rng) for _ in range(3)]


@pytest.mark.parametrize(("view", "tokens"), [("coarse", [51, 51, 51]), ("query", [51, 51, 744]), ("whole", [744] * 3)])
def test_a_row_asks_what_it_has_shown(shown: list[Shown], view: str, tokens: list[int]) -> None:
    rng = random.Random(5)
    for spread in (False, True):
        row = make_row(rng, shown, view, spread)
        assert [len(part) for part in row.parts if isinstance(part, torch.Tensor)] == tokens
        length = sum(1 if isinstance(part, int) else len(part) for part in row.parts)
        assert length == len(row.positions) and row.positions == sorted(set(row.positions))
        assert (row.positions[-1] > length - 1) is (spread and view != "whole")  # whole ones take up what they are
        flat = [i for part in row.parts for i in ([part] if isinstance(part, int) else [None] * len(part))]
        assert row.asked <= row.labels.keys()
        for place, label in row.labels.items():
            assert flat[place + 1] == label  # what comes next in the prompt itself
        for place in row.asked:
            assert flat[place + 1] in [flat[other + 1] for other in range(place)]


def test_the_forward_of_the_training_is_the_models(shown: list[Shown]) -> None:
    model = vtr.pocket.load()[0]
    rows = [make_row(random.Random(i), shown[: 2 + i], "coarse", False) for i in range(2)]
    lm = model.model.language_model
    with torch.no_grad():
        got = states(model, rows)[-1]
        for i, row in enumerate(rows):
            parts = [lm.embed_tokens(torch.tensor([p])) if isinstance(p, int) else p.float() for p in row.parts]
            want = lm(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0]
            torch.testing.assert_close(got[i, : len(row.positions)], want, atol=2e-4, rtol=1e-4)


def test_steps_teach_and_what_is_exported_is_loaded_again(shown: list[Shown], tmp_path: Path) -> None:
    model = vtr.pocket.load()[0]
    model.requires_grad_(False)
    params = [p.requires_grad_() for p in learnt(model).values()]
    rows = [make_row(random.Random(9), shown, "patches", False)]
    losses, probe = [], torch.nn.Linear(160, len(VOCAB))
    optimizer = torch.optim.AdamW([*params, *probe.parameters()], 1e-3)
    for _ in range(6):
        loss, _ = loss_of(model, rows, probe)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    write(model, tmp_path)
    assert (tmp_path / FILE).stat().st_size < 2.2e6
    (fresh, processor), base = vtr.pocket.load("shots", folder=tmp_path), vtr.pocket.load()[0].state_dict()
    for name, p in fresh.named_parameters():
        if name in learnt(model):
            largest = (model.get_parameter(name).float() - base[name]).abs().amax(-1, keepdim=True)
            assert bool(((p - model.get_parameter(name).float()).abs() <= largest / 250 + 1e-7).all()), name
        else:
            assert torch.equal(p, base[name]), name
    assert fresh.config.text_config.max_position_embeddings == processor.tokenizer.model_max_length == POSITIONS
