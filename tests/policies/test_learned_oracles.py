"""The oracles, for policies with weights: p-MoD's routers and Dynamic-LLaVA's predictors, random ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vtr
from tests import learned, oracle, tiny
from tests.alone import check_beams, check_decoding, check_no_cache
from tests.conftest import Pair
from tests.engine.test_oracles import RUN, STEPS, UNKNOWN, close, counted, forward, kept, live
from tests.tiny import IMAGE

pytestmark = pytest.mark.sample(1)

LAYERS = 5
ROWS = [["ab", IMAGE, "what"], [IMAGE, "cde"], ["abcdef"], ["a", IMAGE, "bc", IMAGE, "whichone"], ["a", IMAGE, "b"]]
PMOD, MORE = learned.pmod(), learned.pmod(seed=1, ratios=[0.9, 0.5, None, 0.0, 0.3], norm="sigmoid_0.4_0.8")
DYNAMIC, OTHER = learned.dynamic(), learned.dynamic(seed=5, keep=7, layer=1)
MIXES: list[list[Any]] = [
    [PMOD, None, DYNAMIC, DYNAMIC, vtr.FastV(0.5)],
    [DYNAMIC, MORE, PMOD, PMOD, DYNAMIC],
    [OTHER, DYNAMIC, None, learned.dynamic(forget=False), vtr.Pyramid()],
    [vtr.Pool(2) + PMOD, vtr.Pool(3) + DYNAMIC, MORE, vtr.Pyramid(), vtr.Pool(2) + OTHER],
]
NAMES = ["dynamic", "pmod", "settings", "chains"]


@pytest.fixture(
    scope="module",
    params=[
        "llava-qwen2-sdpa",
        "llava_next-mistral-eager",
        pytest.param("llava_onevision-llama-sdpa", marks=pytest.mark.slow),
        pytest.param("internvl-qwen3-eager", marks=pytest.mark.slow),
    ],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Every family, language model and attention function once or more."""
    family, lm, attn = request.param.split("-")
    stock = getattr(tiny, family)(attn, lm=lm)
    return Pair(stock, vtr.patch(copy.deepcopy(stock)))


def per_image(model: Any, inputs: dict[str, Tensor]) -> list[int]:
    """Vision tokens of each image of a one-row batch, whatever tiles it has."""
    marks = (inputs["input_ids"][0] == tiny.IMAGE_ID).int()
    edges = torch.diff(marks, prepend=torch.zeros(1).int(), append=torch.zeros(1).int()).nonzero().squeeze(1)
    return [int(b - a) for a, b in edges.view(-1, 2)]


# ------------------------------------------------------------------------------------------------- 2. dense reference
@pytest.mark.parametrize("policy", [PMOD, MORE, DYNAMIC, OTHER])
def test_equals_the_dense_reference(pair: Pair, policy: Any) -> None:
    """Prefill, then every decoded step recomputed from scratch; kept tokens of every layer; cached keys at the end."""
    inputs = tiny.batch(pair.stock, ROWS)
    logits = forward(pair.patched, inputs, policy=policy).logits
    reported = [kept(pair.patched, inputs, b) for b in range(len(ROWS))]
    out = tiny.generate(pair.patched, inputs, policy=policy, **RUN)
    table = pair.stock.get_input_embeddings().weight
    for b in range(len(ROWS)):
        single = tiny.single(inputs, b, pair.stock)
        row, images, asked = oracle.row(pair.stock, single), per_image(pair.stock, single), len(single["input_ids"][0])
        want = learned.reference(pair.stock, row, policy, images, asked)
        assert reported[b] == want.kept
        close(logits[b, tiny.real(inputs, b)], want.logits)
        said = out.sequences[b, -STEPS:-1]
        whole = oracle.Row(torch.cat([row.embeds, table[said].detach()]), torch.cat([row.vision, said < 0]))
        want = learned.reference(pair.stock, whole, policy, images, asked)
        close(torch.stack([step[b] for step in out.logits]), want.logits[asked - 1 :])
        held = [layer.lengths()[b] for layer in out.past_key_values.layers]
        assert all(least <= n <= most for n, (least, most) in zip(held, want.held, strict=True))


def test_words_are_forgotten_and_remembered(pair: Pair) -> None:
    """Otherwise the comparisons here would say little."""
    inputs = tiny.batch(pair.stock, ROWS)
    grown = []
    for policy in (DYNAMIC, OTHER):
        tiny.generate(pair.patched, inputs, policy=policy, **RUN)
        grown += [sum(row.remembered(4)) for row in vtr.report(pair.patched).rows]
    assert 0 < sum(grown) < 2 * len(ROWS) * (STEPS - 1) and len(set(grown)) > 1


# ------------------------------------------------------------------------------------------------- 3. row invariance
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("policies", MIXES, ids=NAMES)
def test_a_row_is_the_same_in_any_batch(pair: Pair, policies: list[Any], padding: str) -> None:
    inputs = tiny.batch(pair.stock, ROWS, padding)
    logits = forward(pair.patched, inputs, policy=policies).logits
    together = [kept(pair.patched, inputs, b) for b in range(len(ROWS))]
    for b, policy in enumerate(policies):
        alone = tiny.single(inputs, b, pair.stock)
        close(logits[b, tiny.real(inputs, b)], forward(pair.patched, alone, policy=policy).logits[0])
        if policy is not None:
            assert kept(pair.patched, alone, 0) == together[b]


