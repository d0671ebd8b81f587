"""``vtr serve pocket``: 32 OpenAI requests at once, half of them malformed; each answered as it should be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

import httpx
import openai

import vtr
import vtr.pocket
from tests.serving.asked import Asked, mixed, references
from tests.serving.server import Server, ask, body, serving
from tests.serving.test_pocket import NEVER, POLICIES, PROCESSOR, QUESTIONS, SIZES

GOOD = mixed(POLICIES, SIZES, QUESTIONS, 16)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as made:
        yield made


def bad(**extra: Any) -> dict[str, Any]:
    made = body(Asked("what is there", ((1, 96, 96),), None))
    return {**made, "extra_body": {**made["extra_body"], **extra}}


MALFORMED: list[tuple[dict[str, Any], str]] = [
    (bad(vtr="nonsense:keep=3"), "unknown policy 'nonsense'"),
    (bad(vtr="m3:tokens=-1"), "at least 1 token"),
    (bad(vtr="m3:tokens=7"), "choose 144, 36, 9, 1"),
    (bad(vtr=36), "must be a spec string"),
    (bad(vtr=["m3:tokens=9", "m3:tokens=36"]), "2 policies, but the request has 1 images"),
    (bad(vtr="fastv:keep=0.25,layer=2"), "globalcom2:retention=0.4"),
    (bad(vtr="pmod:weights=/etc"), "cannot name files"),
    (bad(vtr="globalcom2:retention=0.25"), 'budget="exact"'),
    (bad(mm_processor_kwargs={"do_resize": False}), "only 'vtr' is open"),
    (bad(media_io_kwargs={"image": {"mode": "L"}}), "not open to clients"),
]


def test_thirty_two_at_once_half_of_them_malformed(server: Server) -> None:
    asked = [item for pair in zip(map(body, GOOD), (MALFORMED * 2)[:16], strict=True) for item in pair]
    assert len(asked) == 32

    expected = references(vtr.pocket.WEIGHTS, GOOD, NEVER)
    requests = [one[0] if isinstance(one, tuple) else one for one in asked]
    answers = ask(server, requests)
    for got, wanted, request in zip(answers[::2], expected, GOOD, strict=True):
        assert not isinstance(got, Exception), (request, got)
        assert got.usage.prompt_tokens == wanted.length, request
        said = PROCESSOR.decode(wanted.tokens, skip_special_tokens=True)
        assert got.choices[0].message.content.split() == said.split(), request
    for got, (_, message) in zip(answers[1::2], asked[1::2], strict=True):
        assert isinstance(got, openai.APIStatusError) and 400 <= got.status_code < 500, (message, got)
        assert message in got.message, (message, got.message)
    again = ask(server, requests)  # the engine is alive, and says the same
    assert [a.choices[0].message.content for a in again[::2]] == [a.choices[0].message.content for a in answers[::2]]


def test_the_gate_alone_in_front_of_it(server: Server, tmp_path: Path) -> None:
    asked = Asked(QUESTIONS[0], ((2, 96, 96),), "m3:tokens=9")
    with serving(tmp_path, "--upstream", server.url) as gate:
        behind, through = (openai.OpenAI(base_url=s.url + "/v1", api_key="none", max_retries=0) for s in (server, gate))
        said = through.chat.completions.create(**body(asked))
        assert (
            said.choices[0].message.content == behind.chat.completions.create(**body(asked)).choices[0].message.content
        )
        parts = list(through.chat.completions.create(**body(asked), stream=True))
        assert len(parts) > 2
        assert "".join(p.choices[0].delta.content or "" for p in parts) == said.choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="unknown policy 'nonsense'"):
            through.chat.completions.create(**bad(vtr="nonsense"))
        text = gate.get("/metrics").text
        assert 'vtr_requests_refused_total{reason="policy"} 1.0' in text and "vllm:num_requests_running" in text


def test_health_and_metrics(server: Server) -> None:
    assert server.get("/health").status_code == 200
    text = server.get("/metrics").text
    saved = re.search(r'^vtr_vision_tokens_saved_total\{policy="m3"\} ([\d.e+]+)$', text, re.M)
    assert saved and float(saved[1]) > 0
    assert re.search(r'^vtr_vision_tokens_bucket\{le="36.0",policy="m3"\} ', text, re.M)
    assert re.search(r'^vtr_requests_refused_total\{reason="policy"\} ', text, re.M)
    assert "vllm:num_requests_running" in text


def test_other_paths_are_closed(server: Server) -> None:
    for path in ("/v1/responses", "/v1/embeddings", "/pooling"):
        got = httpx.post(server.url + path, json={}, timeout=30)
        assert got.status_code == 404 and "is not open here" in got.json()["error"]["message"]
