"""Videos as families show them to the text model: which tokens are of which frame, and every policy in one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import support, tiny
from tests.families import CLOSE, FAMILIES, OPEN, Inputs
from tests.support import Models
from tests.tiny import IMAGE, IMAGE_ID, PAD, PATCH, SIDE, VIDEO_ID
from vtr.engine.adapters import find_adapter
from vtr.engine.prompt import read_prompt

FRAMES = 4
HEIGHT, WIDTH = 4, 8
"""Of a Qwen video's frame, in patches."""
LABEL = [20, 21, 22, 23, 24, 25]
"""What stands before a frame that is an image of its own."""


def words(text: str) -> list[int]:
    return [8 + ord(c) - 97 for c in text]


def drifting(*shape: int, seed: int) -> Tensor:
    """[frames, …] random pixels: each frame is a little unlike the one before, the third one much."""
    made = torch.Generator().manual_seed(seed)
    steps = torch.randn(shape, generator=made)
    steps[1:] *= 0.3
    steps[2] *= 4
    return steps.cumsum(0)


def one(ids: list[int], **pixels: Tensor) -> Inputs:
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row), **pixels}


def onevision(models: Models, video: bool, text: str, seed: int) -> Inputs:
    if not video:
        return tiny.batch(models.stock, [["a", IMAGE, text]], seed=seed)
    pixels = drifting(FRAMES, 3, SIDE, SIDE, seed=seed)[None]
    return one([1, *words("a"), *[VIDEO_ID] * (FRAMES * 9 + 1), *words(text)], pixel_values_videos=pixels)


def qwen(models: Models, video: bool, text: str, seed: int) -> Inputs:
    frame = [VIDEO_ID if video else IMAGE_ID] * (HEIGHT * WIDTH // 4)
    apart = models.family.kind == "qwen3_vl"
    shown = [OPEN, *frame, CLOSE] * FRAMES if video and apart else [OPEN, *frame * (FRAMES if video else 1), CLOSE]
    out = one([1, *shown, *words(text)])
    kinds = (out["input_ids"] == IMAGE_ID).int() + 2 * (out["input_ids"] == VIDEO_ID).int()
    pixels = drifting(FRAMES, HEIGHT * WIDTH, 3 * 2 * PATCH**2, seed=seed)[: FRAMES if video else 1].flatten(0, 1)
    grid = torch.tensor([(FRAMES if video else 1, HEIGHT, WIDTH)])
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    return {**out, "mm_token_type_ids": kinds, **dict(zip(names, (pixels, grid), strict=True))}


def internvl(models: Models, video: bool, text: str, seed: int) -> Inputs:
    tile = [IMAGE_ID] * 9
    shown = [*LABEL, OPEN, *tile, CLOSE] * FRAMES if video else [OPEN, *tile, CLOSE]
    return one(
        [1, *shown, *words(text)], pixel_values=drifting(FRAMES, 3, SIDE, SIDE, seed=seed)[: None if video else 1]
    )


def smolvlm(models: Models, video: bool, text: str, seed: int) -> Inputs:
    """A picture is cut into two crops beside its whole; all rows have as many tiles, some of them padding."""
    tile = [IMAGE_ID] * 9
    shown = [*LABEL, OPEN, *tile] * FRAMES if video else [OPEN, *tile] * 3
    pixels = drifting(FRAMES, 3, SIDE, SIDE, seed=seed)
    if not video:
        pixels[3] = 0
    return one([1, *shown, CLOSE, *words(text)], pixel_values=pixels[None])


def llava(models: Models, video: bool, text: str, seed: int) -> Inputs:
    shown = [IMAGE] * (FRAMES if video else 1)
    row = tiny.batch(models.stock, [[*shown, text]])
    return {**row, "pixel_values": drifting(FRAMES, 3, SIDE, SIDE, seed=seed)[: len(shown)]}


@dataclass
class Way:
    """How a family shows a video, with a maker of rows; ``images``: how many images it is to the text model."""

    kind: str
    make: Callable[[Models, bool, str, int], Inputs]
    images: int
    settings: str = ""


WAYS = [
    Way("llava_onevision", onevision, 1),
    Way("qwen2_5_vl", qwen, 1),
    Way("qwen3_vl", qwen, FRAMES),
    Way("internvl", internvl, FRAMES),
    Way("smolvlm", smolvlm, FRAMES),
    Way("llava", llava, FRAMES, ",frames=images"),
]
TEMPORAL = ("evs", "vidcom2", "dycoke")


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way.kind)
def shown(request: pytest.FixtureRequest) -> tuple[Way, Models]:
    way = request.param
    return way, Models.from_family(next(family for family in FAMILIES if family.kind == way.kind))


