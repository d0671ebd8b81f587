"""Random Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3, SmolVLM: served by vLLM they say what vtr on transformers says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

import torch

import vtr.pocket
from tests.serving import broken, tiny_idefics3, tiny_qwen
from tests.serving.asked import STEPS, Asked, PerImage, mixed, picture, reference, said_by, text_of
from tests.serving.engine import engine

SIZES = [(64, 64), (60, 96), (30, 70), (90, 100), (50, 50), (120, 90)]
QUESTIONS = ["what color is the circle", "how many are there", "which shape is red in the picture"]
LAST = 'by_image:default="pool:grid=2",last="none"'
BY_SIZE = [
    "uniform:keep=0.3,before_decoder=true", None, "pool:grid=2", "random:keep=7,before_decoder=true", "none",
    "pool:grid=[3,2]", "downsample:scale=0.7+pool:grid=2", "random:keep=0.5,before_decoder=true",
    "downsample:scale=0.8",
    "uniform:keep=7,before_decoder=true", "evs",
]  # fmt: skip
"""Tokens that stay follow from a picture's size."""
BY_SIGHT = ["divprune:keep=0.4", "cls:keep=5", "tome:keep=0.5", "m3:tokens=4", "m3:tokens=1"]
"""The others, which Qwen's positions forbid; and scales of a square tile."""
QWEN, TILED = list(tiny_qwen.NAMES), ["idefics3", "smolvlm"]
SQUARE, BOTH = (5, 64, 64), ((5, 64, 64), (6, 64, 64))
BESIDE = [
    Asked(QUESTIONS[0], BOTH, LAST),
    Asked(QUESTIONS[1], BOTH, LAST.replace("last", "first")),
    Asked(QUESTIONS[2], (SQUARE,), "m3:tokens=16"),
    Asked(QUESTIONS[0], BOTH, "m3:tokens=[16,4]"),
]

broken.register()


def greedy(never: Sequence[int]) -> dict[str, Any]:
    """How everybody is asked."""
    return {
        "temperature": 0, "max_tokens": STEPS, "min_tokens": STEPS, "ignore_eos": True, "logprobs": 0,
        "logit_bias": {i: -100.0 for i in never},
    }  # fmt: skip


@dataclass
class Served:
    """An engine beside what it is to agree with."""

    family: str
    llm: Any
    model: Any
    processor: Any
    never: list[int]

    def wanted(self, asked: Asked) -> Any:
        return reference(self.model, self.processor, asked, self.never)

    def said(self, several: Sequence[Asked]) -> Any:
        from vllm import SamplingParams

        given = SamplingParams(**greedy(self.never))
        prompts: list[Any] = [
            {
                "prompt": text_of(self.processor, one),
                "multi_modal_data": {"image": one.images()} if one.pictures else {},
                "mm_processor_kwargs": {} if one.policy is None or not one.pictures else {"vtr": one.policy},
            }
            for one in several
        ]
        return self.llm.generate(prompts, given, use_tqdm=False)

    def agrees(self, asked: Asked) -> bool:
        (out,) = self.said([asked])
        wanted = self.wanted(asked)
        return len(out.prompt_token_ids) == wanted.length and wanted.same(out.outputs[0])


@pytest.fixture(scope="module", params=[*QWEN, *TILED])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    family, folder = request.param, tmp_path_factory.mktemp("checkpoint") / request.param
    qwen = family in QWEN
    save = tiny_qwen.save_qwen if qwen else tiny_idefics3.save_idefics3
    model, processor = vtr.pocket.load(folder=save(family, folder))
    vtr.patch(model)
    never = tiny_qwen.NEVER if qwen else tiny_idefics3.NEVER
    with engine(folder, max_num_batched_tokens=128 if qwen else 200, max_model_len=2048) as llm:
        yield Served(family, llm, model, processor, never)


def test_forty_requests_in_one_run(served: Served) -> None:
    policies = (
        BY_SIZE if served.family in QWEN else [p for pair in zip(BY_SIZE, BY_SIGHT * 3, strict=False) for p in pair]
    )
    beside = BESIDE if served.family in QWEN else BESIDE[:2]
    asked = mixed(policies, SIZES, QUESTIONS, 40 - len(beside)) + beside
    expected = [served.wanted(one) for one in asked]
    for state in ("cold", "warm"):
        outs = served.said(asked)
        for i, (one, out, wanted) in enumerate(zip(asked, outs, expected, strict=True)):
            assert len(out.prompt_token_ids) == wanted.length, (state, i, one)
            assert wanted.same(out.outputs[0]), (state, i, one, wanted, out.outputs[0].token_ids)
    assert sum(out.num_cached_tokens for out in outs) > 0
    assert len({round(one.logprobs[0], 3) for one in expected}) >= 30  # they tell policies and pictures apart


