"""The oracles again, on drawn prompts, policies and schedules."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtr
from tests import learned, oracle, pooling, tiny
from tests.tiny import IMAGE

NOISE = 1e-5
LAYERS = 4
RUN: dict[str, Any] = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}


@functools.cache
def pair(family: str, lm: str, attn: str) -> tuple[Any, Any]:
    """The stock model and its patched copy."""
    stock = getattr(tiny, family)(attn, layers=LAYERS, seed=1, lm=lm)
    return stock, vtr.patch(copy.deepcopy(stock))


# ----------------------------------------------------------------------------------------------------- what is drawn
ratios = st.integers(1, 20).map(lambda n: n / 20)
keeps = st.one_of(st.just(0.0), ratios, st.integers(0, 50))
layers = st.integers(0, LAYERS - 1)
seeds = st.integers(-(2**40), 2**40)
pairs = st.builds(
    pair, st.sampled_from(tiny.FAMILIES), st.sampled_from(list(tiny.LMS)), st.sampled_from(["sdpa", "eager"])
)


@st.composite
def schedules(draw: st.DrawFn) -> list[int | float]:
    """Ratios that shrink, then (from some layer on) counts that shrink."""
    turn = draw(st.integers(1, LAYERS))
    floats = sorted(draw(st.lists(ratios, min_size=turn - 1, max_size=turn - 1)), reverse=True)
    counts = st.lists(st.integers(1, 250), min_size=LAYERS - turn, max_size=LAYERS - turn)
    return [1.0, *floats, *sorted(draw(counts), reverse=True)]


@st.composite
def pyramids(draw: st.DrawFn) -> vtr.Pyramid:
    """Stages in any layers, numbered anew or not."""
    at = sorted(draw(st.sets(layers, min_size=1, max_size=3)))
    return vtr.Pyramid(draw(st.lists(keeps, min_size=len(at), max_size=len(at))), at, draw(numberings))


numberings: Any = st.sampled_from(["keep", "reindex"])
pruners = st.one_of(
    st.builds(vtr.FastV, keeps, st.integers(1, LAYERS - 1)),
    st.builds(vtr.GSearch, schedules(), st.sampled_from(["text", "last"])),
    st.builds(vtr.Random, keeps, layers, seeds),
    st.builds(vtr.UniformGrid, keeps, layers),
    pyramids(),
)
sides = st.integers(1, 3)  # as many as a tile of InternVL has
pools = st.builds(vtr.Pool, st.one_of(sides, st.tuples(sides, sides)))
policies = st.one_of(st.none(), pruners, pools, st.builds(vtr.Policy.__add__, pools, pruners))
compressors = st.one_of(
    st.builds(vtr.Matryoshka, st.sampled_from([1, 9])),
    st.builds(vtr.GlobalCom2, ratios, budget=st.sampled_from(["paper", "exact"])),
)
typed = functools.lru_cache(256, typed=True)
pmod, dynamic = (typed(functools.partial(make, LAYERS)) for make in (learned.pmod, learned.dynamic))
trained = st.one_of(
    st.builds(pmod, st.integers(0, 3), low=st.integers(0, 9).map(lambda n: n / 10)),
    st.builds(dynamic, st.integers(0, 3), keep=keeps, layer=layers),
)
anything: Any = st.one_of(
    policies, compressors, st.builds(vtr.Policy.__add__, compressors, pruners), trained,
    st.builds(vtr.Policy.__add__, st.one_of(pools, compressors), trained),
)  # fmt: skip
texts = st.text("abcdefghij", min_size=1, max_size=6)


@st.composite
def rows(draw: st.DrawFn, policies: Any = policies) -> tuple[list[str], Any]:
    """A prompt of texts and up to two images in any order, and a policy that can take it."""
    parts = draw(st.lists(texts, max_size=2)) + [IMAGE] * draw(st.integers(0, 2))
    policy, parts = draw(policies), list(draw(st.permutations(parts)))
    asks = policy is not None and policy.question_guided
    return parts + ([draw(texts)] if asks and parts and parts[-1] == IMAGE else []), policy


batches = st.lists(rows(anything), min_size=1, max_size=4)


# ---------------------------------------------------------------------------------------------------------- checks
def forward(model: Any, inputs: dict[str, Tensor], policy: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, policy=policy).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=NOISE, rtol=0)


def split(policy: Any) -> tuple[tuple[int, int] | None, Any]:
    """(the grid of a Pool in it, or None; what prunes in the decoder, or None)."""
    parts = policy.policies if isinstance(policy, vtr.Chain) else [policy]
    if not isinstance(parts[0], vtr.Pool):
        return None, policy
    grid = parts[0].grid
    return (grid, grid) if isinstance(grid, int) else grid, parts[1] if len(parts) > 1 else None


def check_dense_mask(models: tuple[Any, Any], drawn: tuple[list[str], Any], seed: int) -> None:
    (stock, patched), (parts, policy) = models, drawn
    inputs = tiny.batch(stock, [parts], seed=seed)
    out = tiny.generate(patched, inputs, policy=policy, **RUN)
    full, reported = oracle.row(stock, inputs), vtr.report(patched).rows[0]
    pool, pruner = split(policy)
    row, made_of = full, [[slot] for slot in full.slots]
    if pool is not None:  # a shorter prompt; the pruner, if there is one, sees the pooled tokens
        row, made_of = pooling.pooled(full, pooling.images(stock, inputs), pool)
    kept = [[row.slots[made_of.index(made)] for made in reported.sources(layer)] for layer in range(LAYERS)]
    want = oracle.run(stock, row, oracle.rule(pruner, kept), kept)
    assert kept == want.kept
    got = forward(patched, inputs, policy)[0]
    if pool is not None:  # slots that are gone from the prompt show no token of it
        got, want.logits = got[~full.vision], want.logits[~row.vision]
    close(got, want.logits)
    tokens, logits = oracle.greedy(
        stock, row, want.kept, RUN["max_new_tokens"], tiny.NEVER, bool(policy and policy.renumbers)
    )
    assert out.sequences[0, -len(tokens) :].tolist() == tokens
    close(torch.cat(out.logits), logits)


def check_rows(models: tuple[Any, Any], drawn: list[tuple[list[str], Any]], padding: str, seed: int) -> None:
    (stock, patched), policy = models, [policy for _, policy in drawn]
    inputs = tiny.batch(stock, [parts for parts, _ in drawn], padding, seed=seed)
    logits = forward(patched, inputs, policy)
    steps = tiny.generate(patched, inputs, policy=policy, **RUN).logits if padding == "left" else ()
    for b in range(len(drawn)):
        row = tiny.single(inputs, b, stock)
        close(logits[b, tiny.real(inputs, b)], forward(patched, row, policy[b])[0])
        if steps:
            alone = tiny.generate(patched, row, policy=policy[b], **RUN).logits
            close(torch.stack([step[b] for step in steps]), torch.cat(alone))


def check_cache(models: tuple[Any, Any], drawn: list[tuple[list[str], Any]], seed: int) -> None:
    (stock, patched), policy = models, [policy for _, policy in drawn]
    inputs = tiny.batch(stock, [parts for parts, _ in drawn], seed=seed)
    cached = tiny.generate(patched, inputs, policy=policy, **RUN)
    plain = tiny.generate(patched, inputs, policy=policy, use_cache=False, **RUN)
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits))


def check_static(models: tuple[Any, Any], drawn: list[tuple[list[str], Any]], padding: str, seed: int) -> None:
    (stock, patched), policy = models, [policy for _, policy in drawn]
    inputs = tiny.batch(stock, [parts for parts, _ in drawn], padding, seed=seed)
    growing = tiny.generate(patched, inputs, policy=policy, **RUN)
    static = tiny.generate(patched, inputs, policy=policy, cache_implementation="static", **RUN)
    assert torch.equal(static.sequences, growing.sequences)
    close(torch.stack(static.logits), torch.stack(growing.logits))


pixel_seeds = st.integers(0, 1000)
paddings = st.sampled_from(["left", "right"])


@given(pairs, rows(), pixel_seeds)
def test_a_row_equals_the_dense_mask(models: tuple[Any, Any], drawn: tuple[list[str], Any], seed: int) -> None:
    check_dense_mask(models, drawn, seed)


@given(pairs, batches, paddings, pixel_seeds)
def test_a_row_is_the_same_in_any_batch(models: Any, drawn: list[Any], padding: str, seed: int) -> None:
    check_rows(models, drawn, padding, seed)


@given(pairs, batches, pixel_seeds)
def test_decoding_without_a_cache_is_the_same(models: Any, drawn: list[Any], seed: int) -> None:
    check_cache(models, drawn, seed)


@given(pairs, batches, paddings, pixel_seeds)
def test_decoding_with_constant_shapes_is_the_same(models: Any, drawn: list[Any], padding: str, seed: int) -> None:
    check_static(models, drawn, padding, seed)
