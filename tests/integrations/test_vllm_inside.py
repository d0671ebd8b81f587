"""Policies inside the decoder on vLLM, as far as no vLLM is needed: asked, promised, refused, put where they belong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from vtr.integrations.vllm import gateway
from vtr.integrations.vllm.inside import admission, engine_args
from vtr.integrations.vllm.inside.asked import Promise, divided, entering, resolved
from vtr.integrations.vllm.inside.options import SCHEDULER, Options, server_args, why_not
from vtr.integrations.vllm.inside.served import adds_up
from vtr.integrations.vllm.specs import RequestError

import vtr
from vtr.cli import app
from vtr.commands import serve
from vtr.engine.asked import Asked
from vtr.engine.scores import Queries

DEPTH = 10


@pytest.mark.parametrize(
    ("asked", "before", "inside"),
    [
        (None, None, "none"),
        ("none", "none", "none"),
        ("m3:tokens=36", "m3:tokens=36", "none"),
        (["m3:tokens=36", "none"], ["m3:tokens=36", "none"], "none"),
        ("fastv:keep=0.25,layer=2", "none", "fastv:keep=0.25,layer=2"),
        ("pool:grid=4 + fastv:keep=0.5", "pool:grid=4", "fastv:keep=0.5"),
        ("downsample:0.5+pool:grid=4+fastv", "downsample:scale=0.5+pool:grid=4", "fastv"),
        ("uniform:keep=0.25,before_decoder=true", "uniform:keep=0.25,before_decoder=true", "none"),
        ("uniform:keep=0.25,layer=2", "none", "uniform:keep=0.25,layer=2"),
        ("pmod:weights=pocket", "none", "pmod:weights=pocket"),
        ("pmod:pocket", "none", "pmod:weights=pocket"),
        ('by_image:default="m3:9",last="none"+fastv', 'by_image:default="m3:tokens=9",last="none"', "fastv"),
    ],
)
def test_a_request_is_divided(asked: Any, before: Any, inside: str) -> None:
    assert divided(asked, DEPTH) == (before, inside)
    if inside != "none":
        assert resolved(inside, {}).spec.startswith(inside.split(":")[0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("pmod:weights=/etc", "weights are one of pocket, "),
        ("pmod:/etc", "cannot name files"),
        ("gsearch:schedule=/etc/passwd", "cannot name files"),
        ("gsearch:schedule=[1.0,0.5]", "10"),
        ("fastv:keep=0.25,layer=10", "layer"),
        ("fastv:keep=-1", "keep"),
        ("fastv+gsearch:schedule=[1.0]", "both prune"),
        ("zipvl", "vLLM's kernels cannot"),
        ("ee-mllm", "vLLM's kernels cannot"),
        ("occamtoken", "before the decoder and inside it \\(prune\\)"),
        (["fastv:keep=0.25", "none"], "name one for the request"),
        ("chain:policies=[]", "cannot name files"),
        ("nonsense", "unknown policy"),
    ],
)
def test_what_cannot_be_asked_for(asked: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        divided(asked, DEPTH)


def test_weights_have_names() -> None:
    with pytest.raises(RequestError, match="weights are one of mine, pocket"):
        divided("pmod:weights=other", DEPTH, {"mine": "/nowhere"})
    with pytest.raises(RequestError, match="nowhere"):  # the server's own fault, but said
        resolved("pmod:weights=mine", {"mine": "/nowhere"})


@dataclass
class Threshold(vtr.Policy):
    """As many as score above a half: a count that depends on what the picture shows."""

    def needs(self, layer: int) -> Any:
        return "last" if layer == 2 else None

    def prune(self, layer: int, tokens: vtr.Tokens) -> torch.Tensor | None:
        return (tokens.scores > 0.5).nonzero()[:, 0] if layer == 2 else None


@pytest.mark.parametrize(
    ("policy", "sizes", "wanted"),
    [
        ("fastv:keep=0.25,layer=2", [100], [100, 100] + [25] * 8),
        ("pyramid:keeps=[0.5,0.25],layers=[2,5]", [100], [100, 100] + [50] * 3 + [25] * 5),
        ("dynamic-llava:weights=pocket", [100], None),
        ("pmod:weights=pocket", [100], None),
        ("fastv:keep=0.25,layer=2", [100, 60], [160, 160] + [42] * 8),  # and one for each image, rounded up and down
        ("avtp", [100, 60], [160] * 10),
    ],
)
def test_what_is_promised(policy: str, sizes: list[int], wanted: list[int] | None) -> None:
    made = vtr.policy(policy)
    found = entering(made, DEPTH, sizes)
    assert found == (made.entering(DEPTH, sum(sizes)) if wanted is None else wanted)


def test_what_depends_on_the_picture_promises_nothing() -> None:
    assert entering(Threshold(), DEPTH, [50]) == [50] * DEPTH
    assert entering(vtr.policy("sparsevlm"), DEPTH, [0]) == [0] * DEPTH


def test_what_parts_hold() -> None:
    promise = Promise("fastv", 100, (100, 100, 25, 25, 25, 25, 25, 25, 25, 25), False)
    assert promise.held([0, 2, 4, 6, 8]) == [100, 25, 25, 25, 25] and promise.held([0, 5]) == [100, 25]
    params = SimpleNamespace(extra_args={"vtr": json.loads(json.dumps(promise.as_args()))})
    assert Promise.of(params) == promise and Promise.of(SimpleNamespace(extra_args=None)) is None


def test_parts_divide_the_layers() -> None:
    assert Options().groups(32) == [0, 4, 8, 12, 16, 20, 24, 28] and Options().groups(28) == [*range(0, 28, 4)]
    assert Options().groups(31) == [0] and Options(parts=2).groups(10) == [0, 5]
    with pytest.raises(ValueError, match=r"parts=3: 10 decoder layers are divided evenly by 1, 2, 5, 10"):
        Options(parts=3).groups(10)


def config(**more: Any) -> Any:
    """A stand-in for an engine's config."""
    text = SimpleNamespace(num_hidden_layers=DEPTH, hidden_size=64, layer_types=None, sliding_window=None)
    hf_config = SimpleNamespace(
        architectures=["LlavaForConditionalGeneration"], get_text_config=lambda: text,
        vision_config=SimpleNamespace(deepstack_visual_indexes=more.pop("deepstack", None)),
    )  # fmt: skip
    made: dict[str, Any] = {
        "model_config": SimpleNamespace(hf_config=hf_config, uses_mrope=more.pop("mrope", False)),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1, decode_context_parallel_size=1),
        "compilation_config": SimpleNamespace(pass_config=SimpleNamespace()),
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "scheduler_config": SimpleNamespace(scheduler_cls=SCHEDULER, max_num_batched_tokens=400, max_num_seqs=8),
        "additional_config": engine_args()["additional_config"],
        "speculative_config": None, "kv_transfer_config": None, "lora_config": None, "use_v2_model_runner": False,
    }  # fmt: skip
    return SimpleNamespace(**{**made, **more})


