"""Choosing while the prompt is read: an accepted try is the answer, and a row gets what its choice alone would give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import vtr
from tests import tiny
from tests.families import FAMILIES
from vtr.engine.install import patch_of

CHOICES = ["divprune:keep=0.2", "fastv:keep=0.5,layer=2", "none"]
ROWS = [["ab", tiny.IMAGE, "cd", tiny.IMAGE, "x"], ["text only"], ["a", tiny.IMAGE, "another"]]
SOME = 0.0065
"""Some of the tiny models' answers are surer than this, and some are not."""


def auto(thresholds: float = SOME, tokens: int = 1, choices: list[str] = CHOICES) -> vtr.AutoPolicy:
    return vtr.AutoPolicy(choices=choices, thresholds=thresholds, tokens=tokens)


def said(model: Any, inputs: Any, policy: Any, **more: Any) -> tuple[Any, vtr.Report]:
    given = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True, **more}
    torch.manual_seed(0)
    return tiny.generate(model, inputs, policy=policy, **given), vtr.report(model)


def same(one: Any, other: Any, close: float = 1e-4) -> bool:
    far = max(float((a - b).abs().max()) for a, b in zip(one.logits, other.logits, strict=True))
    return torch.equal(one.sequences, other.sequences) and far <= close


@contextmanager
def counted(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what enters the first decoder layer and the vision tower, call by call."""
    seen: list[tuple[int, ...]] = []
    layer, tower = model.get_decoder().layers[0], model.get_encoder(modality="image")
    handles = [
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(tuple(args[0].shape)), with_kwargs=True),
        tower.register_forward_pre_hook(lambda m, args, kwargs: seen.append((-1,)), with_kwargs=True),
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    model = vtr.patch(tiny.llava_next())
    return model, tiny.batch(model, ROWS)


@pytest.mark.parametrize("tokens", [1, 3])
def test_an_accepted_try_is_not_run_again(llava: tuple[Any, Any], tokens: int) -> None:
    """Forwards are those of the accepted policy, and of the tries that were left; pictures are encoded once."""
    model, batch = llava
    one = tiny.single(batch, 2, model)
    runs = {}
    for name, policy in {"first": auto(0.0, tokens), "last": auto(1.0, tokens), **{c: c for c in CHOICES}}.items():
        with counted(model) as seen:
            said(model, one, None if policy == "none" else policy)
        runs[name] = seen
    assert runs["first"] == runs[CHOICES[0]]
    prefills = [runs[c][1] for c in CHOICES]
    alone = runs["none"]
    tried = [step for shape in prefills[:2] for step in (shape, *[(1, 1, shape[2])] * (tokens - 1))]
    want = [alone[0], *tried, *alone[1:]]
    if tokens == 1:
        assert runs["last"] == want
    else:  # where nothing was looked at, the others say as much beforehand
        assert sorted(runs["last"]) == sorted(want)
    assert sum(shape == (-1,) for shape in runs["last"]) == 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_are_those_of_what_they_chose(family: str, tokens: int) -> None:
    model = vtr.patch(getattr(tiny, family)())
    batch = tiny.batch(model, ROWS)
    mixed = [auto(SOME, tokens), None, auto(1.0, tokens)], [auto(0.0, tokens), "fastv:keep=0.3", auto(SOME, tokens)]
    for policy in (auto(SOME, tokens), auto(1.0, tokens), *mixed):
        out, report = said(model, batch, policy)
        chosen = [row.policy for row in report.rows]
        want, plain = said(model, batch, chosen)
        assert same(out, want)
        assert [row.vision_tokens for row in report.rows] == [row.vision_tokens for row in plain.rows]
        if any(chosen):
            lengths = [[layer.lengths() for layer in one.past_key_values.layers] for one in (out, want)]
            assert lengths[0] == lengths[1]


def test_a_row_alone_chooses_as_in_a_batch(llava: tuple[Any, Any]) -> None:
    model, batch = llava
    for tokens in (1, 3):
        for threshold in (0.0062, SOME, 0.0068):
            rows = said(model, batch, auto(threshold, tokens))[1].rows
            for b, row in enumerate(rows):
                alone = said(model, tiny.single(batch, b, model), auto(threshold, tokens))[1].rows[0]
                assert (alone.policy, alone.tries) == (row.policy, row.tries)


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "temperature": 2.0},
     {"do_sample": True, "num_return_sequences": 2}, {"repetition_penalty": 5.0}, {"max_new_tokens": 1}],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 3])
def test_ways_of_generating(llava: tuple[Any, Any], how: dict[str, Any], tokens: int) -> None:
    """Beams, sampling and penalties: what a try has said and generate does not say is taken back."""
    model, batch = llava
    out, report = said(model, batch, auto(SOME, tokens), **how)
    want, _ = said(model, batch, [row.policy for row in report.rows], **how)
    assert same(out, want)


def test_a_streamer_hears_what_is_returned(llava: tuple[Any, Any]) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Heard(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    model, batch = llava
    one, heard = tiny.single(batch, 0, model), Heard()
    out, _ = said(model, one, auto(1.0, 3), streamer=heard)
    assert heard.ids == [*out.sequences[0].tolist(), -1]


def test_with_a_cache_as_without(llava: tuple[Any, Any]) -> None:
    model, batch = llava
    out, report = said(model, batch, auto(SOME, 2))
    want, _ = said(model, batch, [row.policy for row in report.rows], use_cache=False)
    assert same(out, want)


def test_one_choice_is_that_policy(llava: tuple[Any, Any]) -> None:
    model, batch = llava
    for choice in CHOICES:
        out, report = said(model, batch, auto(choices=[choice]))
        want, plain = said(model, batch, choice if choice != "none" else [None, None, "random:keep=1.0"])
        assert same(out, want, 0.0 if choice != "none" else 1e-5)
        assert report.flops == plain.flops or choice == "none"
        assert all(row.tries == [] for row in report.rows)


@pytest.mark.parametrize("tokens", [1, 3])
def test_all_that_is_tried_is_counted(llava: tuple[Any, Any], tokens: int) -> None:
    model, batch = llava
    one = tiny.single(batch, 2, model)
    costs = [said(model, one, [c if c != "none" else None], max_new_tokens=5)[1] for c in CHOICES]
    report = said(model, one, auto(1.0, tokens))[1]
    looks = [said(model, one, c, max_new_tokens=tokens)[1].decode_flops for c in CHOICES[:2]]
    assert report.rows[0].tries == [(c.spec, r.rows[0].vision_tokens[0]) for c, r in zip(
        map(vtr.policy, CHOICES[:2]), costs, strict=False)]  # fmt: skip
    assert report.prefill_flops == sum(cost.prefill_flops for cost in costs) + sum(looks)
    assert report.decode_flops == costs[2].decode_flops and report.steps == costs[2].steps
    assert report.selector_ms > 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_every_family(family: Any) -> None:
    """Positions of several axes, features added behind layers, windows: rows are those of what they chose."""
    model = vtr.patch(family.make())
    batch = family.batch(model, [*ROWS[:2], ["a", tiny.IMAGE, "other"]])
    choices = ["random:keep=0.3,layer=1", "none"]
    chooser = vtr.AutoPolicy(choices=choices, thresholds=[0.5])
    chooser.accept = lambda step, began: torch.arange(len(began[-1].ids)) % 2 == 0  # type: ignore[method-assign]
    try:
        ids, logits, _ = family.generate(model, batch, policy=chooser, max_new_tokens=4)
    except vtr.UnsupportedError as error:
        assert "accept" not in str(error) and ("fixed policy" in str(error) or "packed" in str(error))
        return
    chosen = [row.policy for row in vtr.report(model).rows]
    assert chosen == ["random:keep=0.3,layer=1", None, None]
    want = family.generate(model, batch, policy=chosen, max_new_tokens=4)
    assert torch.equal(ids, want[0]) and float((logits - want[1]).abs().max()) < 1e-4


LONG = [["a system prompt of some length ", tiny.IMAGE, "x"], ["another one of about that length ", tiny.IMAGE, "why"]]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_stands_in_front_of_the_first_picture_is_read_once(family: Any, tokens: int) -> None:
    model = vtr.patch(family.make())
    batch = family.batch(model, LONG)
    aligned = bool(batch["attention_mask"].all())
    batch = batch if aligned else family.single(model, batch, 1)
    chooser = vtr.AutoPolicy(["random:keep=0.2,layer=1", "fastv:keep=0.5,layer=2", "none"], 1.0, tokens=tokens)
    seen: list[int] = []
    layer = patch_of(model).decoder.text.layers[0]
    handle = layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0].shape[1]), with_kwargs=True)
    try:
        ids, logits, _ = family.generate(model, batch, policy=chooser, max_new_tokens=4)
    except vtr.UnsupportedError:
        return
    finally:
        handle.remove()
    report = vtr.report(model)
    want = family.generate(model, batch, policy=None, max_new_tokens=4)
    assert torch.equal(ids, want[0]) and float((logits - want[1]).abs().max()) < 1e-4
    prefills = [n for n in seen if n > len(ids)]
    windows = [window for window in patch_of(model).decoder.windows if window is not None]
    saved = 16 if all(window > 400 for window in windows) else 0
    assert prefills[1] == prefills[2] <= prefills[0] - saved
    assert all(row.policy is None for row in report.rows)
    slots = (batch["input_ids"] == tiny.IMAGE_ID) if "input_ids" in batch else None
    if slots is not None and bool(slots.any()):
        assert report.rows[0].kept(0) == slots[0].nonzero().squeeze(1).tolist()


def test_what_it_cannot_do_is_refused_by_name(llava: tuple[Any, Any]) -> None:
    model, batch = llava
    for wrong, what in (
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "static"),
        ({"prompt_lookup_num_tokens": 2}, "drafts"),
    ):
        with pytest.raises(vtr.UnsupportedError, match=what):
            said(model, batch, auto(), **wrong)
    with pytest.raises(vtr.UnsupportedError, match=r"model\.generate"), torch.no_grad():
        model(**batch, policy=auto())
    cache = said(model, batch, None)[0].past_key_values
    with pytest.raises(vtr.UnsupportedError, match="already holds"):
        said(model, batch, auto(), past_key_values=cache)
    assert "forward" not in model.get_decoder().__dict__


def test_forgetting_and_several_tokens() -> None:
    from tests import learned

    model = vtr.patch(tiny.llava())
    batch = tiny.batch(model, ROWS)
    forgets = learned.dynamic()
    with pytest.raises(ValueError, match="let one be heard"):
        said(model, batch, vtr.AutoPolicy(choices=[forgets, "none"], tokens=2))
    out, report = said(model, batch, vtr.AutoPolicy(choices=["divprune:0.2", forgets], thresholds=1.0))
    want, _ = said(model, batch, [p if row.policy else None for p, row in zip([forgets] * 3, report.rows, strict=True)])
    assert same(out, want)
