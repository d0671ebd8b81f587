"""Policies inside the decoders of random checkpoints on vLLM say what vtr on transformers says: family by family, with
heads spread over two ranks, and with compiled steps between those that cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

from transformers import AutoProcessor
from vtr.integrations.vllm.inside import engine_args

from tests.serving import tiny_models, tiny_qwen
from tests.serving.asked import Asked, references
from tests.serving.engine import engine
from tests.serving.inside import said, worker_of

SIZES = [(24, 24), (60, 25), (30, 70), (90, 100), (50, 50), (13, 90)]
QUESTIONS = ["what color is the circle", "how many are there", "which shape is red in the picture"]
KEEPING = [
    "fastv:keep=0.3,layer=2", "gsearch:schedule=[1.0,1.0,0.5,0.2]", "none",
    "pyramid:keeps=[0.5,0.25],layers=[2,3],positions=keep",
    "uniform:keep=0.3,layer=2", "pool:grid=2", "random:keep=0.4,layer=2,seed=3", "dart:keep=0.3,layer=2",
    "pool:grid=2+fastv:keep=0.5,layer=3", "reroute:keeps=[0.4],layers=[2]", "vtw:layer=2",
]  # fmt: skip
"""What leaves the first two layers alone: for models that add to them what their tower saw (DeepStack)."""
POLICIES = [
    *KEEPING, "sparsevlm", "fitprune", "fastv:keep=0.3,layer=1", "gsearch:schedule=[1.0,0.8,0.5,0.2],queries=last-max",
    "pyramid:keeps=[0.5,0.25],layers=[1,3],positions=reindex",
]  # fmt: skip
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
DEPTH = 4


def requests(family: str, n: int = 36) -> list[Asked]:
    """One request after the other; every fifth with two pictures, where vLLM cuts them as transformers does."""
    renumber = ("sparsevlm", POLICIES[-1])  # not where positions have several axes
    policies = KEEPING if family == "qwen3_vl" else POLICIES
    policies = [one for one in policies if family not in MROPE or one not in renumber]
    made = []
    for i in range(n):
        pictures = [
            (i % 4 + j, *SIZES[(i + j) % 6]) for j in range(2 if i % 5 == 4 and family != "llava_onevision" else 1)
        ]
        made.append(Asked(QUESTIONS[i % 3], tuple(pictures), policies[i % len(policies)]))
    return made


def check(family: str, folder: Path, asked: list[Asked], **settings: Any) -> dict[str, int] | None:
    """Raise unless the engine says what transformers says. Returns what its worker has counted, if it is in here."""
    never = tiny_qwen.NEVER if family in MROPE else tiny_models.NEVER
    (tiny_qwen.save_qwen if family in MROPE else tiny_models.save)(family, folder)
    processor, expected = AutoProcessor.from_pretrained(folder), references(folder, asked, never)
    plain = references(folder, [Asked(one.question, one.pictures, None) for one in asked], never)
    apart = [
        max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))
        for a, b in zip(expected, plain, strict=True)
    ]
    assert sum(gap > 1e-2 for gap in apart) > len(asked) / 2  # policies matter to these answers
    common = {"max_num_batched_tokens": 1024, "max_model_len": 1000, "block_size": 32}
    with engine(folder, **{**common, **settings}, **engine_args()) as llm:
        for state in ("cold", "warm"):
            outs = said(llm, processor, asked, DEPTH, never)
            for i, (one, out, wanted) in enumerate(zip(asked, outs, expected, strict=True)):
                assert wanted.same(out.outputs[0]), (state, i, one, out.outputs[0].stop_reason)
        return None if settings.get("tensor_parallel_size", 1) > 1 else worker_of(llm).steps


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", *MROPE])
def test_requests_in_one_run(family: str, tmp_path: Path) -> None:
    check(family, tmp_path / family, requests(family))


def test_heads_on_two_ranks(tmp_path: Path) -> None:
    """Scores are of all heads, wherever they are: means are added up, the strongest head is looked for everywhere."""
    check("llava", tmp_path / "llava", requests("llava", 24), tensor_parallel_size=2)


def test_steps_that_cut_nothing_run_compiled(tmp_path: Path) -> None:
    steps = check("llava", tmp_path / "llava", requests("llava", 24), enforce_eager=False)
    assert steps is not None and 0 < steps["cut"] < steps["reduced"]


def test_cuts_in_front_of_what_the_tower_adds_are_refused(tmp_path: Path) -> None:
    """Qwen3-VL adds what its tower saw behind the first layers (DeepStack), to all tokens."""
    folder = tiny_qwen.save_qwen("qwen3_vl", tmp_path / "qwen3_vl")
    processor, asked = (
        AutoProcessor.from_pretrained(folder),
        Asked(QUESTIONS[0], ((1, 50, 50),), "fastv:keep=0.3,layer=1"),
    )
    with engine(folder, max_num_batched_tokens=1024, max_model_len=1000, **engine_args()) as llm:
        with pytest.raises(ValueError, match=r"cut from layer 2 on, e\.g\. fastv:keep=0\.25,layer=2"):
            said(llm, processor, [asked], DEPTH, tiny_qwen.NEVER)
        renumbers = Asked(QUESTIONS[0], ((1, 50, 50),), "pyramid:keeps=[0.5,0.25],layers=[2,3],positions=reindex")
        with pytest.raises(ValueError, match="pyramid:positions=keep"):
            said(llm, processor, [renumbers], DEPTH, tiny_qwen.NEVER)