def request(prompt: int = 120, image: int = 100, asked: Any = "fastv:keep=0.25,layer=2", **more: Any) -> Any:
    """A stand-in for what the frontend sends to the engine: an image behind ten words."""
    place = SimpleNamespace(offset=10, length=image, get_num_embeds=lambda: image)
    features = [SimpleNamespace(modality=more.pop("modality", "image"), mm_position=place)] if image else []
    given = {"extra_args": {"vtr": asked, "other": 1}, "prompt_logprobs": None, "max_tokens": 16}
    params = SimpleNamespace(**{**given, **more.pop("params", {})})
    made = {"sampling_params": params, "mm_features": features, "prompt_token_ids": [0] * prompt, **more}
    return SimpleNamespace(**made)


def test_an_admitted_request_carries_what_it_promises() -> None:
    one = request()
    admission.admit(config(), one)
    promise = Promise.of(one.sampling_params)
    assert promise is not None and promise.entering == (100, 100) + (25,) * 8 and not promise.forgets
    assert one.sampling_params.extra_args["other"] == 1


@pytest.mark.parametrize("asked", [None, "none", " None "])
def test_nothing_is_asked_for(asked: Any) -> None:
    one = request(asked=asked)
    admission.admit(config(), one)
    assert one.sampling_params.extra_args == {"other": 1}


