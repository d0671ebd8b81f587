"""The oracles that say whether a reduced run is right, over families × language models × attention functions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import vtr
from tests import oracle, tiny
from tests.alone import check_beams, check_decoding
from tests.conftest import Pair
from tests.tiny import IMAGE

pytestmark = pytest.mark.sample(1)

NOISE = 1e-5
STEPS = 7
RUN: dict[str, Any] = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
ROWS = [["ab", IMAGE, "what"], [IMAGE, "cde"], ["abcdef"], ["a", IMAGE, "bc", IMAGE, "whichone"], [IMAGE, IMAGE, "xy"]]
SHRINKING = [1.0, 0.8, 0.5, 0.5, 0.2]
POLICIES: list[Any] = [
    vtr.FastV(0.5),
    vtr.FastV(7, layer=1),
    vtr.FastV(0.1, layer=4),
    vtr.FastV(0.0, layer=3),
    vtr.GSearch(SHRINKING),
    vtr.GSearch([1.0, 30, 30, 11, 1]),
    vtr.GSearch(SHRINKING, queries="last"),
    vtr.Random(0.3),
    vtr.Random(0.5, layer=2, seed=3),
    vtr.UniformGrid(0.25),
    vtr.UniformGrid(9, layer=2),
    vtr.Pyramid(),
    vtr.Pyramid(positions="keep"),
    vtr.Pyramid([0.6, 11, 2], [0, 2, 3]),
]
MIXES: list[list[Any]] = [
    [vtr.FastV(0.5), None, vtr.FastV(0.3), vtr.GSearch(SHRINKING), vtr.Random(0.2)],
    [None, vtr.GSearch(SHRINKING, queries="last"), None, vtr.UniformGrid(0.25, 2), vtr.FastV(7, layer=1)],
    [vtr.Random(0.4, 2, seed=5), vtr.UniformGrid(0.5), vtr.Random(0.5), None, vtr.GSearch([1.0, 20, 20, 4, 1])],
    [vtr.Pyramid(), None, vtr.Random(0.5), vtr.Pyramid([7, 3], [1, 4]), vtr.Pyramid(positions="keep")],
]


def forward(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **kwargs)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=NOISE, rtol=0)


def kept(model: Any, inputs: dict[str, Tensor], b: int) -> list[list[int]]:
    """The reported slots of row b in every layer, counted from the row's first real slot."""
    start, row = int(tiny.real(inputs, b)[0]), vtr.report(model).rows[b]
    return [[slot - start for slot in row.kept(layer)] for layer in range(len(row.vision_tokens))]


def reference(pair: Pair, inputs: dict[str, Tensor], b: int, policy: Any) -> tuple[oracle.Row, oracle.Dense]:
    """The oracle's run of row b, given what the patched model just reported."""
    row, reported = oracle.row(pair.stock, tiny.single(inputs, b, pair.stock)), kept(pair.patched, inputs, b)
    return row, oracle.run(pair.stock, row, oracle.rule(policy, reported), reported)


# ------------------------------------------------------------------------------------------- the reference itself
def test_the_reference_is_the_stock_model(pair: Pair) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    logits, out = forward(pair.stock, inputs).logits, tiny.generate(pair.stock, inputs, **RUN)
    for b in range(len(ROWS)):
        row = oracle.row(pair.stock, tiny.single(inputs, b, pair.stock))
        want = oracle.run(pair.stock, row)
        close(logits[b, tiny.real(inputs, b)], want.logits)
        tokens, steps = oracle.greedy(pair.stock, row, want.kept, STEPS, tiny.NEVER)
        assert out.sequences[b, -STEPS:].tolist() == tokens
        close(torch.stack([step[b] for step in out.logits]), steps)


def test_reduction_shows_in_the_logits(pair: Pair) -> None:
    """Without this the comparisons below could pass on a model that hardly looks at its vision tokens."""
    inputs = tiny.batch(pair.stock, ROWS[:1])
    full = forward(pair.stock, inputs).logits[0, -1]
    for policy in POLICIES:
        assert (forward(pair.patched, inputs, policy=policy).logits[0, -1] - full).abs().max() > 100 * NOISE


