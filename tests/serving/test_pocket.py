"""The pocket LLaVA-NeXT served by vLLM says, token for token, what vtr on transformers says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

from transformers import AutoProcessor

import vtr
from tests.serving import broken
from tests.serving.asked import STEPS, Asked, Said, mixed, reference, references, text_of
from tests.serving.engine import engine
from vtr.encode import encode

NEVER = [4]
POLICIES = [
    "m3:tokens=36", None, 'globalcom2:retention=0.3,budget="exact"', "uniform:keep=0.25,before_decoder=true",
    "cls:keep=20", "random:keep=0.2,seed=3,before_decoder=true", "m3:tokens=9", "pool:grid=4", "m3:tokens=1", "none",
    'globalcom2:retention=0.6,budget="exact",temperature=1.0', "cls:keep=0.4", "m3:tokens=144",
]  # fmt: skip
SIZES = [(96, 96), (192, 130), (100, 190), (192, 192), (50, 200), (140, 110)]
QUESTIONS = [
    "what color is the circle",
    "how many shapes are pink",
    "which letter is on the top",
    "what is in the picture",
]
PROCESSOR = AutoProcessor.from_pretrained(vtr.pocket.WEIGHTS)
REQUESTS = mixed(POLICIES, SIZES, QUESTIONS, 48)


GREEDY: dict[str, Any] = {
    "temperature": 0, "max_tokens": STEPS, "min_tokens": STEPS, "ignore_eos": True, "logit_bias": {4: -100.0},
    "logprobs": 0,
}  # fmt: skip


broken.register()


@pytest.fixture(scope="module")
def expected() -> list[Said]:
    return references(vtr.pocket.WEIGHTS, REQUESTS, NEVER)


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    with engine(vtr.pocket.WEIGHTS, max_num_batched_tokens=128) as made:  # images are longer: prefill is in chunks
        yield made


def prompt(asked: Asked) -> dict[str, Any]:
    made: dict[str, Any] = {"prompt": text_of(PROCESSOR, asked)}
    if asked.pictures:
        made["multi_modal_data"] = {"image": asked.images()}
        if asked.policy is not None:
            made["mm_processor_kwargs"] = {"vtr": asked.policy}
    return made


def said(llm: Any, asked: Sequence[Asked]) -> Any:
    from vllm import SamplingParams

    return llm.generate([prompt(one) for one in asked], SamplingParams(**GREEDY), use_tqdm=False)


def test_forty_eight_requests_in_one_run(llm: Any, expected: list[Said]) -> None:
    for state in ("cold", "warm"):
        outs = said(llm, REQUESTS)
        for i, (asked, out, wanted) in enumerate(zip(REQUESTS, outs, expected, strict=True)):
            assert len(out.prompt_token_ids) == wanted.length, (state, i, asked)
            assert wanted.same(out.outputs[0]), (state, i, asked)
    assert sum(out.num_cached_tokens for out in outs) > 0
    # the probabilities tell policies and pictures apart
    assert len({round(one.logprobs[0], 3) for one in expected}) >= 36


def test_the_same_picture_under_two_policies_is_two_pictures(llm: Any) -> None:
    one, policies = (7, 140, 110), ["m3:tokens=9", "m3:tokens=36"]
    several = [Asked("what is there", (one, one), order) for order in (policies, policies[::-1], policies)]
    model, processor = vtr.pocket.load()
    vtr.patch(model)
    for asked, out in zip(several, said(llm, several), strict=True):
        wanted = reference(model, processor, asked, NEVER)
        assert len(out.prompt_token_ids) == wanted.length and wanted.same(out.outputs[0])


def test_names_without_policies_would_mix_them(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of cache identity: one name for a picture under two policies, and the answer is a wrong one."""
    asked = Asked("what is there", ((8, 140, 110),) * 2, ["m3:tokens=9", "m3:tokens=36"])
    model, processor = vtr.pocket.load()
    vtr.patch(model)
    wanted = reference(model, processor, asked, NEVER)
    monkeypatch.setattr("vtr.integrations.vllm.processor.identity", lambda image, spec: f"one name {image}")
    (out,) = said(llm, [asked])
    assert len(out.prompt_token_ids) != wanted.length or not wanted.same(out.outputs[0])
    monkeypatch.undo()
    (out,) = said(llm, [asked])
    assert len(out.prompt_token_ids) == wanted.length and wanted.same(out.outputs[0])


@pytest.mark.parametrize("policy", list(broken.SAYS))
def test_a_broken_promise_ends_that_request_alone(llm: Any, expected: Any, policy: str) -> None:
    bad = Asked("what is there", ((9, 96, 96),), policy)
    for _ in range(2):  # the second time caches would hand out what the first one left
        outs = said(llm, [REQUESTS[0], bad, REQUESTS[2]])
        assert [out.outputs[0].finish_reason for out in outs] == ["length", "error", "length"]
        assert outs[1].outputs[0].stop_reason == broken.SAYS[policy]
        assert expected[0].same(outs[0].outputs[0]) and expected[2].same(outs[2].outputs[0])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("test-liar", "promises 8 embeddings of this image and gives 9"),
        ("fastv:keep=0.25", "globalcom2:retention=0.4"),
        ("m3:tokens=7", "choose 144, 36, 9, 1"),
        (["m3:tokens=9", "none"], "one for each image"),
        ("globalcom2:retention=0.25", "exact"),
    ],
)
def test_what_cannot_be_served_never_reaches_the_engine(llm: Any, policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        said(llm, [Asked("what is there", ((9, 96, 96),), policy)])
    assert said(llm, REQUESTS[:1])[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("policy", ["globalcom2:retention=0.3", "m3:tokens=9", "none"])
def test_embeddings_made_elsewhere(llm: Any, policy: str) -> None:
    """Any policy that compresses, also one whose count depends on the picture."""
    from vllm import SamplingParams

    model, processor = vtr.pocket.load()
    vtr.patch(model)
    asked = Asked("how many shapes are pink", ((3, 190, 120), (5, 100, 190)), policy)
    images = [encode(model, processor, image, policy) for image in asked.images()]
    given = {"prompt": text_of(PROCESSOR, asked), "multi_modal_data": {"image": images}}
    (out,) = llm.generate([given], SamplingParams(**GREEDY), use_tqdm=False)
    wanted = reference(model, processor, asked, NEVER)
    assert len(out.prompt_token_ids) == wanted.length and wanted.same(out.outputs[0])
    with pytest.raises(ValueError, match="reduce them before they are sent"):
        llm.generate([{**given, "mm_processor_kwargs": {"vtr": "m3:tokens=9"}}], SamplingParams(**GREEDY))
