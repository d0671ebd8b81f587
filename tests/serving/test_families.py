"""Pocket InternVL, random LLaVA, LLaVA-OneVision, InternVL: served by vLLM they say what vtr on transformers says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

from transformers import AutoProcessor

from tests.serving.asked import STEPS, mixed, references, text_of
from tests.serving.engine import engine
from tests.serving.tiny_models import NEVER, save, save_pocket_internvl

SIZES = [(24, 24), (60, 25), (30, 70), (90, 100), (50, 50), (13, 90)]
QUESTIONS = ["what color is the circle", "how many are there", "which shape is red in the picture"]
POLICIES = [
    "m3:tokens=9", None, 'globalcom2:retention=0.4,budget="exact"', "cls:keep=5", "none", "pool:grid=2", "m3:tokens=1",
    "uniform:keep=0.3,before_decoder=true", "random:keep=7,before_decoder=true", "cls:keep=0.5",
]  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "pocket_internvl"])
def test_forty_requests_in_one_run(family: str, tmp_path: Path) -> None:
    from vllm import SamplingParams

    pocket = family == "pocket_internvl"
    folder = save_pocket_internvl(tmp_path / family) if pocket else save(family, tmp_path / family)
    never = [4] if pocket else NEVER  # tokens that stand for pictures
    processor = AutoProcessor.from_pretrained(folder)
    policies = [p for p in POLICIES if p != "m3:tokens=9" or family != "internvl"]  # 3 × 3 tokens a tile: 9 are all
    asked = mixed(policies, SIZES, QUESTIONS, 40)
    if family == "llava_onevision":  # of several pictures transformers takes one tile each, vLLM all crops
        asked = [one for one in asked if len(one.pictures) < 2] + mixed(policies, SIZES[::-1], QUESTIONS, 4)
        asked += [one for one in mixed(policies[::-1], SIZES, QUESTIONS, 16) if len(one.pictures) < 2]
    assert len(asked) >= 40
    expected = references(folder, asked, never)
    prompts: list[Any] = [
        {
            "prompt": text_of(processor, one),
            "multi_modal_data": {"image": one.images()} if one.pictures else {},
            "mm_processor_kwargs": {} if one.policy is None or not one.pictures else {"vtr": one.policy},
        }
        for one in asked
    ]
    given = SamplingParams(
        temperature=0, max_tokens=STEPS, min_tokens=STEPS, ignore_eos=True, logprobs=0,
        logit_bias={i: -100.0 for i in never},
    )  # fmt: skip
    with engine(folder, max_num_batched_tokens=512, max_model_len=2048) as llm:
        for state in ("cold", "warm"):
            outs = llm.generate(prompts, given, use_tqdm=False)
            for i, (one, out, wanted) in enumerate(zip(asked, outs, expected, strict=True)):
                assert len(out.prompt_token_ids) == wanted.length, (state, i, one)
                assert wanted.same(out.outputs[0]), (state, i, one, wanted, out.outputs[0].token_ids)


def test_features_that_vllm_would_not_take_are_refused(tmp_path: Path) -> None:
    folder = save_pocket_internvl(tmp_path / "whole", whole=True)
    with pytest.raises(ValueError, match="vision_feature_layer=-1"), engine(folder, max_model_len=2048):
        pass
