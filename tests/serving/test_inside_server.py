"""``vtr serve --decoder-policies``: policies inside the decoder over HTTP, named with the gate and without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

import httpx
import openai

import vtr.pocket
from tests.serving.asked import STEPS, Asked, references
from tests.serving.inside import FALLING
from tests.serving.server import Server, ask, body, running
from tests.serving.test_pocket import NEVER, PROCESSOR, QUESTIONS

DEFAULT = "fastv:keep=0.5,layer=2"
POLICIES = [
    "fastv:keep=0.25,layer=2", f"gsearch:schedule={FALLING}", "none", "pyramid:keeps=[0.5,0.25,0.125]", "m3:tokens=36",
    "pmod:weights=pocket", "m3:tokens=36+fastv:keep=0.5,layer=5", None, "pmod:weights=mine",
]  # fmt: skip
GOOD = [Asked(QUESTIONS[i % 4], ((i, 192, 130 + 10 * (i % 6)),), POLICIES[i % len(POLICIES)]) for i in range(18)]
SMALL = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1500", "--max-num-seqs", "8"]
SMALL += ["--max-num-batched-tokens", "1600", "--limit-mm-per-prompt", '{"image": 3}', "--block-size", "32"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    vtr.policy("pmod:weights=pocket").save_pretrained(folder / "pmod")
    named = ["--decoder-policies", "--policy", DEFAULT, "--weights", f"mine={folder / 'pmod'}", "--parts", "5"]
    with running(folder, *named, "--", *SMALL) as made:
        yield made


def test_eighteen_at_once(server: Server) -> None:
    spec = {None: DEFAULT, "pmod:weights=mine": "pmod:weights=pocket"}
    wanted = references(
        vtr.pocket.WEIGHTS, [Asked(a.question, a.pictures, spec.get(a.policy, a.policy)) for a in GOOD], NEVER
    )  # fmt: skip
    for got, right, asked in zip(ask(server, [body(one) for one in GOOD]), wanted, GOOD, strict=True):
        assert not isinstance(got, Exception), (asked, got)
        said = PROCESSOR.decode(right.tokens, skip_special_tokens=True)
        assert got.choices[0].message.content.split() == said.split(), asked
        assert got.usage.prompt_tokens == right.length


def test_what_cannot_be_served_says_what_to_send(server: Server) -> None:
    one = ((1, 96, 96),)
    named: list[tuple[Any, str]] = [
        ("pmod:weights=/etc", "weights are one of mine, "),
        ("zipvl", "e.g. fastv:keep=0.25,layer=2"),
        ("occamtoken", "use two policies"),
        ("fastv:keep=0.25,layer=77", "layer=77"),
        (["fastv:keep=0.25"], "name one for the request"),
        ("fastv:keep=0.25+gsearch:schedule=[1.0]", "both prune"),
    ]
    for policy, message in named:
        (got,) = ask(server, [body(Asked("what is there", one, policy))])
        assert isinstance(got, openai.BadRequestError) and message in got.message, (policy, got)
    request = body(Asked("what is there", one, "fastv:keep=0.25"), logprobs=True)
    request["extra_body"]["prompt_logprobs"] = 1
    (got,) = ask(server, [request])
    assert isinstance(got, openai.BadRequestError) and "leave out prompt_logprobs" in got.message
    (got,) = ask(server, [body(Asked("what is there", one, "fastv:keep=0.25,layer=2"))])
    assert got.usage.prompt_tokens > 100 and server.get("/health").status_code == 200


def test_without_the_gate_in_vllm_xargs(server: Server) -> None:
    asked = GOOD[0]
    request = body(Asked(asked.question, asked.pictures, None))
    request["extra_body"]["vllm_xargs"] = {"vtr": asked.policy}
    (through,) = ask(server, [request])
    (named,) = ask(server, [body(asked)])
    assert through.choices[0].message.content == named.choices[0].message.content
    request["extra_body"]["vtr"] = asked.policy
    (got,) = ask(server, [request])
    assert isinstance(got, openai.BadRequestError) and "name it once" in got.message


def test_a_request_answers_as_vtr_run_does(server: Server, tmp_path: Path) -> None:
    """The same picture and question, the answer word for word."""
    asked, policy = GOOD[1], f"gsearch:schedule={FALLING}"
    picture = tmp_path / "picture.png"
    asked.images()[0].save(picture)
    command = [sys.executable, "-m", "vtr.cli", "run", str(picture), asked.question, "--policy", policy]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    request = body(Asked(asked.question, asked.pictures, policy))
    request["extra_body"] = {"vtr": policy, "add_special_tokens": True}
    (got,) = ask(server, [{**request, "max_tokens": 30}])
    assert got.choices[0].message.content.strip() in run.stdout and STEPS


def test_a_server_that_was_not_started_for_it_says_how(tmp_path: Path) -> None:
    with running(tmp_path, "--", *SMALL) as plain:
        request = body(Asked("what is there", ((1, 96, 96),), None))
        request["extra_body"]["vllm_xargs"] = {"vtr": "fastv:keep=0.25,layer=2"}
        (got,) = ask(plain, [request])
        assert isinstance(got, openai.BadRequestError) and "globalcom2:retention=0.4" in got.message
        raw = {**request, **request.pop("extra_body")}
        assert httpx.post(plain.url + "/v1/chat/completions", json=raw, timeout=60).status_code == 400
