"""The gate of ``vtr serve``: what passes, what is answered at the gate, and that nothing else reaches the server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from vtr.integrations.vllm import gateway
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


def ask(
    body: Any, path: str = "/v1/chat/completions", method: str = "POST", headers: Any = JSON, parts: int = 1
) -> tuple[int, Any, list[Any]]:
    """(status, what was answered, what the server saw)."""
    server, sent = Server(), []
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    step = max(len(raw) // parts, 1)
    chunks = [raw[i : i + step] for i in range(0, len(raw), step)] or [b""]
    messages = [{"type": "http.request", "body": c, "more_body": i < len(chunks) - 1} for i, c in enumerate(chunks)]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(Gateway(server, depth=10)(scope, receive, send))
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


def test_images_are_counted() -> None:
    assert images_in(chat(3)["messages"]) == 3
    assert images_in([{"role": "user", "content": "text"}, {"role": "user", "content": [IMAGE, {"type": "text"}]}]) == 1
    assert images_in("nonsense") == images_in([1, {"content": [1]}]) == 0


def test_refusals_are_counted() -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="prometheus_client is not installed here")

    def count() -> float:
        return prometheus.REGISTRY.get_sample_value("vtr_requests_refused_total", {"reason": "policy"}) or 0.0

    before = count()
    ask(chat(vtr="nonsense"))
    assert count() == before + 1


def test_the_proxy_passes_on_and_says_when_nobody_is_there() -> None:
    pytest.importorskip("starlette", reason="the gate alone needs starlette (extra: serve)")
    httpx = pytest.importorskip("httpx", reason="the gate alone needs httpx (extra: serve)")
    pytest.importorskip("prometheus_client", reason="the gate's metrics need prometheus_client (extra: serve)")
    from vtr.integrations.vllm.proxy import proxy

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
