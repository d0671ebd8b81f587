"""Matryoshka and GlobalCom²: oracles of what shrinks an image before the decoder, over all families."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import oracle, shorter, tiny
from tests.alone import check_beams, check_decoding, check_no_cache
from tests.conftest import Pair
from tests.engine.test_oracles import everything, same, snapshot
from tests.loads import forward
from tests.tiny import IMAGE, VIDEO
from vtr.engine.adapters import find_adapter
from vtr.engine.prompt import read_prompt
from vtr.image import Layout

pytestmark = pytest.mark.sample(1)

NOISE = 1e-5
STEPS = 6
RUN: dict[str, Any] = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
ROWS = [["ab", IMAGE, "what"], [IMAGE, "cde"], ["abcdef"], ["a", IMAGE, "bc", IMAGE, "whichone"], [IMAGE, IMAGE, "xy"]]
M, G = vtr.Matryoshka, vtr.GlobalCom2
SHRINKING = [1.0, 0.8, 0.5, 0.5, 0.2]
ALONE: list[Any] = [M(9), M(1), G(0.5), G(0.25), G(0.6, temperature=0.5), G(0.3, temperature=float("inf"))]
MIXES: list[list[Any]] = [
    [M(9), G(0.5), None, M([1, 9]), vtr.FastV(0.5)],
    [G(0.5) + vtr.GSearch(SHRINKING), M(1), None, G(0.3, budget="exact"), M([9, 1]) + vtr.Random(0.5, 2)],
    [vtr.UniformGrid(0.3), G(0.4) + vtr.Pyramid([0.5, 3], [1, 3]), M(9), M(1) + vtr.FastV(0.5, 3), None],
]


@pytest.fixture(scope="module", params=zip(tiny.FAMILIES, ["sdpa", "eager"] * 2, tiny.LMS, strict=True), ids="-".join)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Every family, every language model."""
    family, attn, lm = request.param
    stock = getattr(tiny, family)(attn, lm=lm)
    return Pair(stock, vtr.patch(copy.deepcopy(stock)))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=NOISE, rtol=0)


def by_hand(model: Any, inputs: dict[str, Tensor], policy: Any) -> oracle.Row:
    """One row's shorter prompt."""
    if "pixel_values" not in inputs:
        return shorter.row(model, inputs, [])
    count, internvl = len(shorter.pixels(model, inputs)), model.config.model_type == "internvl"
    with torch.no_grad():
        if isinstance(policy, M):
            given = policy.tokens if isinstance(policy.tokens, list) else [policy.tokens] * count  # type: ignore[list-item]
            return shorter.row(model, inputs, shorter.matryoshka(model, inputs, given))
        crops = [layout.crops for layout in layouts(model, inputs)[0]] if internvl else None
        return shorter.row(
            model, inputs, shorter.globalcom2(model, inputs, policy.retention, policy.temperature, crops)
        )


def layouts(model: Any, inputs: dict[str, Tensor]) -> list[list[Layout]]:
    return read_prompt(find_adapter(model), model, inputs["input_ids"], None, inputs).layouts


# ---------------------------------------------------------------------------------------------- 1. a shorter prompt
@pytest.mark.parametrize("policy", ALONE)
def test_equals_a_shorter_prompt(pair: Pair, policy: Any) -> None:
    """Forward and every decoded step, against the untouched language model on embeddings put together by hand."""
    inputs = tiny.batch(pair.stock, ROWS)
    logits = forward(pair.patched, inputs, policy=policy).logits
    report = vtr.report(pair.patched)
    out = tiny.generate(pair.patched, inputs, policy=policy, **RUN)
    for b in range(len(ROWS)):
        alone = tiny.single(inputs, b, pair.stock)
        row = by_hand(pair.stock, alone, policy)
        assert report.rows[b].vision_tokens == [int(row.vision.sum())] * 5
        given = {"inputs_embeds": row.embeds[None]}
        want = forward(pair.stock, given).logits[0]
        text = (inputs["input_ids"][b] != tiny.IMAGE_ID) & inputs["attention_mask"][b].bool()
        close(logits[b, text], want[~row.vision])
        steps = tiny.generate(pair.stock, given, **RUN)
        assert out.sequences[b, -STEPS:].tolist() == steps.sequences[0, -STEPS:].tolist()
        close(torch.stack([step[b] for step in out.logits]), torch.cat(steps.logits))


