"""The gate alone, in front of a server: what goes on and comes back over real connections, and who waits for whom."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vtr.integrations.vllm import proxy as proxies
from vtr.integrations.vllm import timeouts
from vtr.integrations.vllm.proxy import proxy

from tests.integrations.gate_upstream import Gate, Upstream, get, post, read, until
from tests.integrations.test_gateway import chat

pytest.importorskip("starlette", reason="the gate alone needs starlette (extra: serve)")
pytest.importorskip("uvicorn", reason="the gate alone needs uvicorn (extra: serve)")
pytest.importorskip("prometheus_client", reason="the gate's metrics need prometheus_client (extra: serve)")
httpx = pytest.importorskip("httpx", reason="the gate alone needs httpx (extra: serve)")


@pytest.fixture
def both() -> Iterator[tuple[Upstream, Gate]]:
    """A server that takes 3 seconds for those who say "wait", and the gate in front of it."""
    upstream = Upstream(wait=3.0)
    gate = Gate(upstream.port)
    yield upstream, gate
    gate.stop()


def test_headers_go_on_as_they_came(both: tuple[Upstream, Gate]) -> None:
    upstream, gate = both
    odd = b"X-Title: caf\xc3\xa9\r\nX-Twice: 1\r\nX-Twice: 2\r\nConnection: x-named\r\nX-Named: 1\r\nTE: trailers\r\n"
    assert gate.send(post(b'{"model":"m"}', extra=odd))[0] == gate.send(get(b"/health", odd))[0] == 200
    for head, _ in upstream.seen:
        lines = head.lower().split(b"\r\n")
        assert b"x-title: caf\xc3\xa9" in lines and lines.index(b"x-twice: 1") + 1 == lines.index(b"x-twice: 2")
        assert not any(line.startswith((b"x-named", b"te:", b"cookie", b"user-agent")) for line in lines)
        assert b"host: 127.0.0.1:%d" % (upstream.port or 0) in lines


def test_answers_come_back_as_they_are() -> None:
    upstream = Upstream(
        extra=b"Set-Cookie: a=1; Path=/\r\nSet-Cookie: b=2, 3\r\nX-Odd: \xff\xc3\xa9\r\nKeep-Alive: 3\r\n"
    )
    gate = Gate(upstream.port)
    try:
        for _ in range(2):  # a client's cookies are not the next one's
            status, answer = gate.send(get(b"/v1/models"))
            lines = answer.split(b"\r\n")
            assert status == 200 and [line for line in lines if line.startswith(b"set-cookie")] == [
                b"set-cookie: a=1; Path=/", b"set-cookie: b=2, 3"]  # fmt: skip
            assert b"x-odd: \xff\xc3\xa9" in lines and not any(line.startswith(b"keep-alive") for line in lines)
        assert not any(b"cookie" in head.lower() for head, _ in upstream.seen)
    finally:
        gate.stop()


@pytest.mark.parametrize("host", [b"x/sleep?a=", b"x/v1/load_lora_adapter#", b"u@x", b"x\\y"])
def test_no_host_header_opens_a_path(both: tuple[Upstream, Gate], host: bytes) -> None:
    upstream, gate = both
    assert gate.send(post(b"{}", host=host))[0] == 400 and gate.send(get(b"/health", host=host))[0] == 400
    assert upstream.seen == []


def test_the_path_that_was_compared_goes_on(both: tuple[Upstream, Gate]) -> None:
    upstream, gate = both
    assert gate.send(post(b"{}", b"/v1%2Fchat/%63ompletions?a=%2F&b=c?d"))[0] == 200
    assert upstream.seen[0][0].startswith(b"POST /v1/chat/completions?a=%2F&b=c?d HTTP/1.1\r\n")
    for path in (b"//v1/chat/completions", b"/v1/chat/completions/", b"/v1/chat/completions%00", b"/sleep"):
        assert gate.send(post(b"{}", path))[0] == 404
    for path in (b"/v1/../sleep", b"/v1/%2e%2e/sleep", b"http://127.0.0.1/sleep", b"x"):
        assert gate.send(post(b"{}", path))[0] == gate.send(get(path))[0] == 400
    assert len(upstream.seen) == 1


ODD = [
    b"//x/y", b"/a%00b", b"/a%1fb", b"/a%0ab", b"/%ff", b"/%zz", b"/a;b", b"/a#b", b"/a|b", b'/a"b', b"/a?b=%zz",
    b"/a?b?#c", b"/?" + b"a" * 3000, b"/a%20b", b"/a\\b", b"/:8000", b"/@x", b"/a?\x7f",
]  # fmt: skip


@pytest.mark.parametrize("path", ODD, ids=str)
def test_odd_paths_are_no_errors_of_the_gate(both: tuple[Upstream, Gate], path: bytes) -> None:
    assert both[1].send(get(path))[0] in (200, 400)


def test_many_may_wait_and_health_is_answered_at_once(both: tuple[Upstream, Gate]) -> None:
    upstream, gate = both
    waiting = [gate.connect(post(b'{"model":"wait"}')) for _ in range(150)]
    until(lambda: upstream.here >= 150)
    start = time.monotonic()
    assert gate.send(get(b"/health"))[0] == gate.send(get(b"/metrics"))[0] == 200
    assert time.monotonic() - start < 2.5  # the others take 3 seconds
    assert [read(client)[0] for client in waiting] == [200] * 150


def test_a_full_gate_answers_503_and_health() -> None:
    upstream = Upstream(wait=3.0)
    gate = Gate(upstream.port)
    gate.gateway.most = 4
    try:
        waiting = [gate.connect(post(b'{"model":"wait"}')) for _ in range(4)]
        until(lambda: upstream.here == 4)
        status, answer = gate.send(post(b"{}"))
        assert status == 503 and b"retry-after: 1" in answer and gate.send(get(b"/health"))[0] == 200
        for client in waiting:
            client.close()
        until(lambda: gate.gateway.open == 0)
        assert gate.send(post(b"{}"))[0] == 200
    finally:
        gate.stop()


@pytest.mark.parametrize("how", [b"wait", b"stream"])
def test_a_client_that_goes_ends_its_request_upstream(both: tuple[Upstream, Gate], how: bytes) -> None:
    upstream, gate = both
    client = gate.connect(post(b'{"model":"%s"}' % how))
    until(lambda: upstream.seen)
    if how == b"stream":
        assert client.recv(1)
    client.close()
    until(lambda: upstream.gone == 1)
    until(lambda: gate.gateway.open == gate.gateway.held == 0)
    assert upstream.done == 0


def test_answers_that_break_off(both: tuple[Upstream, Gate]) -> None:
    _, gate = both
    assert gate.send(post(b'{"model":"garbage"}'))[0] == 502
    status, answer = gate.send(post(b'{"model":"break"}'))
    assert status == 200 and b"content-length: 100" in answer and answer.endswith(b"half of it")
    until(lambda: gate.gateway.open == 0)
    assert gate.send(post(b"{}"))[0] == 200


def test_answers_in_other_forms_than_the_usual_one(both: tuple[Upstream, Gate]) -> None:
    upstream, gate = both
    upstream.wait = 0.2
    status, answer = gate.send(post(b'{"model":"stream"}'))
    assert status == 200 and answer.count(b"part ") == 4
    status, answer = gate.send(post(b'{"model":"early hint"}'))
    assert status == 200 and answer.endswith(b'{"ok":true}') and b"103" not in answer
    status, answer = gate.send(get(b"/v1/models").replace(b"GET", b"HEAD"))
    assert status == 200 and b"content-length: 11" in answer and answer.endswith(b"\r\n\r\n")
    assert gate.send(post(b'{"model":"half a head"}'))[0] == 502


def test_an_answer_that_comes_before_the_body_was_taken(both: tuple[Upstream, Gate]) -> None:
    """More than the system holds of what is under way: a server that ends it has answered."""
    _, gate = both
    big = json.dumps({"model": "m", "x": "a" * 30_000_000, "y": "refuse"}).encode()
    status, answer = gate.send(post(big, extra=b"X-Refuse: 1\r\n"), timeout=60)
    assert (status, answer[-4:]) == (413, b"much") or status == 503  # the system may have dropped the answer
    assert gate.send(post(b"{}"))[0] == 200


def test_large_bodies_go_on_whole(both: tuple[Upstream, Gate]) -> None:
    upstream, gate = both
    body = {"model": "m", "x": ["a" * 5_000_000, "b", "c" * 3_000_000]}
    assert gate.send(post(json.dumps(body).encode()), timeout=60)[0] == 200
    assert json.loads(upstream.seen[-1][1]) == body


def test_an_upstream_that_takes_no_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "STALLED", 0.5)
    deaf = socket.socket()
    deaf.bind(("127.0.0.1", 0))
    deaf.listen()
    gate = Gate(deaf.getsockname()[1])
    try:
        assert gate.send(post(json.dumps({"x": "a" * 30_000_000}).encode()), timeout=60)[0] == 504
        until(lambda: gate.gateway.open == 0)
    finally:
        gate.stop()
        deaf.close()


def test_an_upstream_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "QUICK", 0.3)
    upstream = Upstream(wait=30.0)
    gate = Gate(upstream.port, timeout=0.3)
    try:
        assert gate.send(post(b'{"model":"wait"}'))[0] == 504
    finally:
        gate.stop()
    gate = Gate(1)  # nobody listens there
    try:
        status, answer = gate.send(post(b"{}"))
        assert status == 503 and b"does not answer" in answer and gate.send(get(b"/health"))[0] == 503
        assert gate.send(get(b"/metrics"))[0] == 200
    finally:
        gate.stop()


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-", get(b"/health")[:-2]])
def test_who_never_sends_a_request_is_let_go(
    both: tuple[Upstream, Gate], said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "HEAD_SECONDS", 0.2)
    with both[1].connect(said, timeout=10) as client:
        assert read(client) == (0, b"")


def test_the_pool_has_room_for_all_that_the_gate_lets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource", reason="no such limits here")
    for files, most in ((1024, 480), (10**6, 2048), (resource.RLIM_INFINITY, 2048), (10, 8)):
        monkeypatch.setattr(resource, "getrlimit", lambda what, files=files: (files, files))
        assert proxies.most_open() == most


def test_older_versions_of_starlette_are_not_installed() -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert "starlette>=1.3" in extras["serve"]


def test_the_proxy_passes_on_and_says_when_nobody_is_there() -> None:

    seen: list[Any] = []

    async def streamed() -> Any:
        yield b'{"said": '
        yield b'"so"}'

    def upstream(request: Any) -> Any:
        if request.url.path == "/health" and len(seen) > 1:
            raise httpx.ConnectError("nobody")
        seen.append((request.url.path, request.url.query, request.content))
        if request.url.path == "/metrics":
            return httpx.Response(200, text="vllm:theirs 1\n")
        return httpx.Response(200, content=streamed(), headers={"x-kept": "1"})

    async def both() -> list[Any]:
        app = proxy("http://upstream", 10, transport=httpx.MockTransport(upstream))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gate") as client:
            return [
                await client.post("/v1/chat/completions?a=1", json=chat(vtr="m3:tokens=9")),
                await client.get("/health"),
                await client.post("/v1/chat/completions", json=chat(vtr="nonsense")),
                await client.get("/health"),
                await client.get("/metrics"),
            ]

    good, health, bad, gone, metrics = asyncio.run(both())
    assert good.json() == {"said": "so"} and good.headers["x-kept"] == "1" and health.status_code == 200
    assert seen[0][:2] == ("/v1/chat/completions", b"a=1")
    assert json.loads(seen[0][2])["mm_processor_kwargs"] == {"vtr": "m3:tokens=9"}
    assert bad.status_code == 400 and gone.status_code == 503 and "vtr_requests_refused" in metrics.text
    assert metrics.text.startswith("vllm:theirs 1")
