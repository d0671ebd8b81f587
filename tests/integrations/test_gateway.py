"""The gate of ``vtr serve``: what passes, what is answered at the gate, and that nothing else reaches the server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from vtr.integrations.vllm import bodies, gateway
from vtr.integrations.vllm.gateway import Gateway, images_in

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
JSON = [(b"content-type", b"application/json")]


def chat(images: int = 1, **more: Any) -> dict[str, Any]:
    content = [IMAGE] * images + [{"type": "text", "text": "what is there"}]
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


class Server:
    """What is behind the gate: notes what comes, says 200."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive() if scope["method"] == "POST" else {"body": b""}
        length = dict(scope["headers"]).get(b"content-length")
        assert length is None or int(length) == len(message["body"])
        self.seen.append(json.loads(message["body"]) if message["body"] else scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def exchanged(
    gate: Gateway, body: bytes, step: int, path: str = "/v1/chat/completions", method: str = "POST", headers: Any = JSON
) -> list[Any]:
    """What ``gate`` sends to a request whose body comes in parts of ``step`` bytes."""
    sent: list[Any] = []
    parts = [body[at : at + step] for at in range(0, len(body), step)] or [b""]
    coming = [{"type": "http.request", "body": p, "more_body": at < len(parts) - 1} for at, p in enumerate(parts)]

    async def receive() -> Any:
        return coming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(gate({"type": "http", "method": method, "path": path, "headers": headers}, receive, send))
    return sent


def ask(
    body: Any, path: str = "/v1/chat/completions", method: str = "POST", headers: Any = JSON, parts: int = 1
) -> tuple[int, Any, list[Any]]:
    """(status, what was answered, what the server saw)."""
    server = Server()
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = exchanged(Gateway(server, depth=10), raw, max(len(raw) // parts, 1), path, method, headers)
    return sent[0]["status"], json.loads(sent[1]["body"]), server.seen


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize(
    ("asked", "passed"),
    [
        (chat(vtr="m3:tokens=36"), "m3:tokens=36"),
        (chat(mm_processor_kwargs={"vtr": "m3:tokens=36"}), "m3:tokens=36"),
        (chat(2, vtr=["m3:tokens=36", "none"]), ["m3:tokens=36", "none"]),
        (chat(vtr="none"), "none"),
        (chat(), None),
        (chat(vtr=None, mm_processor_kwargs={}), None),
        (chat(0, vtr="m3"), None),
        (chat(2, vtr="m3:tokens=[36,9]"), "m3:tokens=[36,9]"),
        ({"model": "m", "messages": [{"role": "user", "content": "hello"}]}, None),
    ],
)
def test_what_passes(asked: Any, passed: Any, parts: int) -> None:
    status, _, (seen,) = ask(asked, parts=parts)
    assert status == 200 and "vtr" not in seen
    assert seen.get("mm_processor_kwargs") == (None if passed is None else {"vtr": passed})
    assert {k: v for k, v in seen.items() if k != "mm_processor_kwargs"} == {
        k: v for k, v in asked.items() if k not in ("vtr", "mm_processor_kwargs")
    }


BAD: list[tuple[Any, str]] = [
    (b"{not json", "no JSON"),
    (b"[1, 2]", "must be a JSON object"),
    (chat(vtr="nonsense"), "unknown policy"),
    (chat(vtr="m3:tokens=-4"), "at least 1 token"),
    (chat(vtr=36), "must be a spec string"),
    (chat(2, vtr=["m3"]), "1 policies, but the request has 2 images"),
    (chat(vtr="fastv:keep=0.25"), "globalcom2:retention=0.4"),
    (chat(vtr="pmod:weights=/etc"), "cannot name files"),
    (chat(mm_processor_kwargs={"do_resize": False}), "only 'vtr' is open"),
    (chat(mm_processor_kwargs=["vtr"]), "must be an object"),
    (chat(media_io_kwargs={"image": {}}), "not open to clients"),
    (chat(vtr="m3", mm_processor_kwargs={"vtr": "m3"}), "name it once"),
    (b"\xff\xff", "no JSON"),
    (b'{"model": "m", "temperature": NaN}', "NaN is no number of JSON"),
    (b'{"model": "m", "temperature": -Infinity}', "-Infinity is no number"),
    (b'{"model": "m", "temperature": 1e999}', "larger than JSON's readers take"),
    (b'{"model": "m", "n": ' + b"9" * 5000 + b"}", "no JSON"),
    (b'{"a": ' * 200 + b"1" + b"}" * 200, "more than 100 deep"),
    (b"[" * 60000, "more than 100 deep"),
    (b"1", "must be a JSON object"),
    (chat(vtr="globalcom2:retention=1e999,budget=exact"), "above 0 and at most at 1"),
    (chat(vtr="autoscale:scales=[1e999,2]"), "tries answers"),
    (chat(vtr="dynamic-llava:heads=0"), "heads=0"),
    (chat(vtr="gsearch:schedule=[1.0],layers=20000000"), "this model has 10 decoder layers"),
    (chat(vtr=[["m3"]]), "a policy is a spec string"),
    (chat(vtr=["m3"] * 2000), "at most 1024"),
    (chat(vtr={"a": [[[[]]]]}), "must be a spec string"),
]


@pytest.mark.parametrize(("asked", "message"), BAD)
def test_what_is_refused_never_reaches_the_server(asked: Any, message: str) -> None:
    status, answer, seen = ask(asked)
    assert status == 400 and message in answer["error"]["message"] and answer["error"]["message"].startswith("vtr: ")
    assert answer["error"]["type"] == "invalid_request_error" and seen == []


def test_other_paths_and_methods() -> None:
    assert ask(b"", "/health", "GET") == (200, {}, ["/health"])
    for path in ("/v1/embeddings", "/inference/v1/generate", "/v1/responses", "/sleep", "/v1/load_lora_adapter"):
        status, answer, seen = ask(chat(), path)
        assert status == 404 and "is not open here" in answer["error"]["message"] and seen == []
    assert ask(chat(), method="PUT")[0] == 405
    assert ask(chat(), headers=[(b"content-type", b"text/plain")])[0] == 415
    assert ask({"prompt": "hello"}, "/tokenize")[0] == 200
    assert ask(chat(mm_processor_kwargs={"x": 1}), "/tokenize")[0] == 400


def test_websockets_are_closed() -> None:
    server, sent = Server(), []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Gateway(server, 10)({"type": "websocket", "path": "/v1/realtime"}, None, send))  # type: ignore[arg-type]
    assert server.seen == [] and sent[0]["type"] == "websocket.close"


def test_a_request_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "LARGEST", 100)
    assert ask(chat())[0] == 413 and ask(chat(), parts=5)[0] == 413


ECHOES: list[Any] = [
    chat(mm_processor_kwargs={"a" * 10**6: 1}),
    chat(mm_processor_kwargs={f"option-{i}": 1 for i in range(10**4)}),
    chat(vtr="x" * 10**6),
    chat(vtr="x" * 400),
    chat(vtr="m3:tokens=" + "1" * 400),
    chat(vtr="m3:" + ",".join(f"s{i}=1" for i in range(80))),
    chat(vtr=[{"a": "b" * 10**5}]),
    b"{" + b"x" * 10**5,
]


@pytest.mark.parametrize("asked", ECHOES)
def test_answers_echo_little(asked: Any) -> None:
    status, answer, seen = ask(asked)
    assert status == 400 and len(json.dumps(answer)) < 1500 and seen == []
    status, answer, _ = ask(chat(), "/" + "x" * 10**5)
    assert status == 404 and len(json.dumps(answer)) < 1500


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_what_was_read_is_what_goes_on(encoding: str) -> None:
    """Whatever the encoding, and whichever of two equal keys a reader takes: the server gets what was checked."""
    text = (
        '{"model": "é", "vtr": "nonsense", "vtr": "m3", "n": 1, "messages": [{"content": [{"type": "image"}]}], "n": 2}'
    )
    status, _, (seen,) = ask(text.encode(encoding), headers=[*JSON, (b"content-length", b"0"), (b"expect", b"x")])
    assert status == 200 and seen["model"] == "é" and seen["n"] == 2 and seen["mm_processor_kwargs"] == {"vtr": "m3"}


class Scope(Server):
    """Notes the scope."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope)
        await super().__call__(scope, receive, send)


def headers_of(headers: list[tuple[bytes, bytes]], **more: Any) -> tuple[int, Any]:
    """(status, the scope the server got)."""
    server, sent = Scope(), []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, **more}
    asyncio.run(Gateway(server, depth=10)(scope, receive, send))
    return sent[0]["status"], server.seen[0] if server.seen else None


def test_headers_say_what_the_new_body_is() -> None:
    told = [(b"Content-Type", b"Application/JSON; charset=utf-16"), (b"transfer-encoding", b"chunked"), (b"x", b"\xff")]
    status, scope = headers_of([*told, (b"content-length", b"1"), (b"content-length", b"2")])
    assert status == 200
    assert scope["headers"] == [(b"x", b"\xff"), (b"content-type", b"application/json"), (b"content-length", b"2")]
    assert headers_of([*JSON, (b"content-type", b"text/plain")])[0] == 415
    assert headers_of([*JSON, (b"content-encoding", b"gzip")])[0] == 415
    assert headers_of([*JSON, (b"content-length", b"9" * 20)])[0] == 413


@pytest.mark.parametrize("host", [b"x/sleep?a=", b"x?", b"x#y", b"user@x", b"x\\y", b"caf\xc3\xa9", b"a b"])
def test_a_host_that_another_reader_takes_for_a_path(host: bytes) -> None:
    status, scope = headers_of([*JSON, (b"host", host)])
    assert status == 400 and scope is None
    assert headers_of([*JSON, (b"host", b"a"), (b"host", b"b")])[0] == 400
    assert headers_of([*JSON, (b"host", b"[::1]:8000")])[0] == 200


def test_the_server_gets_the_path_that_was_compared() -> None:
    status, scope = headers_of(JSON, raw_path=b"/v1%2Fcompletions")
    assert status == 200 and scope["path"] == "/v1/completions" and scope["raw_path"] == b"/v1/completions"
    for path in (
        "/v1/completions/",
        "//v1/completions",
        "/V1/completions",
        "/v1/completions\n",
        "/v1/completions;a",
        "/é",
    ):
        assert headers_of(JSON, path=path)[0] == 404
    for path in ("/v1/../sleep", "/./v1/completions", "http://x/v1/completions", "*", "", "@x/v1/completions"):
        assert headers_of(JSON, path=path)[0] == headers_of([], path=path, method="GET")[0] == 400


def test_long_strings_are_put_back() -> None:
    """Of a large body pictures are taken out before it is read; the server gets them all the same."""
    pictures = ["data:image/png;base64," + letter * 10**5 for letter in "AB"]
    odd = ['"' * 10**5, "\\" * 70001, "é" * 10**5, "\n" * 70000, "]" * 10**5, ", " * 10**5, "x" * 2**16]
    asked = chat(2, vtr="m3", key={odd[4]: 1, "t" * 10**5: 2}, odd=odd, pictures=pictures * 2)
    for raw in (json.dumps(asked), json.dumps(asked, ensure_ascii=False), json.dumps(asked, indent=3)):
        status, _, (seen,) = ask(raw.encode(), parts=9)
        assert status == 200 and seen.pop("mm_processor_kwargs") == {"vtr": "m3"}
        assert seen == {name: value for name, value in asked.items() if name != "vtr"}


@pytest.mark.parametrize(
    "raw",
    [
        b'{"x": [' + b"[]," * 10**5 + b"1]}",
        b'{"x": [' + b'{"a":1},' * 10**5 + b"1]}",
        b'{"x": [' + b"1," * 10**6 + b"1]}",
        b'{"x": [' + b'"",' * 10**6 + b"1]}",
        b'{"x": "' + b"\\u00e9" * 10**6 + b'"}',
        b'{"x": 1.' + b"3" * 5 * 10**6 + b"}",
        b'{"x": ' + b" " * 5 * 10**6 + b"1}",
        json.dumps({"x": "a" * 10**5}).encode("utf-16"),
    ],
    ids=lambda raw: str(raw[:12]),
)
def test_what_costs_much_to_read_is_refused(raw: bytes) -> None:
    status, answer, seen = ask(raw, parts=5)
    assert status == 413 and answer["error"]["message"].startswith("vtr: the body has more than") and seen == []


@pytest.mark.parametrize(
    "raw", [b'{"x": "' + b"A" * 10**6, b'{"x"' + b'"A"' * 10**5 + b"}", b'"' * 10**5, b'\\"' * 10**5]
)
def test_large_bodies_that_are_no_json(raw: bytes) -> None:
    assert ask(raw)[0] == 400


def drive(gate: Gateway, *messages: Any) -> Any:
    """One request to ``gate``: (status or None, headers), after its messages nothing comes for ever."""
    sent: list[Any] = []

    async def one() -> Any:
        left = list(messages)

        async def receive() -> Any:
            return left.pop(0) if left else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": JSON}
        await gate(scope, receive, send)
        return (sent[0]["status"], dict(sent[0]["headers"])) if sent else (None, {})

    return one()


def test_slow_clients_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "PART_SECONDS", 0.05)
    gate, part = Gateway(Server(), 10), {"type": "http.request", "body": b"{", "more_body": True}
    status, headers = asyncio.run(drive(gate, part))
    assert status == 408 and headers[b"connection"] == b"close" and (gate.open, gate.held) == (0, 0)
    monkeypatch.setattr(gateway, "PART_SECONDS", 10.0)
    monkeypatch.setattr(gateway, "BODY_SECONDS", 0.05)
    assert asyncio.run(drive(gate, *[part] * 3))[0] == 408


def test_a_client_that_goes_while_it_sends_is_no_error() -> None:
    gate = Gateway(Server(), 10)
    assert asyncio.run(drive(gate, {"type": "http.disconnect"}))[0] is None and (gate.open, gate.held) == (0, 0)


def test_a_full_gate_says_so() -> None:
    go = asyncio.Event()

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def several() -> Any:
        gate, whole = Gateway(behind, 10, most=3), {"type": "http.request", "body": b"{}"}
        waiting = [asyncio.ensure_future(drive(gate, whole)) for _ in range(3)]
        await asyncio.sleep(0.2)
        refused = await drive(gate, whole)
        asked: dict[str, list[Any]] = {"/health": [], "/metrics": [], "/v1/models": []}
        for path, sent in asked.items():

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "GET", "path": path, "headers": []}
            await gate(scope, None, send)  # type: ignore[arg-type]
        go.set()
        done = await asyncio.gather(*waiting)
        return refused, {path: sent[0]["status"] for path, sent in asked.items()}, done, gate.open

    (status, headers), asked, done, left = asyncio.run(several())
    assert status == 503 and headers[b"retry-after"] == b"1"
    assert asked == {"/health": 200, "/metrics": 200, "/v1/models": 503}
    assert [one[0] for one in done] == [200] * 3 and left == 0


def test_bodies_on_their_way_have_a_bound_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MOST_HELD", 100)
    gate = Gateway(Server(), 10)
    status, headers = asyncio.run(drive(gate, {"type": "http.request", "body": b" " * 101}))
    assert status == 503 and b"retry-after" in headers and gate.held == 0


def test_images_are_counted() -> None:
    assert images_in(chat(3)["messages"]) == 3
    assert images_in([{"role": "user", "content": "text"}, {"role": "user", "content": [IMAGE, {"type": "text"}]}]) == 1
    assert images_in("nonsense") == images_in([1, {"content": [1]}]) == images_in([{"content": [{"type": []}]}]) == 0
    assert images_in([{"content": [{"image_pil": 1}, {"type": "image"}, {"image_url": {}, "type": "odd"}]}]) == 3


def test_refusals_are_counted() -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="prometheus_client is not installed here")

    def count() -> float:
        return prometheus.REGISTRY.get_sample_value("vtr_requests_refused_total", {"reason": "policy"}) or 0.0

    before = count()
    ask(chat(vtr="nonsense"))
    assert count() == before + 1


def test_health_does_not_wait_for_those_who_are_ready_to_go_on() -> None:
    """Two hundred requests come at once, and then /health: the loop comes to it before it has seen to all of them."""
    order: list[str] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        order.append(scope["path"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"model": "m"}', "more_body": False}

    async def all_at_once() -> None:
        gate = Gateway(behind, 32)
        post = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": JSON}
        get = {"type": "http", "method": "GET", "path": "/health", "headers": []}
        asked = [asyncio.create_task(gate(dict(post), receive, None)) for _ in range(200)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await gate(get, receive, None)  # type: ignore[arg-type]
        await asyncio.gather(*asked)

    asyncio.run(all_at_once())
    assert len(order) == 201 and order.index("/health") < 3


@pytest.mark.parametrize(
    "body, quick",
    [
        (b'{"x":"%s"}' % (b"a" * 200_000), True), (b'{"x":"%s"}' % (b"a" * 300_000), False),
        (b'{"x":[%s1]}' % (b"1," * 3000), False), (b'{"x":"%s"}' % (b"1," * 3000), True),
        (b"{%s1}" % (b'"",' * 100), False), (b'{"x":"\\"%s"}' % (b"[]," * 3000), False),
        (b"[]," * 3000, False), (b'"' + b"[]," * 3000, True), (b"", True), (b'{"x":"a\\n"}', True),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_read_at_once(body: bytes, quick: bool) -> None:
    """Only what cannot take long: few strings, and little outside of them."""
    assert bodies.quick(bytearray(body)) is quick


def test_a_mark_that_somebody_else_wrote_is_left_alone() -> None:
    forged = '"' + "0" * 32 + '-0"'
    said = {"a": "x" * 100_000, "b": json.loads(forged), "c": forged, "d": "y" * 100_000}
    request, taken = bodies.read(json.dumps(said).encode())
    assert json.loads(bodies.write(request, taken)) == said and len(taken.strings) == 2