def test_scales_show_in_the_logits(pair: Pair) -> None:
    """Without this the comparison above could pass on a model that hardly looks at its vision tokens."""
    inputs = tiny.batch(pair.stock, ROWS[3:4])
    full = forward(pair.stock, inputs).logits[0, -1]
    for policy in (M(1), M([1, 9]), G(0.5), G(0.25)):
        assert (forward(pair.patched, inputs, policy=policy).logits[0, -1] - full).abs().max() > 100 * NOISE


def test_the_full_scale_changes_nothing(pair: Pair) -> None:
    """Of text tokens: packed logits equal the padded ones."""
    inputs = tiny.batch(pair.stock, ROWS)
    n = 9 if pair.stock.config.model_type == "internvl" else 36
    logits = forward(pair.patched, inputs, policy=M(n)).logits
    report = vtr.report(pair.patched)
    assert all(row.vision_tokens == [row.total] * 5 and len(row.kept(0)) == row.total for row in report.rows)
    want = forward(pair.stock, inputs).logits
    real = inputs["attention_mask"].bool()
    close(logits[real], want[real])


def test_every_image_has_a_scale_of_its_own(pair: Pair) -> None:
    inputs, n = tiny.batch(pair.stock, ROWS[3:4]), len(layouts(pair.stock, tiny.batch(pair.stock, ROWS[3:4]))[0])
    assert n == 2
    counts = {}
    for tokens in (1, 9, [1, 9], [9, 1]):
        forward(pair.patched, inputs, policy=M(tokens))
        counts[str(tokens)] = vtr.report(pair.patched).rows[0].vision_tokens[0]
    assert counts["[1, 9]"] + counts["[9, 1]"] == counts["1"] + counts["9"]
    assert counts["1"] < counts["[1, 9]"] < counts["9"]


# ------------------------------------------------------------------------------------- 2., 3. row invariance, cache
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("policies", MIXES)
def test_a_row_is_the_same_in_any_batch(pair: Pair, policies: list[Any], padding: str) -> None:
    inputs = tiny.batch(pair.stock, ROWS, padding)
    logits, report = forward(pair.patched, inputs, policy=policies).logits, vtr.report(pair.patched)
    for b, policy in enumerate(policies):
        alone = tiny.single(inputs, b, pair.stock)
        close(logits[b, tiny.real(inputs, b)], forward(pair.patched, alone, policy=policy).logits[0])
        mine, start = vtr.report(pair.patched).rows[0], int(tiny.real(inputs, b)[0])
        assert mine.vision_tokens == report.rows[b].vision_tokens
        if policy is not None:
            made_of = [[slot - start for slot in some] for some in report.rows[b].sources(4)]
            assert mine.sources(4) == made_of


@pytest.mark.parametrize("policies", MIXES)
def test_a_row_decodes_the_same_in_any_batch(pair: Pair, policies: list[Any]) -> None:
    check_decoding(pair.patched, tiny.batch(pair.stock, ROWS), policies, RUN, close)


@pytest.mark.parametrize(("policies", "returned"), zip(MIXES, [1, 2, 3], strict=True))
def test_a_row_has_the_same_beams_in_any_batch(pair: Pair, policies: list[Any], returned: int) -> None:
    check_beams(pair, ROWS, policies, returned, STEPS)


@pytest.mark.parametrize("policies", MIXES)
def test_decoding_without_a_cache_is_the_same(pair: Pair, policies: list[Any]) -> None:
    check_no_cache(pair, ROWS, policies, RUN, close)


# ------------------------------------------------------------------------------------------------- 4. off is off
def test_off_is_off(pair: Pair) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    want = everything(pair.stock, inputs)
    forward(pair.patched, inputs, policy=MIXES[0])
    tiny.generate(pair.patched, inputs, policy=MIXES[1], **RUN)
    assert same(everything(pair.patched, inputs), want)
    assert same(everything(pair.patched, inputs, policy=None), want)
    model = copy.deepcopy(pair.stock)
    forward(model, inputs, output_hidden_states=True)  # transformers adds lazy hooks of its own
    before = snapshot(model)
    tiny.generate(vtr.patch(model), inputs, policy=MIXES[1], **RUN)
    vtr.unpatch(model)
    assert snapshot(model) == before


