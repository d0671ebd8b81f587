"""Policies inside the decoder of the pocket LLaVA-NeXT on vLLM say, token for token, what vtr on transformers says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

from transformers import AutoProcessor
from vtr.integrations.vllm.inside import engine_args
from vtr.integrations.vllm.inside.scheduler import HoldingScheduler

import vtr
import vtr.pocket
from tests.serving import inside
from tests.serving.asked import Asked, Said, mixed, reference, references
from tests.serving.engine import engine
from tests.serving.inside import FALLING, all_free, said, scheduler_of, worker_of

NEVER, DEPTH = [4], 10
WITHIN = [
    "fastv:keep=0.25,layer=2", f"gsearch:schedule={FALLING}", "pyramid:keeps=[0.5,0.25,0.125]", "pmod:weights=pocket",
    "dynamic-llava:weights=pocket", "fastv:keep=0.1,layer=1", f"gsearch:schedule={FALLING},queries=last-max",
    "pyramid:keeps=[0.5,0.25,0.125],positions=keep", "random:keep=0.3,layer=2,seed=3", "uniform:keep=0.25,layer=3",
    "fastv:keep=0.3,layer=9", "dart:keep=0.3,layer=3", "reroute:keeps=[0.4],layers=[4]", "test-halves",
    "m3:tokens=36+fastv:keep=0.5,layer=5",
]  # fmt: skip
POLICIES = [one for i, spec in enumerate(WITHIN) for one in ([spec] if i % 3 else [spec, "m3:tokens=36", None])]
SIZES = [(96, 96), (192, 130), (100, 190), (192, 192), (50, 200), (140, 110)]
QUESTIONS = ["what color is the circle", "how many shapes are pink", "what is in the picture"]
PROCESSOR = AutoProcessor.from_pretrained(vtr.pocket.WEIGHTS)
inside.register()


def _one_policy(asked: Asked) -> Asked:
    """A list of policies, one for each image, cannot act inside: its first one is taken."""
    policy = asked.policy[0] if isinstance(asked.policy, list) else asked.policy
    return Asked(asked.question, asked.pictures[:2], policy)


REQUESTS = [_one_policy(one) for one in mixed(POLICIES, SIZES, QUESTIONS, 50)]


@pytest.fixture(scope="module")
def expected() -> list[Said]:
    return references(vtr.pocket.WEIGHTS, REQUESTS, NEVER)


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    settings = {"max_num_batched_tokens": 1650, "max_model_len": 1600, "block_size": 32, "enable_prefix_caching": True}
    with engine(vtr.pocket.WEIGHTS, num_gpu_blocks_override=3000, **settings, **engine_args()) as made:
        yield made


def test_fifty_requests_in_one_run(llm: Any, expected: list[Said], monkeypatch: pytest.MonkeyPatch) -> None:
    stock, held_back = HoldingScheduler._try_schedule_encoder_inputs, 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal held_back
        made = stock(self, *args, **kwargs)
        held_back += made[1] == 0
        return made

    monkeypatch.setattr(HoldingScheduler, "_try_schedule_encoder_inputs", counted)
    for state in ("cold", "warm"):
        outs = said(llm, PROCESSOR, REQUESTS, DEPTH, NEVER)
        for i, (asked, out, wanted) in enumerate(zip(REQUESTS, outs, expected, strict=True)):
            assert len(out.prompt_token_ids) == wanted.length, (state, i, asked)
            assert wanted.same(out.outputs[0]), (state, i, asked, out.outputs[0].stop_reason)
            reduced = bool(asked.pictures) and asked.policy in WITHIN
            assert not (reduced and out.num_cached_tokens), (state, i, asked)
    assert sum(out.num_cached_tokens for out in outs) > 0  # the others read the prefix cache
    assert len(worker_of(llm).parts) == 5 and all_free(llm)
    assert held_back > 0  # some prompts had to wait for a step of their own
    assert 0 < worker_of(llm).steps["cut"] < worker_of(llm).steps["reduced"]


def test_they_act(expected: list[Said]) -> None:
    """Answers under policies inside are others than without."""
    within = [(one, e) for one, e in zip(REQUESTS, expected, strict=True) if one.policy in WITHIN and one.pictures]
    plain = references(vtr.pocket.WEIGHTS, [Asked(one.question, one.pictures, None) for one, _ in within], NEVER)
    apart = [
        max(abs(x - y) for x, y in zip(e.logprobs, p.logprobs, strict=True))
        for (_, e), p in zip(within, plain, strict=True)
    ]
    assert len(within) > 25 and sum(gap > 1e-2 for gap in apart) > 0.9 * len(within)


def _control() -> tuple[list[Asked], list[Said]]:
    """One picture and question under FastV, then without."""
    order = [Asked("what color is the circle", ((3, 192, 130),), spec) for spec in ("fastv:keep=0.1,layer=1", None)]
    return order, references(vtr.pocket.WEIGHTS, order, NEVER)


def test_the_prefix_cache_is_left_alone(llm: Any) -> None:
    asked, wanted = _control()
    for one, right in zip(asked, wanted, strict=True):
        assert right.same(said(llm, PROCESSOR, [one], DEPTH, NEVER)[0].outputs[0])


def test_written_to_the_prefix_cache_answers_would_be_wrong(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the manager's protection the next one reads what a policy has left."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vtr.integrations.vllm.inside.blocks import PartManager

    llm.reset_prefix_cache()
    asked, wanted = _control()
    monkeypatch.setattr(PartManager, "cache_blocks", FullAttentionManager.cache_blocks)
    monkeypatch.setattr(PartManager, "_held", lambda self, request, tokens: tokens)
    said(llm, PROCESSOR, asked[:1], DEPTH, NEVER)
    (out,) = said(llm, PROCESSOR, asked[1:], DEPTH, NEVER)
    assert out.num_cached_tokens > 100 and not wanted[1].same(out.outputs[0])
    monkeypatch.undo()
    llm.reset_prefix_cache()
    (out,) = said(llm, PROCESSOR, asked[1:], DEPTH, NEVER)
    assert wanted[1].same(out.outputs[0])


@pytest.mark.parametrize("policy", list(inside.SAYS))
def test_a_broken_policy_ends_its_own_requests_alone(llm: Any, expected: list[Said], policy: str) -> None:
    bad = Asked("what is there", ((9, 150, 96),), policy)
    outs = said(llm, PROCESSOR, [REQUESTS[0], bad, REQUESTS[1]], DEPTH, NEVER)
    assert [out.outputs[0].finish_reason for out in outs] == ["length", "error", "length"]
    assert outs[1].outputs[0].stop_reason == inside.SAYS[policy]
    assert expected[0].same(outs[0].outputs[0]) and expected[1].same(outs[2].outputs[0])
    assert all_free(llm)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("pmod:weights=/etc", {}, "cannot name files of the server: weights are one of"),
    ("gsearch:schedule=/etc/passwd", {}, "cannot name files"),
    ("gsearch:schedule=[1.0,0.5]", {}, "10"),
    ("fastv:keep=0.25,layer=99", {}, "layer"),
    ("nonsense", {}, "unknown policy"),
    ("zipvl", {}, "vLLM's kernels cannot"),
    ("occamtoken", {}, "before the decoder and inside it"),
    ("m3:tokens=36", {}, "acts before the decoder: name it in mm_processor_kwargs"),
    ("autoscale", {}, "tries answers"),
    ("fastv:keep=0.25", {"prompt_logprobs": 1}, "leave out prompt_logprobs"),
    ("dynamic-llava:weights=pocket-joint", {"max_tokens": 1590}, "must fit into one step"),
]


@pytest.mark.parametrize(("policy", "params", "message"), REFUSED)
def test_what_cannot_be_served_never_reaches_the_engine(
    llm: Any, expected: list[Said], policy: str, params: dict[str, Any], message: str
) -> None:
    from vllm import SamplingParams

    given, _ = inside.prompts(PROCESSOR, [Asked("what is there", ((9, 96, 96),), None)], DEPTH)
    sampling = SamplingParams(**{"max_tokens": 4, **params}, extra_args={"vtr": policy})
    with pytest.raises(ValueError, match=message):
        llm.generate(given, sampling, use_tqdm=False)
    asked = Asked("what is there", ((9, 96, 96),), "fastv:keep=0.25,layer=2")  # its picture was refused just now
    (out,) = said(llm, PROCESSOR, [asked], DEPTH, NEVER)
    assert out.outputs[0].finish_reason == "length" and all_free(llm)


def test_a_question_in_front_of_the_picture_is_refused(llm: Any) -> None:
    from vllm import SamplingParams

    given = {"prompt": "what is there <image>", "multi_modal_data": {"image": Asked("", ((1, 96, 96),), None).images()}}
    with pytest.raises(ValueError, match="no text stands behind the last image"):
        llm.generate([given], SamplingParams(max_tokens=2, extra_args={"vtr": "fastv:keep=0.25"}), use_tqdm=False)


def test_a_prompt_that_fits_into_no_step_is_refused(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llm.llm_engine.vllm_config.scheduler_config
    monkeypatch.setattr(config, "max_num_batched_tokens", 300)
    with pytest.raises(ValueError, match="a step has room for 292: compress before the decoder as well"):
        said(llm, PROCESSOR, [Asked("what is there", ((1, 192, 192),), "fastv:keep=0.25,layer=2")], DEPTH, NEVER)


def test_blocks_are_those_of_what_each_part_holds(llm: Any) -> None:
    """Of 750 tokens at 32 a block: 24 of all, then of what FastV leaves (and 12 tokens answered)."""
    pool, most = scheduler_of(llm).kv_cache_manager.block_pool, 0
    stock = scheduler_of(llm).schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        made = stock(*args, **kwargs)
        most = max(most, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        return made

    def blocks(tokens: int) -> int:
        return -(-tokens // 32)

    scheduler_of(llm).schedule = schedule
    try:
        for policy, keep in (("none", 1.0), ("fastv:keep=0.25,layer=2", 0.25), ("fastv:keep=0.1,layer=2", 0.1)):
            most = 0
            (out,) = said(llm, PROCESSOR, [Asked("what is there", ((2, 192, 192),), policy)], DEPTH, NEVER)
            prompt = len(out.prompt_token_ids)
            text = prompt - 744 if prompt > 744 else 0
            assert text, prompt
            deep = blocks(text + int(744 * keep) + 12)
            assert most <= blocks(prompt + 12) + 4 * deep and most >= blocks(prompt + 11) + 4 * (deep - 1), policy
    finally:
        scheduler_of(llm).schedule = stock


def test_a_default_and_how_to_switch_it_off() -> None:
    asked = [Asked("what is there", ((2, 192, 192),), None)] * 2
    model, processor = vtr.pocket.load()
    vtr.patch(model)
    default = "fastv:keep=0.25,layer=2"
    wanted = [
        reference(model, processor, Asked(asked[0].question, asked[0].pictures, s), NEVER) for s in (default, None)
    ]
    settings = {"max_num_batched_tokens": 1650, "max_model_len": 1600}
    with engine(vtr.pocket.WEIGHTS, **settings, **engine_args(parts=2, default=default)) as llm:
        from vllm import SamplingParams

        given, _ = inside.prompts(PROCESSOR, asked, DEPTH)
        common: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "min_tokens": 12, "ignore_eos": True}
        common |= {"logit_bias": {4: -100.0}, "logprobs": 0}
        params = [SamplingParams(**common), SamplingParams(**common, extra_args={"vtr": "none"})]
        outs = llm.generate(given, params, use_tqdm=False)
        assert all(right.same(out.outputs[0]) for right, out in zip(wanted, outs, strict=True))


@pytest.mark.parametrize(
    ("model", "steps", "blocks", "policies"),
    [
        (None, 70, 330, ["fastv:keep=0.25,layer=2", "pyramid:keeps=[0.5,0.25,0.125]", None, "pmod:weights=pocket"]),
        ("joint", 40, 200, ["dynamic-llava:weights=pocket-joint", "fastv:keep=0.25,layer=2"]),
    ],
)
def test_preempted_requests_are_computed_again(
    model: str | None, steps: int, blocks: int, policies: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtr.integrations.vllm.inside.step import Step

    monkeypatch.setattr("tests.serving.asked.STEPS", steps)
    asked = [Asked(QUESTIONS[0], ((i, 192, 130 + 10 * (i % 6)),), policies[i % len(policies)]) for i in range(12)]
    folder = vtr.pocket.WEIGHTS if model is None else vtr.pocket.MODELS[model]
    wanted = references(folder, asked, NEVER)
    again, forgotten, done = set[str](), 0, Step.done
    begun: dict[str, int] = {}

    def counted(self: Step) -> None:
        nonlocal forgotten
        done(self)
        for name, first, one in zip(self.names, self.begun, self.held, strict=True):
            if first:
                begun[name] = begun.get(name, 0) + 1
                again.update([name] if begun[name] > 1 and one is not None else [])
        forgotten += sum(int(said[-1]) for said in self.forgot.values())

    monkeypatch.setattr(Step, "done", counted)
    settings = {"max_num_batched_tokens": 1650, "max_model_len": 1000, "block_size": 32, "max_num_seqs": 12}
    with engine(folder, num_gpu_blocks_override=blocks, **settings, **engine_args()) as llm:
        outs = said(llm, PROCESSOR, asked, DEPTH, NEVER, steps)
        for one, out, right in zip(asked, outs, wanted, strict=True):
            assert right.same(out.outputs[0]), (one, out.outputs[0].stop_reason)
        assert again and all_free(llm)
    assert (forgotten > 0) == (model == "joint")