def test_text_alone_is_left_alone_and_a_default_is_for_pictures() -> None:
    default = config(additional_config=engine_args(default="fastv:keep=0.5,layer=2")["additional_config"])
    for image, there in ((0, False), (100, True)):
        one = request(image=image)
        one.sampling_params.extra_args = None
        admission.admit(default, one)
        assert (Promise.of(one.sampling_params) is not None) == there
    one = request(asked="none")
    admission.admit(default, one)
    assert Promise.of(one.sampling_params) is None


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"additional_config": {}}, {}, "server started with --decoder-policies"),
    ({"speculative_config": 1}, {}, "without --speculative-config"),
    ({"kv_transfer_config": 1, "lora_config": 1}, {}, "without --kv-transfer-config and without --enable-lora"),
    ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2, decode_context_parallel_size=1)}, {}, "pipeline"),
    ({"use_v2_model_runner": True}, {}, "VLLM_USE_V2_MODEL_RUNNER=0"),
    ({"scheduler_config": SimpleNamespace(scheduler_cls=None)}, {}, "engine_args"),
    (
        {"scheduler_config": SimpleNamespace(scheduler_cls=SCHEDULER, async_scheduling=True)},
        {},
        "--no-async-scheduling",
    ),
    ({"mrope": True}, {"asked": "pyramid:positions=reindex"}, "pyramid:positions=keep"),
    ({"deepstack": [0, 1, 2]}, {}, "cut from layer 3 on"),
    ({}, {"prompt": 110}, "no text stands behind the last image"),
    ({}, {"prompt": 393}, "a step has room for 392"),
    ({}, {"modality": "video"}, "a request with video"),
    ({}, {"params": {"prompt_logprobs": 1}}, "leave out prompt_logprobs"),
    ({}, {"resumable": True}, "send it whole"),
    ({}, {"prompt_embeds": torch.zeros(1)}, "send text and pictures"),
    ({}, {"asked": "m3:tokens=36"}, "mm_processor_kwargs"),
    ({}, {"asked": 36}, "is a spec string"),
    ({}, {"asked": "pmod:weights=pocket"}, "this model has 64 and 10"),
]


@pytest.mark.parametrize(("engine", "asked", "message"), REFUSED)
def test_what_is_not_admitted(engine: dict[str, Any], asked: dict[str, Any], message: str) -> None:
    one = request(**dict(asked))
    with pytest.raises(RequestError, match=message):
        admission.admit(config(**dict(engine)), one)


def test_other_decoders_are_refused() -> None:
    other = config()
    other.model_config.hf_config.architectures = ["Idefics3ForConditionalGeneration"]
    assert "Idefics3ForConditionalGeneration they act before it" in str(why_not(other))
    windows = config()
    windows.model_config.hf_config.get_text_config().layer_types = ["sliding_attention"]
    assert "sliding windows" in str(why_not(windows)) and why_not(config()) is None


