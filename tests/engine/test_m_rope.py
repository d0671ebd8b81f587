"""Qwen2.5-VL and Qwen3-VL beyond the table of families: beams, videos, turns, steps by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests import oracle, support
from tests.engine.test_oracles import close
from tests.families import CLOSE, FAMILIES, OPEN, Inputs, QwenVL
from tests.support import ROWS, Models
from tests.tiny import PATCH, VIDEO_ID
from vtr.engine.midway import enter
from vtr.testing import tiny

KINDS = ["qwen2_5_vl", "qwen3_vl"]
FRAMES, HEIGHT, WIDTH = 3, 4, 6
"""Of a video, in patches (already two frames of the film each)."""


@pytest.fixture(scope="module", params=KINDS)
def models(request: pytest.FixtureRequest) -> Models:
    return Models.from_family(next(family for family in FAMILIES if family.kind == request.param))


def video(models: Models, before: str, after: str) -> Inputs:
    """A row with one video: Qwen2.5-VL's frames follow each other, Qwen3-VL's have text between them."""
    frame = [VIDEO_ID] * (HEIGHT * WIDTH // 4)
    apart = [OPEN, *frame, CLOSE] * FRAMES if models.family.kind == "qwen3_vl" else [OPEN, *frame * FRAMES, CLOSE]
    ids = torch.tensor([[1, *(8 + ord(c) - 97 for c in before), *apart, *(8 + ord(c) - 97 for c in after)]])
    made = torch.Generator().manual_seed(4)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO_ID).int() * 2,
        "pixel_values_videos": torch.randn(FRAMES * HEIGHT * WIDTH, 3 * 2 * PATCH**2, generator=made),
        "video_grid_thw": torch.tensor([(FRAMES, HEIGHT, WIDTH)]),
    }


def video_row(models: Models, inputs: Inputs) -> oracle.Row:
    model, ids = models.stock, inputs["input_ids"][0]
    embeds, vision = model.get_input_embeddings().weight[ids].detach().clone(), ids == VIDEO_ID
    with torch.no_grad():
        seen = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    embeds[vision] = torch.cat(seen.pooler_output)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )
    behind = tuple(torch.cat(level) for level in getattr(seen, "deepstack_features", None) or [])
    return oracle.Row(embeds, vision, positions[:, 0], behind)


@pytest.mark.parametrize("policy", [vtr.FastV(0.4), vtr.Pool(1), vtr.UniformGrid(0.3)])
def test_videos(models: Models, policy: Any) -> None:
    """Frames are tiles of one image, or an image each where text stands between them."""
    inputs = video(models, "ab", "what")
    (layouts,) = models.layouts(inputs)
    assert [layout.grid for layout in layouts] == [(2, 3)] * (FRAMES if models.family.kind == "qwen3_vl" else 1)
    assert sum(layout.tiles for layout in layouts) == FRAMES
    logits = models.family.logits(models.patched, inputs, policy=policy)[0]
    reported, row = vtr.report(models.patched).rows[0], video_row(models, inputs)
    if policy.asks("compress"):
        frame = HEIGHT * WIDTH // 4
        cells = [row.slots[at * frame : (at + 1) * frame] for at in range(FRAMES)]
        assert reported.sources(0) == cells
        brief = support.merged(row, cells) if models.family.kind == "qwen3_vl" else by_frames(row, cells)
        want = oracle.run(models.stock, brief)
        close(logits[~row.vision], want.logits[~brief.vision])
    else:
        kept = [reported.kept(layer) for layer in range(5)]
        close(logits, oracle.run(models.stock, row, oracle.rule(policy, kept), kept).logits)


def by_frames(row: oracle.Row, cells: list[list[int]]) -> oracle.Row:
    """Every frame's mean, the frames of a video standing next to each other."""
    before, after = list(range(cells[0][0])), list(range(cells[-1][-1] + 1, len(row.vision)))
    order = [[slot] for slot in before] + cells + [[slot] for slot in after]
    assert row.positions is not None
    return oracle.Row(
        torch.stack([row.embeds[some].mean(0) for some in order]),
        torch.tensor([len(some) > 1 for some in order]),
        torch.stack([row.positions[:, some].sum(1) // len(some) for some in order], 1),
    )


def test_a_row_has_the_same_beams_in_any_batch(models: Models) -> None:
    rows, search = [ROWS[0], ROWS[2]], {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    inputs, policies = models.family.batch(models.stock, rows), [vtr.Pool(2) + vtr.FastV(0.5), vtr.FastV(0.3)]
    together = tiny.generate(models.patched, inputs, policy=policies, **search)
    for b, policy in enumerate(policies):
        alone = models.family.single(models.stock, inputs, b)
        said = tiny.generate(models.patched, alone, policy=policy, **search)
        assert torch.equal(together[b * 2 : b * 2 + 2, -4:], said[:, -4:])


@pytest.mark.parametrize("policy", [vtr.FastV(0.3, on_continue="keep"), vtr.Pool(2)])
def test_a_second_turn_goes_on(models: Models, policy: Any) -> None:
    """Text behind an answer, on the ragged cache, equals the slow run of the whole conversation."""
    inputs = models.family.single(models.stock, models.inputs(), 0)
    first = tiny.generate(models.patched, inputs, policy=policy, max_new_tokens=3, return_dict_in_generate=True)
    reported = vtr.report(models.patched).rows[0]
    ids = torch.cat([first.sequences, torch.tensor([[9, 12, 15]])], 1)
    kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, 6).int()], 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    run = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    cache = first.past_key_values
    second = tiny.generate(models.patched, more, past_key_values=cache, policy=policy, **run)
    row = models.row(inputs, 0)
    kept = [reported.kept(layer) for layer in range(5)] if not policy.asks("compress") else None
    prompt = row if kept is not None else support.merged(row, reported.sources(0))
    new = models.stock.get_input_embeddings().weight[ids[0, len(row.vision) :]].detach()
    assert prompt.positions is not None
    at = torch.cat([prompt.positions, prompt.positions[:, -1:] + 1 + torch.arange(len(new))], 1)
    vision = torch.cat([prompt.vision, torch.zeros(len(new)).bool()])
    whole = oracle.Row(torch.cat([prompt.embeds, new]), vision, at, prompt.behind)
    want = oracle.run(models.stock, whole, None if kept is None else oracle.Given(kept))
    close(second.logits[0][0], want.logits[-1])


def test_stepping_by_hand(models: Models) -> None:
    """With positions as generate would give them."""
    inputs = models.family.single(models.stock, models.inputs(), 3)
    policy = vtr.FastV(0.3)
    want = tiny.generate(
        models.patched, inputs, policy=policy, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        out = models.patched(**inputs, policy=policy, use_cache=True)
        mask, width = inputs["attention_mask"], inputs["input_ids"].shape[1]
        for step, logits in enumerate(want.logits):
            close(out.logits[:, -1], logits)
            mask = torch.cat([mask, torch.ones(1, 1).long()], 1)
            after = {"input_ids": want.sequences[:, width + step, None], "attention_mask": mask}
            out = models.patched(**after, past_key_values=out.past_key_values, use_cache=True)


def test_a_prompt_run_in_pieces_is_the_prompt_run_whole(models: Models) -> None:
    """As a search for schedules runs it: stop before a layer, go on as other rows."""
    first, second = vtr.GSearch([1.0, 1.0, 0.5, 0.3, 0.1]), vtr.GSearch([1.0, 1.0, 0.8, 0.5, 0.4])
    inputs = models.family.single(models.stock, models.inputs(), 3)
    with torch.inference_mode():
        start = enter(models.patched, inputs, vtr.GSearch([1.0] * 5), inputs["input_ids"].shape[1])
        end = start.go([(0, first)], 2).go([(0, first), (0, second)], 5)
        got = models.patched.lm_head(end.last([2, 2]))
        want = [models.patched(**inputs, policy=p).logits[0, -2:] for p in (first, second)]
    close(got, torch.cat(want))


def test_pixels_need_their_grid(models: Models) -> None:
    inputs = models.inputs()
    del inputs["image_grid_thw"]
    with pytest.raises(ValueError, match="needs image_grid_thw beside pixel_values"):
        models.patched(**inputs, policy="fastv")


def test_sliding_windows_are_not_packed() -> None:
    """Policies that act inside are refused, with the way out; others run on the padded path."""
    model = next(f for f in FAMILIES if isinstance(f, QwenVL)).make()
    text = model.config.text_config
    text.use_sliding_window, text.sliding_window, text.layer_types = True, 8, ["sliding_attention"] * 5
    with pytest.raises(vtr.UnsupportedError, match="use_sliding_window=False"):
        vtr.patch(model, "fastv")
    assert vtr.patch(model, "divprune:keep=0.5").__dict__["_vtr"].path == "padded"


def test_gradients_flow_to_the_tower(models: Models) -> None:
    """Through packing, pooling and (Qwen3-VL) what is added behind the first layers."""
    inputs = models.family.single(models.stock, models.inputs(), 3)
    for policy in (vtr.Pool(2), vtr.FastV(0.5)):
        models.patched.zero_grad()
        models.patched(**inputs, policy=policy, use_cache=False).logits[0, -1].square().sum().backward()
        for weight in (models.patched.model.visual.patch_embed.proj.weight, models.patched.lm_head.weight):
            assert weight.grad is not None and bool(weight.grad.isfinite().all()) and bool(weight.grad.any())
    models.patched.zero_grad()