def test_a_copy_captures_for_itself(pair: Pair) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    want = forward(pair.patched, inputs, policy=MIXES[1]).logits
    made = copy.deepcopy(pair.patched)
    vtr.unpatch(made)
    vtr.patch(made)
    other = copy.deepcopy(made)
    close(forward(other, inputs, policy=MIXES[1]).logits, want)
    close(forward(made, inputs, policy=MIXES[1]).logits, want)


def test_offloaded_weights_give_the_same(pair: Pair, tmp_path: Path) -> None:
    """The tower's last layer is asked for scores while its weights may be on disk."""
    accelerate = pytest.importorskip("accelerate")
    inputs, model = tiny.batch(pair.stock, ROWS), copy.deepcopy(pair.stock)
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    vtr.patch(model)
    for policies in MIXES:
        want = forward(pair.patched, inputs, policy=policies).logits
        close(forward(model, inputs, policy=policies).logits, want)


# ----------------------------------------------------------------------------------- budgets, videos, refusals
@pytest.mark.parametrize("retention", [0.1, 0.25, 0.5])
def test_the_report_agrees_with_the_exact_budget(pair: Pair, retention: float) -> None:
    inputs, policy = tiny.batch(pair.stock, ROWS), G(retention, budget="exact")
    forward(pair.patched, inputs, policy=policy)
    want = [sum(map(policy.kept_of, row)) for row in layouts(pair.stock, inputs)]
    assert [row.vision_tokens[0] for row in vtr.report(pair.patched).rows] == want


@pytest.mark.parametrize("policy", [M(1), M(9), G(0.5), G(0.3, budget="exact")])
def test_videos_are_frames(policy: Any) -> None:
    """Frames are pooled or kept one by one, their newline token stays; an image beside the video has its own tiles."""
    model = vtr.patch(tiny.llava_onevision())
    inputs = tiny.batch(model, [["ab", VIDEO, "what"], ["a", IMAGE, "b", VIDEO, "which"], ["a", IMAGE, "x"]])
    logits, report = forward(model, inputs, policy=policy).logits, vtr.report(model)
    frame = policy.tokens if isinstance(policy, M) else 4 if policy.retention == 0.5 else 2
    assert report.rows[0].vision_tokens == [3 * frame + 1] * 5
    assert report.rows[1].vision_tokens[0] > report.rows[0].vision_tokens[0]
    for b in range(3):
        alone = tiny.single(inputs, b, model)
        close(logits[b, tiny.real(inputs, b)], forward(model, alone, policy=policy).logits[0])
    out = tiny.generate(model, inputs, policy=policy, **RUN)
    plain = tiny.generate(model, inputs, policy=policy, use_cache=False, **RUN)
    close(torch.stack(out.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("call", [forward, lambda *a, **k: tiny.generate(*a, max_new_tokens=2, **k)])
def test_a_scale_that_is_none_is_refused_before_anything_changes(pair: Pair, call: Any) -> None:
    inputs = tiny.batch(pair.stock, ROWS)
    valid = "9, 1" if pair.stock.config.model_type == "internvl" else "36, 9, 1"
    with pytest.raises(ValueError, match=rf"tokens=25 is no scale of tiles of . × . tokens: choose {valid}$"):
        call(pair.patched, inputs, policy=M(25))
    with pytest.raises(ValueError, match="names 2 scales, but the row has 1 images"):
        call(pair.patched, inputs, policy=[M([1, 9]), None, None, M([1, 9]), None])
    assert torch.equal(forward(pair.patched, inputs).logits, forward(pair.stock, inputs).logits)
    forward(pair.patched, inputs, policy=MIXES[0])


def test_official_placement_is_for_anyres_images(pair: Pair) -> None:
    inputs, policy = tiny.batch(pair.stock, ROWS[:1]), G(0.5, placement="official")
    layout = layouts(pair.stock, inputs)[0][0]
    if pair.stock.config.model_type == "llava_next":
        forward(pair.patched, inputs, policy=policy)
        rows = layout.crops[0] * layout.grid[0]
        kept = vtr.report(pair.patched).rows[0]
        forward(pair.patched, inputs, policy=replace(policy, placement="true"))
        true = vtr.report(pair.patched).rows[0]
        assert kept.vision_tokens[0] - true.vision_tokens[0] == rows - int(layout.newline.sum())
        assert kept.kept(0) == [] and {s for some in kept.sources(0) for s in some} == set(true.kept(0))
        return
    with pytest.raises(vtr.UnsupportedError, match="use placement='true'"):
        forward(pair.patched, inputs, policy=policy)