# ------------------------------------------------------------------------------------------------- 1. off is off
def everything(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> list[Tensor]:
    """All tensors a user can see: logits, caches, generated tokens."""
    out = forward(model, inputs, use_cache=True, **kwargs)
    gen = tiny.generate(model, inputs, **RUN, **kwargs)
    caches = [t for c in (out, gen) for layer in c.past_key_values.layers for t in (layer.keys, layer.values)]
    return [out.logits, *gen.logits, gen.sequences, *caches]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def snapshot(model: Any) -> dict[str, Any]:
    """What patching could leave behind: classes, attributes, hooks of every module, attention of every config."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {key: list(value.items()) for key, value in vars(module).items() if key.endswith("_hooks")}
        seen[name] = (type(module), sorted(vars(module)), hooks, type(module).forward)
        if hasattr(module, "config"):
            seen[name] += (module.config._attn_implementation, sorted(vars(module.config)))
    return seen


@pytest.mark.parametrize("padding", ["left", "right"])
def test_off_is_off(pair: Pair, padding: str) -> None:
    inputs = tiny.batch(pair.stock, ROWS, padding)
    want = everything(pair.stock, inputs)
    assert same(everything(pair.patched, inputs), want)
    forward(pair.patched, inputs, policy=MIXES[0])
    assert same(everything(pair.patched, inputs), want)
    assert same(everything(pair.patched, inputs, policy=None), want)
    assert same(everything(pair.patched, inputs, policy=[None] * len(ROWS)), want)


def test_off_is_off_with_beams(pair: Pair) -> None:
    inputs, search = tiny.batch(pair.stock, ROWS), {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    want = tiny.generate(pair.stock, inputs, **search)
    assert torch.equal(tiny.generate(pair.patched, inputs, **search), want)
    assert torch.equal(tiny.generate(pair.patched, inputs, policy=None, **search), want)


def test_unpatch_leaves_nothing(pair: Pair) -> None:
    inputs, model = tiny.batch(pair.stock, ROWS[:3]), copy.deepcopy(pair.stock)
    want = everything(model, inputs)  # transformers adds lazy hooks of its own on the first call
    before = snapshot(model)
    assert vtr.patch(model) is model
    once = snapshot(model)
    assert vtr.patch(model) is model
    assert snapshot(model) == once
    tiny.generate(model, inputs, policy=MIXES[0][:3], **RUN)
    vtr.unpatch(model)
    assert snapshot(model) == before
    assert same(everything(model, inputs), want)


# ------------------------------------------------------------------------------------------------- 2. dense mask
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_the_dense_mask(pair: Pair, policy: Any) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    logits = forward(pair.patched, inputs, policy=policy).logits
    for b in range(len(ROWS)):
        _, want = reference(pair, inputs, b, policy)
        assert kept(pair.patched, inputs, b) == want.kept
        assert vtr.report(pair.patched).rows[b].vision_tokens == [*map(len, want.kept)]
        close(logits[b, tiny.real(inputs, b)], want.logits)


@pytest.mark.parametrize("policy", POLICIES)
def test_decoding_equals_the_dense_mask(pair: Pair, policy: Any) -> None:
    rows = [ROWS[0], ROWS[2], ROWS[3]]
    inputs = tiny.batch(pair.stock, rows)
    out = tiny.generate(pair.patched, inputs, policy=policy, **RUN)
    for b in range(len(rows)):
        row, want = reference(pair, inputs, b, policy)
        tokens, logits = oracle.greedy(pair.stock, row, want.kept, STEPS, tiny.NEVER, policy.renumbers)
        assert out.sequences[b, -STEPS:].tolist() == tokens
        close(torch.stack([step[b] for step in out.logits]), logits)


@pytest.mark.parametrize("policy", [vtr.FastV(0.5), vtr.GSearch(SHRINKING), vtr.Random(0.2), vtr.UniformGrid(0.3)])
def test_a_row_may_begin_with_an_image(pair: Pair, policy: Any) -> None:
    """Without a text token in front, the first slots may be dropped with no survivor before them."""
    inputs = tiny.batch(pair.stock, [[IMAGE, "what"], ["abcdef", IMAGE, "what"]], bos=False)
    logits = forward(pair.patched, inputs, policy=policy).logits
    for b in range(2):
        _, want = reference(pair, inputs, b, policy)
        assert kept(pair.patched, inputs, b) == want.kept
        first = 0 if b else want.kept[-1][0]
        close(logits[b, tiny.real(inputs, b)][first:], want.logits[first:])


# --------------------------------------------------------------------------------------------- 3. row invariance
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("policies", MIXES)
def test_a_row_is_the_same_in_any_batch(pair: Pair, policies: list[Any], padding: str) -> None:
    inputs = tiny.batch(pair.stock, ROWS, padding)
    logits = forward(pair.patched, inputs, policy=policies).logits
    together = [kept(pair.patched, inputs, b) for b in range(len(ROWS))]
    for b, policy in enumerate(policies):
        alone = tiny.single(inputs, b, pair.stock)
        close(logits[b, tiny.real(inputs, b)], forward(pair.patched, alone, policy=policy).logits[0])
        if policy is not None:
            assert kept(pair.patched, alone, 0) == together[b]


@pytest.mark.parametrize("policies", MIXES)
def test_a_row_decodes_the_same_in_any_batch(pair: Pair, policies: list[Any]) -> None:
    check_decoding(pair.patched, tiny.batch(pair.stock, ROWS), policies, RUN, close)


@pytest.mark.parametrize(("policies", "returned"), zip(MIXES, [1, 2, 3, 2], strict=True))
def test_a_row_has_the_same_beams_in_any_batch(pair: Pair, policies: list[Any], returned: int) -> None:
    check_beams(pair, ROWS, policies, returned, STEPS)


@pytest.mark.parametrize("policy", [vtr.Random(0.3), vtr.Random(0.2, layer=2), vtr.UniformGrid(0.4), vtr.Random(0)])
def test_a_prompt_may_end_in_an_image(pair: Pair, policy: Any) -> None:
    rows = [["abc", IMAGE], ["ab", IMAGE, "what"]]
    inputs = tiny.batch(pair.stock, rows)
    closed = int(inputs["input_ids"][0, -1]) == tiny.END_IMG
    if closed:  # InternVL's closing token is padded over, which only a forward can take
        inputs = tiny.batch(pair.stock, rows, "right")
        inputs["attention_mask"][0, tiny.real(inputs, 0)[-1]] = 0
    policies = [policy, vtr.FastV(0.5)]
    logits = forward(pair.patched, inputs, policy=policies).logits
    row, want = reference(pair, inputs, 0, policy)
    got = logits[0, tiny.real(inputs, 0)]
    close(got, want.logits)
    last = want.kept[-1][-1] if want.kept[-1] else row.slots[0] - 1
    close(got[last:], got[last].expand_as(got[last:]))
    if not closed:
        out = tiny.generate(pair.patched, inputs, policy=policies, **RUN)
        close(out.logits[0][0], got[-1])
        assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + STEPS


# ------------------------------------------------------------------------------------- policies drawn, not ranked
def test_random_draws_by_seed_and_count(pair: Pair) -> None:
    inputs = tiny.batch(pair.stock, [["ab", IMAGE, "what"], ["abcdefg", IMAGE, "which"]])
    draws = []
    for seed in range(4):
        forward(pair.patched, inputs, policy=vtr.Random(0.5, seed=seed))
        draws.append(kept(pair.patched, inputs, 0)[-1])
        row, total = vtr.report(pair.patched).rows[0], int((inputs["input_ids"][0] == tiny.IMAGE_ID).sum())
        assert row.vision_tokens == [total // 2] * 5
    assert len({tuple(draw) for draw in draws}) == 4


def test_a_uniform_grid_is_spread() -> None:
    """A quarter of a 6 × 6 grid leaves at least one token in every 3 × 3 quadrant, and no 2 × 2 block full."""
    model = vtr.patch(tiny.llava())
    inputs = tiny.batch(model, [["ab", IMAGE, "what"]])
    forward(model, inputs, policy=vtr.UniformGrid(0.25))
    first = int((inputs["input_ids"][0] == tiny.IMAGE_ID).nonzero()[0])
    slots = torch.tensor(kept(model, inputs, 0)[0]) - first
    grid = torch.zeros(36).index_fill(0, slots, 1.0).view(6, 6)
    assert grid.sum() == 9
    assert grid.unfold(0, 3, 3).unfold(1, 3, 3).sum((2, 3)).min() >= 1
    assert grid.unfold(0, 2, 1).unfold(1, 2, 1).sum((2, 3)).max() <= 2


# -------------------------------------------------------------------------------------------- 5. cache = no cache
@pytest.mark.parametrize("policies", [*MIXES, *([policy] * len(ROWS) for policy in POLICIES[::3])])
def test_decoding_without_a_cache_is_the_same(pair: Pair, policies: list[Any]) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    cached = tiny.generate(pair.patched, inputs, policy=policies, **RUN)
    before = [kept(pair.patched, inputs, b) for b in range(len(ROWS))]
    plain = tiny.generate(pair.patched, inputs, policy=policies, use_cache=False, **RUN)
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits))
    assert [kept(pair.patched, inputs, b) for b in range(len(ROWS))] == before


@pytest.mark.parametrize("policies", MIXES)
def test_stepping_by_hand_is_the_same(pair: Pair, policies: list[Any]) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    want = tiny.generate(pair.patched, inputs, policy=policies, **RUN)
    out = forward(pair.patched, inputs, policy=policies, use_cache=True)
    mask, width = inputs["attention_mask"], inputs["input_ids"].shape[1]
    for step, logits in enumerate(want.logits):
        close(out.logits[:, -1], logits)
        mask = torch.cat([mask, torch.ones(len(mask), 1).long()], 1)
        after = {"input_ids": want.sequences[:, width + step, None], "attention_mask": mask}
        out = forward(pair.patched, after, past_key_values=out.past_key_values, use_cache=True)


UNKNOWN = -1


def live(model: Any, inputs: dict[str, Tensor], decoded: int = 0) -> list[list[int]]:
    """Per layer and row: the tokens whose keys a cache should hold, by the report and the layers' sliding windows."""
    config, real = model.config.text_config, inputs["attention_mask"].bool()
    text, out = real & (inputs["input_ids"] != tiny.IMAGE_ID), []
    for depth in range(config.num_hidden_layers):
        window, held = oracle.window(config, depth), []
        for b, row in enumerate(vtr.report(model).rows):
            start = int(real[b].nonzero()[0])
            at = torch.cat([text[b].nonzero()[:, 0], torch.tensor(row.kept(depth))]).long() - start
            if row.policy is not None and vtr.policy(row.policy).renumbers:
                at = torch.arange(len(at))
            end = int(at.max()) + 1
            at = torch.cat([at, torch.arange(end, end + decoded)])
            seen = int((at > end + decoded - (window or 10**6)).sum())  # what the next token can see
            pooled = row.vision_tokens[depth] - len(row.kept(depth))  # they stand nowhere in the prompt
            held.append(seen + pooled if window is None or not pooled else UNKNOWN)
        out.append(held)
    return out


@pytest.mark.parametrize("policies", MIXES)
def test_the_cache_holds_what_was_kept(pair: Pair, policies: list[Any]) -> None:
    config, inputs = pair.stock.config.text_config, tiny.batch(pair.stock, ROWS)
    each = 2 * config.num_key_value_heads * config.head_dim * 4
    cache = forward(pair.patched, inputs, policy=policies, use_cache=True).past_key_values
    report = vtr.report(pair.patched)
    want = live(pair.patched, inputs)
    assert [layer.lengths() for layer in cache.layers] == want
    assert report.kv_bytes == sum(map(sum, want)) * each
    cache = tiny.generate(pair.patched, inputs, policy=policies, **RUN).past_key_values
    report = vtr.report(pair.patched)
    grown = live(pair.patched, inputs, STEPS - 1)  # the last token is never fed back
    assert [layer.lengths() for layer in cache.layers] == grown
    assert report.kv_bytes == sum(map(sum, grown)) * each


# ------------------------------------------------------------------------------------------------- 6. accounting
def counted(call: Callable[[], Any]) -> int:
    """FLOPs that torch counts inside the text model during a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return sum(
        sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name.endswith(".language_model")
    )


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def eager(request: pytest.FixtureRequest) -> Any:
    """Eager, so that torch sees the attention products."""
    return vtr.patch(getattr(tiny, request.param)("eager"))


@pytest.mark.parametrize("policies", [*MIXES, *([policy] * len(ROWS) for policy in POLICIES)])
def test_flops_are_those_torch_counts(eager: Any, policies: list[Any]) -> None:
    inputs = tiny.batch(eager, ROWS)
    got = counted(lambda: eager(**inputs, policy=policies))
    report = vtr.report(eager)
    assert report.flops == report.prefill_flops
    assert report.flops + report.selector_flops == got


@pytest.mark.parametrize("b", range(len(ROWS)))
@pytest.mark.parametrize("cached", [True, False])
def test_flops_of_decoding_a_row_are_those_torch_counts(eager: Any, cached: bool, b: int) -> None:
    inputs, policy = tiny.single(tiny.batch(eager, ROWS), b, eager), MIXES[0][b]
    got = counted(lambda: tiny.generate(eager, inputs, policy=policy, use_cache=cached, **RUN))
    report = vtr.report(eager)
    assert report.flops == report.prefill_flops + report.decode_flops
    assert report.flops + report.selector_flops == got


@pytest.mark.parametrize("policies", [*MIXES, [None] * len(ROWS)])
def test_flops_of_decoding_a_batch(eager: Any, policies: list[Any]) -> None:
    """Rows of similar length are decoded together, padded by up to an eighth; the report counts live keys."""
    inputs, config = tiny.batch(eager, ROWS), eager.config.text_config
    got = counted(lambda: tiny.generate(eager, inputs, policy=policies, **RUN))
    report = vtr.report(eager)
    attended = sum(n + t for layer in live(eager, inputs) for n in layer for t in range(1, STEPS))
    slack = attended / 8 * 4 * config.num_attention_heads * config.head_dim if any(policies) else 0
    assert 0 <= got - (report.flops + report.selector_flops) <= slack


@pytest.mark.parametrize("cached", [True, False])
def test_decoded_tokens_are_no_prefill(pair: Pair, cached: bool) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    forward(pair.patched, inputs, policy=MIXES[0])
    prefill = vtr.report(pair.patched).flops
    tiny.generate(pair.patched, inputs, policy=MIXES[0], use_cache=cached, **RUN)
    report = vtr.report(pair.patched)
    assert report.steps == STEPS - 1
    assert report.prefill_flops == prefill
    assert report.decode_flops > 0


def test_the_report_is_of_the_last_call(pair: Pair) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    forward(pair.patched, inputs, policy=MIXES[0])
    forward(pair.patched, inputs, policy=None)
    rows = vtr.report(pair.patched).rows
    assert [row.policy for row in rows] == [None] * len(ROWS)
    assert all(row.vision_tokens == [row.total] * 5 for row in rows)


def held(cache: Any) -> int:
    """Bytes of keys and values in a cache of transformers' own."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def test_an_unreduced_report_says_what_the_cache_holds(pair: Pair) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    cache = tiny.generate(pair.patched, inputs, **RUN).past_key_values
    assert vtr.report(pair.patched).kv_bytes == held(cache)
    for mine in (None, DynamicCache()):  # one without a config knows of no window
        cache = forward(pair.patched, inputs, use_cache=True, past_key_values=mine).past_key_values
        assert vtr.report(pair.patched).kv_bytes == held(cache)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ROWS), 4).long()], 1)
        more = {"input_ids": torch.full((len(ROWS), 4), 9), "attention_mask": mask}
        with FlopCounterMode(display=False) as counter:
            forward(pair.patched, more, use_cache=True, past_key_values=cache)
        counts = counter.get_flop_counts().items()
        report = vtr.report(pair.patched)
        assert report.kv_bytes == held(cache)
        if pair.stock.config._attn_implementation == "eager":  # torch does not count sdpa on a CPU
            assert report.flops == sum(sum(n.values()) for name, n in counts if name.endswith(".language_model"))