def together(rows: list[Inputs]) -> Inputs:
    """Rows as one left-padded batch."""
    width, out = max(row["input_ids"].shape[1] for row in rows), {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row[name] for row in rows if name in row]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            fill = PAD if name == "input_ids" else 0
            parts = [torch.nn.functional.pad(p, (width - p.shape[1], 0), value=fill) for p in parts]
        out[name] = torch.cat(parts)
    return out


def test_frames_are_frames(shown: tuple[Way, Models]) -> None:
    """Layouts number the frames of each video; tokens inside the decoder say which frame they show."""
    way, models = shown
    rows = together([way.make(models, video, "what", i) for i, video in enumerate((True, False, True))])
    prompt = read_prompt(find_adapter(models.stock), models.stock, rows["input_ids"], rows["attention_mask"], rows)
    for layouts, video in zip(prompt.layouts, (True, False, True), strict=True):
        if not video or way.settings:
            assert all(layout.first_frame is None and int(layout.frame.max()) == -1 for layout in layouts)
            continue
        numbers = [layout.frame[layout.newline == 0] for layout in layouts]
        assert len(layouts) == way.images
        assert [int(first[0]) for first in numbers] == list(range(FRAMES))[: way.images]
        assert torch.cat(numbers).bincount().unique().numel() == 1 and len(torch.cat(numbers).unique()) == FRAMES
        small = [layout.shrunk(layout.grid[0]) for layout in layouts if layout.shrunk and layout.grid[0] == 3]
        assert [int(one.frame[0]) for one in small] == [int(first[0]) for first in numbers][: len(small)]


@pytest.mark.parametrize("spec", ["evs:0.5", "vidcom2:0.4", "dycoke:0.4"])
def test_all_frames_of_a_video_are_thinned_together(shown: tuple[Way, Models], spec: str) -> None:
    """What stays is what the policy chooses of the frames' features, whether they are one image or several."""
    way, models = shown
    inputs, policy = way.make(models, True, "what", 3), vtr.policy(spec + way.settings)
    with torch.no_grad():
        models.patched(**inputs, policy=policy)
        (row,) = vtr.report(models.patched).rows
        prompt = read_prompt(find_adapter(models.stock), models.stock, inputs["input_ids"], None, inputs)
        features = films(models, inputs)
    want = policy.choose(features)  # type: ignore[attr-defined]
    slots = torch.isin(inputs["input_ids"][0], torch.tensor([IMAGE_ID, VIDEO_ID])).nonzero()[:, 0]
    newline = torch.cat([layout.newline for layout in prompt.layouts[0]]).bool()
    patches = slots[~newline].view(FRAMES, -1)
    kept = torch.cat([*(patches[i][k] for i, k in enumerate(want)), slots[newline]]).sort().values
    assert row.kept(0) == kept.tolist()
    assert len(kept) < len(slots)


def films(models: Models, inputs: Inputs) -> Tensor:
    """[frames, n, hidden_size]: the features of a row's film, newline tokens left out."""
    model = models.stock.model
    if "video_grid_thw" in inputs:
        found = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    elif "pixel_values_videos" in inputs:
        found = [
            f[:-1] if len(f) % FRAMES else f
            for f in model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        ]
    else:
        found = model.get_image_features(inputs["pixel_values"]).pooler_output
    return torch.cat([f.flatten(0, -2) for f in found]).view(FRAMES, -1, found[0].shape[-1])


def test_every_policy_and_pictures_in_one_batch(shown: tuple[Way, Models]) -> None:
    """Rows with a video and with a picture, each under another policy: each is what it is alone."""
    way, models = shown
    rows, alone, policies = [], [], []
    chooses = {"autoscale"}  # before generate runs, and of pictures only
    for i, name in enumerate([*sorted(set(support.POLICIES) - chooses), "none", "none"]):
        video = i % 4 != 3 or name in TEMPORAL
        inputs = way.make(models, video, "whatwhowherehow"[i % 9 : i % 9 + 4], i)
        policy: Any = support.POLICIES[name](models, inputs, 0) if name != "none" else None
        if name in TEMPORAL:
            policy = vtr.policy(f"{name}:0.4{way.settings}")
        if policy is not None and find_adapter(models.stock).why_not(policy):
            continue
        with torch.no_grad():
            logits = models.patched(**inputs, policy=policy).logits[0]
        rows.append(inputs)
        alone.append((logits, vtr.report(models.patched).rows[0].vision_tokens))
        policies.append(policy)
    batch = together(rows)
    with torch.no_grad():
        logits = models.patched(**batch, policy=policies).logits
    for b, (want, counts) in enumerate(alone):
        assert vtr.report(models.patched).rows[b].vision_tokens == counts
        torch.testing.assert_close(logits[b, -len(want) :], want, atol=3e-5, rtol=0)
    assert len(policies) > 30