def test_which_scores_of_several_ranks_may_be_averaged() -> None:
    """The mean over heads may, also summed over tokens; a largest one may not, whatever it is the largest of."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    for strongest in (False, True):
        short = Queries((0,), one, None, one[0], 1, 0, strongest=strongest)
        assert adds_up(short) == (not strongest)
    for heads in ("mean", "max", "each"):
        for over in ("mean", "sum", "max", "each"):
            asked = Asked(vtr.Attention("text", heads, over), 0, (0,), (1,), one, None, one[0], (1,))
            assert adds_up(asked) == (heads == "mean" and over != "max")


# -- over HTTP ---------------------------------------------------------------------------------------------------------
def passed(inside: Any, **more: Any) -> dict[str, Any]:
    """What the gate makes of a chat with one image."""
    content = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "what is there"}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], **more}
    found: dict[str, Any] = json.loads(gateway.checked(json.dumps(body).encode(), DEPTH, inside))
    return found


@pytest.mark.parametrize(
    ("asked", "before", "within"),
    [
        ({"vtr": "fastv:keep=0.25"}, "none", "fastv:keep=0.25"),
        ({"vtr": "pool:grid=4+fastv:keep=0.5"}, "pool:grid=4", "fastv:keep=0.5"),
        ({"vtr": "m3:tokens=36"}, "m3:tokens=36", "none"),
        ({"vtr": "none"}, "none", "none"),
        ({"vllm_xargs": {"vtr": "fastv:keep=0.25", "x": 1}}, "none", "fastv:keep=0.25"),
        ({"vtr": "pmod:weights=mine"}, "none", "pmod:weights=mine"),
    ],
)
def test_the_gate_puts_each_part_where_it_belongs(
    asked: dict[str, Any], before: str, within: str, tmp_path: Path
) -> None:
    vtr.policy("pmod:weights=pocket").save_pretrained(tmp_path)
    found = passed({"mine": str(tmp_path)}, **asked)
    assert found["mm_processor_kwargs"] == {"vtr": before} and found["vllm_xargs"]["vtr"] == within
    assert "vtr" not in found and found["vllm_xargs"].get("x") == asked.get("vllm_xargs", {}).get("x")


def test_the_gate_of_a_plain_server_refuses_and_names_the_option() -> None:
    for asked in ({"vtr": "fastv:keep=0.25"}, {"vllm_xargs": {"vtr": "fastv:keep=0.25"}}):
        with pytest.raises(gateway.Refused, match=r"--decoder-policies.*globalcom2:retention=0\.4"):
            passed(None, **asked)
    assert "vllm_xargs" not in passed(None) and passed({}, vllm_xargs={"x": 1})["vllm_xargs"] == {"x": 1}
    with pytest.raises(gateway.Refused, match="name it once"):
        passed({}, vtr="fastv", vllm_xargs={"vtr": "fastv"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "5"], "add --decoder-policies"),
        (["--decoder-policies", "--weights", "b"], "write NAME=FOLDER"),
        (["--decoder-policies", "--weights", "a=/nowhere"], "there is no folder /nowhere"),
        (["--decoder-policies", "--parts", "3"], "10 decoder layers are divided evenly by 1, 2, 5, 10"),
        (["--decoder-policies", "--policy", "fastv:layer=77"], "layer=77"),
        (["--policy", "fastv:keep=0.25"], "--decoder-policies"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments: list[str], message: str) -> None:
    said = CliRunner().invoke(app, ["serve", "pocket", "--port", "18997", *arguments])
    assert said.exit_code == 1 and message in " ".join(said.output.split()).replace("│", "")


def test_the_command_line() -> None:
    made = server_args(5, {"mine": "/folder"}, "fastv:keep=0.25")
    command = serve.server_command("some/model", "h", 1, "m3:tokens=36", ["--more"], made)
    at = command.index("--additional-config")
    assert json.loads(command[at + 1]) == {
        "vtr": {"parts": 5, "weights": {"mine": "/folder"}, "default": "fastv:keep=0.25"}
    }
    assert command[command.index("--scheduler-cls") + 1] == SCHEDULER and command[-2:] == [
        "--no-async-scheduling",
        "--more",
    ]
    assert Options.of(SimpleNamespace(additional_config=json.loads(command[at + 1]))) == Options(
        5, {"mine": "/folder"}, "fastv:keep=0.25"
    )
    with pytest.raises(ValueError, match="takes parts, weights and default"):
        Options.of(SimpleNamespace(additional_config={"vtr": {"other": 1}}))
