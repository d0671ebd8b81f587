"""Merged tokens, parts of a layer's attention, and requests for attention: drawn answers against the slow reference."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import vtr
from tests import oracle, tiny
from tests.drawn import Curious, Merges, Parts
from tests.engine import test_properties as properties
from tests.engine.test_properties import LAYERS, NOISE, RUN, forward, layers, pairs, pixel_seeds, rows, seeds
from tests.tiny import IMAGE

small = st.integers(0, 1000)
shares = st.one_of(st.none(), st.integers(0, 10).map(lambda n: n / 10))
some_layers = st.sets(layers, min_size=1).map(sorted)
parts = st.builds(Parts, some_layers, shares, shares, st.one_of(st.none(), shares), small)
taking_part = st.one_of(
    parts,
    parts,
    st.builds(
        vtr.ZipVL, st.sampled_from([0.5, 0.8, 0.975, 1.0]), st.integers(1, 9), st.integers(0, 9),
        st.sampled_from(["vision", "all"]), st.sampled_from(["probes", "all"]), seed=seeds,
    ),
    st.builds(vtr.EEMLLM, st.one_of(st.just("all"), some_layers, st.integers(0, 4).map(lambda n: n / 4))),
)  # fmt: skip
apart = parts.map(lambda policy: dataclasses.replace(policy, itself=False))
merges = st.builds(
    Merges, some_layers, st.integers(0, 9).map(lambda n: n / 10), st.integers(0, 4), st.booleans(), small
)
attentions = st.tuples(
    st.sampled_from(["last", "text", "behind", "vision", "drawn"]),
    st.sampled_from(["mean", "max", "each"]),
    st.sampled_from(["mean", "sum", "max", "each"]),
)
curious = st.builds(
    Curious,
    st.lists(attentions, min_size=1, max_size=3),
    st.sets(st.integers(1, LAYERS - 1), min_size=1).map(sorted),
    st.integers(1, 9).map(lambda n: n / 10),
    small,
)
scales = st.builds(
    vtr.SCM, st.integers(0, 10).map(lambda n: n / 10), st.integers(1, LAYERS - 1),
    group=st.sampled_from(["detail", "all"]),
)  # fmt: skip
anything: Any = st.one_of(taking_part, merges, curious, scales, properties.anything)
batches = st.lists(rows(anything), min_size=1, max_size=4)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=NOISE, rtol=0)


def check(models: Any, drawn: Any, seed: int, how: Any) -> Any:
    """A row's logits and what it decodes, against the slow reference; ``how``: what this is to run of a row."""
    (stock, patched), (text, policy) = models, drawn
    inputs = tiny.batch(stock, [text], seed=seed)
    got, row = forward(patched, inputs, policy)[0], oracle.row(stock, inputs)
    what = how(row)
    want = oracle.run(stock, row, what)
    for layer, part in what.attend.items():  # what such a token gets is left open
        line, _, mask = want.paid[layer]
        assume(not ((mask == -torch.inf).all(-1) & ~oracle.marked(line, part.silent)).any())
    stays = want.kept[-1]
    there = [slot for slot in range(len(got)) if slot not in row.slots or slot in stays]
    close(got[there], want.logits[there])
    out = tiny.generate(patched, inputs, policy=policy, **RUN)
    tokens, logits = oracle.greedy(stock, row, what, RUN["max_new_tokens"], tiny.NEVER)
    assert out.sequences[0, -len(tokens) :].tolist() == tokens
    close(torch.cat(out.logits), logits)
    return row, want, vtr.report(patched).rows[0]


@vtr.register_policy("same-for-test")
@dataclass
class Same(vtr.Policy):
    """In layer 1 the last vision token goes, and one like it comes; in layer 2 everybody takes part."""

    renumbers: ClassVar[bool] = True  # type: ignore[assignment]

    def prune(self, layer: int, tokens: Any) -> vtr.Merged | None:
        n = len(tokens)
        return vtr.Merged(torch.arange(n - 1), tokens.hidden[-1:], [[n - 1]]) if layer == 1 and n > 1 else None

    def attend(self, layer: int, tokens: Any, attention: Any) -> vtr.Attend | None:
        everybody = torch.arange(len(tokens))
        return vtr.Attend(everybody, everybody, torch.arange(len(tokens.text_place))) if layer == 2 else None


def test_answers_that_change_nothing() -> None:
    stock = tiny.llava()
    patched = vtr.patch(copy.deepcopy(stock))
    inputs = tiny.batch(stock, [["ab", IMAGE, "what"]])
    want, row, depth = stock(**inputs).logits[0].detach(), oracle.row(stock, inputs), 5
    policy = Same()
    watched = oracle.Watched(policy)
    close(forward(patched, inputs, policy)[0][~row.vision], want[~row.vision])
    how = watched.given(row, depth)
    assert how.kept == [row.slots] + [[*row.slots[:-1], -1]] * (depth - 1)
    assert how.attend == {2: oracle.Part([], [])}
    close(oracle.run(stock, row, how).logits[~row.vision], want[~row.vision])


@given(pairs, rows(st.one_of(taking_part, apart)), pixel_seeds)
def test_who_takes_part(models: Any, drawn: Any, seed: int) -> None:
    policy = copy.copy(drawn[1])
    watched = oracle.Watched(policy)
    row, _, report = check(models, (drawn[0], policy), seed, lambda row: watched.given(row, LAYERS))
    assert report.vision_tokens == [len(row.slots)] * LAYERS


@given(pairs, rows(merges), pixel_seeds)
def test_new_tokens(models: Any, drawn: Any, seed: int) -> None:
    policy = drawn[1]
    row, want, report = check(models, drawn, seed, lambda row: policy.given(row, LAYERS)[0])
    assert report.vision_tokens == [*map(len, want.kept)]
    sources = [[sorted(made) for made in report.sources(layer)] for layer in range(LAYERS)]
    assert sources == policy.given(row, LAYERS)[1]
    assert [report.kept(layer) for layer in range(LAYERS)] == [[s for s in here if s >= 0] for here in want.kept]


@given(pairs, rows(curious), pixel_seeds)
def test_what_is_asked_for(models: Any, drawn: Any, seed: int) -> None:
    (stock, patched), (text, policy) = models, drawn
    policy.seen.clear()
    inputs = tiny.batch(stock, [text], seed=seed)
    logits, row = forward(patched, inputs, policy)[0], oracle.row(stock, inputs)
    kept = [vtr.report(patched).rows[0].kept(layer) for layer in range(LAYERS)]
    want = oracle.run(stock, row, oracle.Given(kept))
    there = [slot for slot in range(len(logits)) if slot not in row.slots or slot in kept[-1]]
    close(logits[there], want.logits[there])
    assert sorted(policy.seen) == (policy.layers if IMAGE in text else [])
    for layer, seen in policy.seen.items():
        for got, expected in zip(seen, policy.expected(row, want, layer), strict=True):
            close(got, expected)


@given(pairs, batches, properties.paddings, pixel_seeds)
def test_a_row_is_the_same_in_any_batch(models: Any, drawn: list[Any], padding: str, seed: int) -> None:
    properties.check_rows(models, drawn, padding, seed)


@given(pairs, batches, pixel_seeds)
def test_decoding_without_a_cache_is_the_same(models: Any, drawn: list[Any], seed: int) -> None:
    properties.check_cache(models, drawn, seed)


@given(pairs, batches, properties.paddings, pixel_seeds)
def test_decoding_with_constant_shapes_is_the_same(models: Any, drawn: list[Any], padding: str, seed: int) -> None:
    properties.check_static(models, drawn, padding, seed)