@pytest.mark.parametrize("policies", MIXES, ids=NAMES)
def test_a_row_decodes_the_same_in_any_batch(pair: Pair, policies: list[Any]) -> None:
    check_decoding(pair.patched, tiny.batch(pair.stock, ROWS), policies, RUN, close)


@pytest.mark.slow
def test_200_decoded_tokens_in_a_mixed_batch() -> None:
    """A row of each policy and None: the same as alone, cached keys as many as were remembered."""
    model = vtr.patch(tiny.llava())
    inputs, policies, long = tiny.batch(model, ROWS), MIXES[0], RUN | {"max_new_tokens": 200}
    together, rows = check_decoding(model, inputs, policies, long, close)
    for b, (policy, alone) in enumerate(zip(policies, rows, strict=True)):
        if policy is not None:
            held = [layer.lengths()[0] for layer in alone.past_key_values.layers]
            assert [layer.lengths()[b] for layer in together.past_key_values.layers] == held


@pytest.mark.parametrize("policies", [MIXES[1]], ids=["dynamic and pmod"])
def test_a_row_has_the_same_beams_in_any_batch(pair: Pair, policies: list[Any]) -> None:
    check_beams(pair, ROWS, policies, 2, STEPS)


# ------------------------------------------------------------------------------------------------ 5. cache = no cache
@pytest.mark.parametrize("policies", MIXES, ids=NAMES)
def test_decoding_without_a_cache_is_the_same(pair: Pair, policies: list[Any]) -> None:
    check_no_cache(pair, ROWS, policies, RUN, close)


def test_a_second_turn_goes_on(pair: Pair) -> None:
    """Text turns on a ragged cache: what was forgotten stays forgotten, the new question is remembered whole."""
    inputs, question = tiny.batch(pair.stock, ROWS), torch.tensor([[9, 12, 15]]).expand(len(ROWS), -1)
    policies = MIXES[0]

    def talk(inputs: dict[str, Tensor], policy: Any, question: Tensor) -> Any:
        first = tiny.generate(pair.patched, inputs, policy=policy, **RUN)
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), STEPS + 3).long()], 1)
        more = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
        return tiny.generate(pair.patched, more, policy=policy, **RUN)

    with pytest.warns(UserWarning, match="conversation goes on"):
        together = talk(inputs, policies, question)
    for b, policy in enumerate(policies[:4]):
        alone = talk(tiny.single(inputs, b, pair.stock), policy, question[:1])
        close(torch.stack([step[b] for step in together.logits]), torch.cat(alone.logits))


# ------------------------------------------------------------------------------------------------------ 6. accounting
@pytest.fixture(scope="module")
def eager() -> Any:
    return vtr.patch(tiny.llava_next("eager"))


@pytest.mark.parametrize("policies", [MIXES[0], MIXES[1], [PMOD] * 5, [DYNAMIC] * 5])
def test_flops_are_those_torch_counts(eager: Any, policies: list[Any]) -> None:
    inputs = tiny.batch(eager, ROWS)
    with sdpa_kernel(SDPBackend.MATH):  # so that torch sees the attention products of the image predictor
        got = counted(lambda: eager(**inputs, policy=policies))
    report = vtr.report(eager)
    assert report.flops == report.prefill_flops
    assert report.flops + report.selector_flops == got


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("policy", [PMOD, DYNAMIC])
def test_flops_of_decoding_a_row_are_those_torch_counts(eager: Any, cached: bool, policy: Any) -> None:
    """Of what the row holds; a bucket may reach over forgotten tokens until it is measured again."""
    inputs, config = tiny.single(tiny.batch(eager, ROWS), 0, eager), eager.config.text_config
    with sdpa_kernel(SDPBackend.MATH):
        got = counted(lambda: tiny.generate(eager, inputs, policy=policy, use_cache=cached, **RUN))
    report = vtr.report(eager)
    over = got - (report.flops + report.selector_flops)
    forgotten = (LAYERS - 2) * sum(range(STEPS)) * 4 * config.num_attention_heads * config.head_dim
    assert over == 0 if policy is PMOD or not cached else 0 <= over <= forgotten


@pytest.mark.parametrize("policies", MIXES, ids=NAMES)
def test_the_cache_holds_what_was_kept(pair: Pair, policies: list[Any]) -> None:
    config, inputs = pair.stock.config.text_config, tiny.batch(pair.stock, ROWS)
    each = 2 * config.num_key_value_heads * config.head_dim * 4
    cache = forward(pair.patched, inputs, policy=policies, use_cache=True).past_key_values
    for layer, want in zip(cache.layers, live(pair.patched, inputs), strict=True):
        assert [n if w == UNKNOWN else w for n, w in zip(layer.lengths(), want, strict=True)] == layer.lengths()
    cache = tiny.generate(pair.patched, inputs, policy=policies, **RUN).past_key_values
    assert vtr.report(pair.patched).kv_bytes == sum(sum(layer.lengths()) for layer in cache.layers) * each


def test_off_is_off(pair: Pair) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    want = forward(pair.stock, inputs).logits
    forward(pair.patched, inputs, policy=MIXES[1])
    assert torch.equal(forward(pair.patched, inputs).logits, want)
    assert torch.equal(forward(pair.patched, inputs, policy=[None] * len(ROWS)).logits, want)
