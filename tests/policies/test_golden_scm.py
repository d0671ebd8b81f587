"""SCM against the numbers of the official code (Yuliang-Liu/Monkey, project/mini_monkey)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official, oracle, tiny
from tests.official import close
from tests.policies.given_text import attention_of, generated, hidden_of, prompt, text_model
from vtr.image import Layout
from vtr.policies.decoder.scm import groups

META, DATA = official.meta("mini_monkey"), official.tensors("mini_monkey", "scm")
STATE, CONFIG = official.tensors("mini_monkey", "scm_llama_weights"), META["llm"]
DEPTH, VOCAB = CONFIG["num_hidden_layers"], CONFIG["vocab_size"]
cases = pytest.mark.parametrize("case", META["cases"])


def given(case: str) -> tuple[Any, oracle.Row, Layout]:
    """The model, its prompt, and how the picture lies: the finest tiles in front, all coarser ones count as tile 0."""
    about, embeds = META["cases"][case], DATA[f"{case}.inputs_embeds"][0]
    (start, end), stop = about["block"], about["image_end"]
    vision = torch.zeros(len(embeds)).bool()
    vision[about["first_image_token"] : stop] = True
    assert start == about["first_image_token"] and torch.equal(
        vision, DATA[f"{case}.input_ids"][0] == META["image_token_id"]
    )
    at = torch.arange(stop - start)
    tile = torch.where(at < end - start, at // about["tokens_per_tile"] + 1, 0)
    columns, rows = about["ratio"]
    layout = Layout(tile, at, at * 0, at * 0, (about["tokens_per_tile"], 1), (rows, columns), thumbnail_last=True)
    return text_model(CONFIG, STATE, embeds, vision), oracle.Row(embeds, vision), layout


def kept(case: str, row: oracle.Row) -> list[int]:
    """The slots of vision tokens that the official code leaves."""
    return [slot for slot in DATA[f"{case}.kept"].tolist() if slot in row.slots]


def shown(row: oracle.Row, layout: Layout, paid: Tensor) -> tuple[Any, Any]:
    """As much of a row's tokens, and of a layer's attention [n, n], as the policy looks at."""
    place = row.vision.nonzero().squeeze(1)

    class Shown(SimpleNamespace):
        def __len__(self) -> int:
            return len(place)

    tokens = Shown(
        place=place, text_place=(~row.vision).nonzero().squeeze(1), group=layout.group, image=layout.tile * 0,
        per_image=(len(layout),), memo={},
    )  # fmt: skip
    return tokens, SimpleNamespace(received=lambda rows: paid[rows].sum(0))


@cases
def test_what_stays(case: str) -> None:
    model, row, layout = given(case)
    before = hidden_of(model, row, oracle.Given([row.slots] * DEPTH))[0]
    tokens, attention = shown(row, layout, attention_of(model, row, before, 1).mean(0))
    policy = vtr.SCM(placement="official")
    assert policy.attend(0, tokens, attention) is None and not tokens.memo
    assert policy.attend(1, tokens, attention) is None
    assert tokens.place[policy.prune(2, tokens)].tolist() == kept(case, row)
    lost = META["cases"][case]["lost_after_block"]
    assert tokens.place[vtr.SCM().prune(2, tokens)].tolist() == sorted([*kept(case, row), lost])


@cases
def test_the_slow_reference_says_the_same(case: str) -> None:
    """The prompt without what does not stay, from the start."""
    model, row, _ = given(case)
    here = DATA[f"{case}.kept"]
    never = list(range(VOCAB, model.config.text_config.vocab_size))
    for name, one in ("full", row), ("scm", oracle.Row(row.embeds[here], row.vision[here])):
        want = DATA[f"{case}.logits_{name}"][0]
        tokens, logits = oracle.greedy(model, one, [one.slots] * DEPTH, len(want), never)
        assert tokens == DATA[f"{case}.ids_{name}"][0, 1:].tolist()  # (the official generate puts a BOS in front)
        close(logits[:, :VOCAB], want)


@cases
def test_the_model_starts_again(case: str) -> None:
    model, row, layout = given(case)
    inputs, want = prompt(model, row.embeds, row.vision, [layout]), DATA[f"{case}.logits_scm"][0]
    policy = vtr.SCM(restart=True, placement="official")
    tokens, logits = generated(model, inputs, policy, len(want), VOCAB)
    assert vtr.report(model).rows[0].kept(0) == kept(case, row)
    assert tokens.tolist() == DATA[f"{case}.ids_scm"][0, 1:].tolist()
    close(logits, want)


@cases
def test_the_model_goes_on(case: str) -> None:
    """Without a restart the same tokens stay, and layers 0 and 1 have seen the others."""
    model, row, layout = given(case)
    inputs = prompt(model, row.embeds, row.vision, [layout])
    with torch.no_grad():
        logits = model(**inputs, policy=vtr.SCM(placement="official")).logits[0]
    reported = [vtr.report(model).rows[0].kept(layer) for layer in range(DEPTH)]
    assert reported == [row.slots] * 2 + [kept(case, row)] * (DEPTH - 2)
    want = oracle.run(model, row, oracle.Given(reported)).logits
    there = [slot for slot in range(len(want)) if slot not in row.slots or slot in reported[-1]]
    close(logits[there], want[there])


# ------------------------------------------------------------------------------------------------------- our own ways
def test_each_image_has_its_group() -> None:
    tokens: Any = SimpleNamespace(
        image=torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), group=torch.tensor([0, 1, 1, 2, 1, 0, 0, 0]), per_image=(4, 2, 2)
    )
    assert [group.tolist() for group in groups(tokens, "detail")] == [[1, 2], [4], [6, 7]]
    assert [group.tolist() for group in groups(tokens, "all")] == [[0, 1, 2, 3], [4, 5], [6, 7]]


def test_a_group_that_nobody_looks_at_stays_whole() -> None:
    _, row, layout = given(next(iter(META["cases"])))
    end = row.slots[-1] + 1
    alone = oracle.Row(row.embeds[:end], row.vision[:end])
    tokens, attention = shown(alone, layout, torch.ones(end, end))
    policy = vtr.SCM(group="all")
    policy.attend(1, tokens, attention)
    assert len(policy.prune(2, tokens)) == len(tokens)


def test_restarting_in_a_batch_is_restarting_alone() -> None:
    stock = tiny.llava()
    model = vtr.patch(stock)
    inputs = tiny.batch(stock, [["ab", tiny.IMAGE, "what"], ["abc"], [tiny.IMAGE, "b", tiny.IMAGE, "which"]])
    policy = vtr.SCM(restart=True)
    run: dict[str, Any] = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    together = torch.stack(tiny.generate(model, inputs, policy=policy, **run).logits)
    report = vtr.report(model).rows
    assert [one.vision_tokens[0] for one in report] == [18, 0, 36] and len(report[0].tries) == 1
    for b in range(3):
        alone = tiny.generate(model, tiny.single(inputs, b, stock), policy=policy, **run).logits
        close(torch.stack(alone)[:, 0], together[:, b])


def test_what_cannot_be_is_refused() -> None:
    for settings in ({"layer": 0}, {"keep": 1.5}, {"group": "tiles"}, {"placement": "none"}):
        with pytest.raises(ValueError, match=r"SCM|choose|float"):
            vtr.SCM(**settings)
    with pytest.raises(ValueError, match="choose"):
        vtr.SCM(layer=4).check(4)
    with pytest.raises(ValueError, match="group='all'"):
        vtr.SCM().entering(32, 576)
    assert vtr.SCM(group="all").entering(4, 10) == [10, 10, 5, 5]
    assert vtr.SCM(group="all", restart=True).entering(4, 10) == [5] * 4