@pytest.mark.parametrize("control", ["names", "positions"])
def test_without_this_answers_are_wrong(served: Served, monkeypatch: pytest.MonkeyPatch, control: str) -> None:
    """Negative controls: one name for a picture under two policies; tokens that stay at the first positions."""
    asked = Asked("what is there", ((18, 60, 96),) * 2, ["pool:grid=2", "uniform:keep=9,before_decoder=true"])
    if control == "names":
        monkeypatch.setattr("vtr.integrations.vllm.processor.identity", lambda image, spec: f"one name {image}")
    elif served.family in QWEN:
        asked = Asked("what is there", ((19, 60, 96),), "uniform:keep=9,before_decoder=true")
        monkeypatch.setattr("vtr.integrations.vllm.positions.carried", lambda answer, own: own[:, : len(answer[0])])
    else:
        pytest.skip("positions of one axis close up by themselves")
    assert not served.agrees(asked)
    monkeypatch.undo()
    served.llm.reset_prefix_cache()
    assert served.agrees(asked)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("test-liar", "promises 8 embeddings of this image and gives 9"),
        ("fastv:keep=0.25", "On Qwen-VL, Idefics3 and SmolVLM it is uniform:keep=0.625,before_decoder=true"),
        ("m3:tokens=7", "no scale of tiles"),
        ("pool:grid=99", "choose at most"),
        (["pool:grid=2", "none"], "one for each image"),
        ("fewer_crops", "has nothing to do before"),
        ('globalcom2:retention=0.25,budget="exact"', {"idefics3": "guides the crops", "qwen": "use uniform:keep=16,"}),
        (
            "divprune:keep=0.25",
            {"idefics3": None, "qwen": "depends on the picture.*use uniform:keep=16,before_decoder"},
        ),
        ("test-short", {"idefics3": None, "qwen": "promises 8 embeddings of this image and gives 7"}),
    ],
)
def test_what_cannot_be_served_never_reaches_the_engine(served: Served, policy: Any, message: Any) -> None:
    words = message if isinstance(message, str) else message["qwen" if served.family in QWEN else "idefics3"]
    if words is None:
        pytest.skip("served here")
    with pytest.raises(ValueError, match=words):
        served.said([Asked("what is there", (SQUARE,), policy)])
    assert served.said([Asked("what is there", (SQUARE,), "pool:grid=2")])[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("test-late", "vtr: test-late:keep=8 promised 8 embeddings of an image and gave 7"),
        ("test-elsewhere", "vtr: test-elsewhere:keep=8 chose other tokens of an image than those whose positions"),
    ],
)
def test_a_broken_promise_ends_that_request_alone(served: Served, policy: str, says: str) -> None:
    good, bad = Asked(QUESTIONS[0], (SQUARE,), "pool:grid=2"), Asked("what is there", (SQUARE,), policy)
    if policy == "test-elsewhere" and served.family not in QWEN:
        assert served.agrees(bad)  # positions of one axis fit any choice
        return
    for _ in range(2):  # the second time caches would hand out what the first one left
        outs = served.said([good, bad, good])
        assert [out.outputs[0].finish_reason for out in outs] == ["length", "error", "length"]
        assert outs[1].outputs[0].stop_reason.startswith(says)
        assert served.wanted(good).same(outs[2].outputs[0])


def test_embeddings_are_taken_whole_or_not_at_all(served: Served) -> None:
    """Qwen's, with their grid; Idefics3's are vLLM's to refuse."""
    from vllm import SamplingParams

    if served.family not in QWEN:
        pytest.skip("vLLM takes no embeddings for this model")
    one = Asked("what is there", (SQUARE,), None)
    inputs = served.processor(text=text_of(served.processor, one), images=one.images(), return_tensors="pt")
    given = served.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    features = given.pooler_output[0]
    if served.family == "qwen3_vl":
        features = torch.cat([features, *(level[0] for level in given.deepstack_features)], 1)
    data = {"image": {"image_embeds": features.detach(), "image_grid_thw": inputs["image_grid_thw"]}}
    prompt: Any = {"prompt": text_of(served.processor, one), "multi_modal_data": data}
    settings = SamplingParams(**greedy(served.never))
    (out,) = served.llm.generate([prompt], settings, use_tqdm=False)
    assert served.wanted(one).same(out.outputs[0])
    with pytest.raises(ValueError, match="send the picture"):
        served.llm.generate([{**prompt, "mm_processor_kwargs": {"vtr": "pool:grid=2"}}], settings, use_tqdm=False)


def test_a_video_beside_a_picture_is_left_as_it_is(served: Served) -> None:
    if served.family != "qwen2_vl":
        pytest.skip("the others take a film's times along; their positions are in test_qwen_positions.py")
    from vllm import SamplingParams

    film = np.stack([np.asarray(picture(seed, 32, 48)) for seed in (1, 1, 2, 2)])
    text = "<|vision_start|> <|image_pad|> <|vision_end|> how many <|vision_start|> <|video_pad|> <|vision_end|> what"
    image, policy = picture(*SQUARE), "pool:grid=2"
    inputs = served.processor(text=text, images=[image], videos=[film], do_sample_frames=False, return_tensors="pt")
    one = PerImage([vtr.policy(policy), None])
    wanted = said_by(served.model, inputs, one, served.never)
    prompt: Any = {
        "prompt": text,
        "multi_modal_data": {"image": [image], "video": [film]},
        "mm_processor_kwargs": {"vtr": policy},
    }
    (out,) = served.llm.generate([prompt], SamplingParams(**greedy(served.never)), use_tqdm=False)
    assert wanted.same(out.outputs[0])
    assert len(out.prompt_token_ids) == inputs["input_ids"].shape[1] - 64 + 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder"),
        ({"hf_overrides": {"vtr_default": "divprune:keep=0.5"}}, "name none, 'divprune:keep=0.5': which tokens"),
    ],
)
def test_settings_that_go_past_the_plugin_are_refused_at_start(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = tiny_qwen.save_qwen("qwen2_5_vl", tmp_path / "qwen2_5_vl")
    with pytest.raises(vtr.UnsupportedError, match=message), engine(folder, max_model_len=2048, **settings):
        pass
