"""A running server with policies that break their promise, and with a default for requests that name none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

import httpx
import openai

import vtr.pocket
from tests.serving import broken
from tests.serving.asked import Asked, references
from tests.serving.server import Server, ask, body, serving
from tests.serving.test_pocket import NEVER, PROCESSOR

ROOT = Path(__file__).parents[2]
DEFAULT = "m3:tokens=9"
PICTURE = ((9, 140, 110),)
GOOD = [Asked("what color is the circle", PICTURE, spec) for spec in ("m3:tokens=36", None, "none")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    plugin = tmp_path_factory.mktemp("plugin")  # as an installed distribution would look
    about = plugin / "broken-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nbroken = tests.serving.broken:register\n")
    path = os.pathsep.join([str(plugin), str(ROOT), os.environ.get("PYTHONPATH", "")])
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "--policy", DEFAULT, environment={"PYTHONPATH": path}) as made:
        yield made


def right(got: Any, wanted: Any) -> bool:
    said = PROCESSOR.decode(wanted.tokens, skip_special_tokens=True)
    return got.usage.prompt_tokens == wanted.length and got.choices[0].message.content.split() == said.split()


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    with_default = [Asked(one.question, one.pictures, one.policy or DEFAULT) for one in GOOD]
    return references(vtr.pocket.WEIGHTS, with_default, NEVER)


def test_the_servers_default_is_for_those_who_name_none(server: Server, expected: list[Any]) -> None:
    lengths = []
    for got, wanted in zip(ask(server, [body(one) for one in GOOD]), expected, strict=True):
        assert right(got, wanted)
        lengths.append(got.usage.prompt_tokens)
    assert lengths[1] < lengths[0] < lengths[2]


@pytest.mark.parametrize("policy", list(broken.SAYS))
def test_a_broken_promise_is_an_error_of_that_request_alone(server: Server, expected: list[Any], policy: str) -> None:
    bad = Asked("what is there", PICTURE, policy)  # the picture is the others' as well
    for _ in range(2):  # the second time caches would hand out what the first one left
        answers = ask(server, [body(one) for one in (GOOD[0], bad, GOOD[1], bad, GOOD[2])])
        for got, wanted in zip(answers[::2], expected, strict=True):
            assert right(got, wanted), got
        for got in answers[1::2]:
            assert isinstance(got, openai.InternalServerError) and got.status_code == 500, got
            assert got.body["message"] == broken.SAYS[policy]
    assert server.get("/health").status_code == 200
    assert right(ask(server, [body(GOOD[0])])[0], expected[0])


def test_a_stream_ends_with_the_same_error(server: Server) -> None:
    request = body(Asked("what is there", PICTURE, "test-short"), stream=True)
    request |= request.pop("extra_body")
    lines = httpx.post(server.url + "/v1/chat/completions", json=request, timeout=60).text.splitlines()
    events = [line for line in lines if line.startswith("data: ")]
    assert broken.SAYS["test-short"] in events[-2] and '"error"' in events[-2] and events[-1] == "data: [DONE]"


def test_one_that_lies_always_never_reaches_the_engine(server: Server) -> None:
    (got,) = ask(server, [body(Asked("what is there", PICTURE, "test-liar"))])
    assert isinstance(got, openai.BadRequestError) and "gives 9: the policy is broken" in got.message
