"""Positions of three axes as the plugin's classes give them to vLLM, beside vLLM's own; no engine runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vtr.integrations.vllm import positions, qwen
from vtr.integrations.vllm.specs import packed

from tests.serving.tiny_qwen import END, IMAGE, PATCH, START, VIDEO

CLASSES = [
    qwen.Qwen2VLForConditionalGeneration, qwen.Qwen2_5_VLForConditionalGeneration, qwen.Qwen3VLForConditionalGeneration,
]  # fmt: skip
SPEC, WORD = "pool:grid=2", 9
FRAMES, GRID = 3, (4, 6)
"""Of the film, in tokens."""


def model(cls: Any) -> Any:
    vision = SimpleNamespace(spatial_merge_size=2, patch_size=PATCH, tokens_per_second=1.0)
    made = cls.__new__(cls)
    made.__dict__["config"] = SimpleNamespace(
        vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END,
    )  # fmt: skip
    return made


def feature(modality: str, offset: int, grid: tuple[int, int, int], length: int, spec: str | None = None) -> Any:
    data = {f"{modality}_grid_thw": SimpleNamespace(data=torch.tensor(grid))}
    if spec is not None:
        data["vtr"] = SimpleNamespace(data=torch.tensor(list(packed(spec, length)), dtype=torch.uint8))
    return MultiModalFeatureSpec(
        data=data, modality=modality, identifier=f"{modality}{offset}", mm_position=PlaceholderRange(offset, length)
    )


def prompt(film: bool, reduced: bool) -> tuple[list[int], list[Any], list[int]]:
    """Tokens, features, and which tokens are those of the first picture: 8 × 6 tokens, with a policy 4."""
    tokens, features = [1, START], []
    first = 4 if reduced else 48
    features.append(feature("image", len(tokens), (1, 16, 12), first, SPEC if reduced else None))
    own = list(range(len(tokens), len(tokens) + first))
    tokens += [*[IMAGE] * first, END, WORD, START]
    features.append(feature("image", len(tokens), (1, 8, 8), 16, "none"))
    tokens += [*[IMAGE] * 16, END, WORD]
    if film:
        each = GRID[0] * GRID[1]
        begin = len(tokens)
        for _ in range(FRAMES):  # Qwen3-VL's way; the others have one run
            tokens += [WORD, START, *[VIDEO] * each, END]
        features.append(feature("video", begin, (FRAMES, 2 * GRID[0], 2 * GRID[1]), len(tokens) - begin))
    return [*tokens, WORD, WORD], features, own


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("film", [False, True])
def test_nothing_but_the_picture_moves(cls: Any, film: bool) -> None:
    if film and cls is not CLASSES[2]:
        pytest.skip("their films are one run of tokens: see the next test")
    served = model(cls)
    tokens, features, own = prompt(film, reduced=False)
    whole, delta = served.get_mrope_input_positions(tokens, features)
    assert torch.equal(whole, super(qwen.Qwen, served).get_mrope_input_positions(tokens, features)[0])
    short, features, kept = prompt(film, reduced=True)
    for given in (features, features[::-1]):
        found, moved = served.get_mrope_input_positions(short, given)
        assert torch.equal(found[:, : own[0]], whole[:, : own[0]])
        assert torch.equal(found[:, kept[-1] + 1 :], whole[:, own[-1] + 1 :])
        answer = positions.chosen(SPEC, served._of_grid((1, 16, 12)))
        assert answer[1] is not None
        for i, sources in enumerate(answer[1].sources):
            mean = whole[:, [own[s] for s in sources]].sum(1) // len(sources)
            assert torch.equal(found[:, kept[i]], mean)
        assert len(short) + moved == len(tokens) + delta  # where the first decoded token is


@pytest.mark.parametrize("cls", CLASSES[:2])
def test_a_film_behind_a_picture(cls: Any) -> None:
    served, runs = model(cls), FRAMES * GRID[0] * GRID[1]
    made = []
    for first, spec in ((48, None), (4, SPEC)):
        tokens = [1, *[IMAGE] * first, WORD, *[VIDEO] * runs, WORD]
        features = [
            feature("image", 1, (1, 16, 12), first, spec),
            feature("video", first + 2, (FRAMES, 2 * GRID[0], 2 * GRID[1]), runs),
        ]
        found, delta = served.get_mrope_input_positions(tokens, features)
        made.append((found[:, first + 1 :], len(tokens) + delta))
    assert torch.equal(made[0][0], made[1][0]) and made[0][1] == made[1][1]
