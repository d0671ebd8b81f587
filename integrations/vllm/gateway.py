"""A gate in front of an OpenAI server: of all processor options a client may set ``vtr`` alone, and that is checked.

vLLM takes ``mm_processor_kwargs`` of requests only with ``--trust-request-mm-kwargs``, which opens every option of the
processor to every client. This gate closes all of them but ``vtr``, and all paths but those it knows. Plain ASGI: it
runs inside vLLM's server (``--middleware``, as ``vtr serve`` does) or in front of a proxy to one (:mod:`.proxy`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vtr.integrations.vllm import metrics
from vtr.integrations.vllm.specs import RequestError, read

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CHECKED = ("/v1/chat/completions", "/v1/completions")
"""Requests that may carry images; their bodies are read."""
PLAIN = ("/tokenize", "/detokenize")
OPTIONS, MEDIA, KEY = "mm_processor_kwargs", "media_io_kwargs", "vtr"
IMAGES = ("image_url", "input_image", "image", "image_pil", "image_embeds")
LARGEST = 64 * 2**20
"""Bytes a request may have."""
LAYERS_ENV = "VTR_DECODER_LAYERS"


class Refused(Exception):
    """A request that is answered here. reason: a word for the metrics."""

    def __init__(self, reason: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.reason, self.status = reason, status


def images_in(messages: Any) -> int:
    """How many images the messages of a chat hold."""
    if not isinstance(messages, list):
        return 0
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(isinstance(part, dict) and (part.get("type") in IMAGES or "image_url" in part) for part in parts)


def checked(body: bytes, depth: int) -> bytes:
    """A request's body as the server gets it: ``vtr`` checked and moved to where vLLM looks for it.

    Raises:
        Refused: no JSON object, an option that is not open to clients, or a policy that cannot be served.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused("json", f"the body is no JSON: {error}") from error
    if not isinstance(request, dict):
        raise Refused("json", f"the body must be a JSON object, got {type(request).__name__}")
    if request.pop(MEDIA, None):
        raise Refused("option", f"{MEDIA} is not open to clients here")
    given = request.pop(OPTIONS, None)
    if given is not None and not isinstance(given, dict):
        raise Refused(
            "option", f'{OPTIONS} must be an object like {{"vtr": "m3:tokens=36"}}, got {type(given).__name__}'
        )
    options = given or {}
    if closed := sorted(set(options) - {KEY}):
        raise Refused(
            "option", f"of {OPTIONS} only {KEY!r} is open to clients here, not {', '.join(map(repr, closed))}"
        )
    asked = [where[KEY] for where in (request, options) if where.get(KEY) is not None]
    request.pop(KEY, None)
    if len(asked) > 1:
        raise Refused("policy", f"vtr is there twice: as a field of its own and in {OPTIONS}; name it once")
    if asked:
        images = images_in(request.get("messages"))
        try:
            read(asked[0], images if isinstance(asked[0], list) else 1, depth)
        except RequestError as error:
            raise Refused("policy", str(error)) from error
        if images:
            request[OPTIONS] = {KEY: asked[0]}
    return json.dumps(request).encode()


class Gateway:
    """The gate as ASGI middleware.

    Args:
        app: what is behind it. depth: decoder layers of the model (for what is said of refused policies); None reads
            the environment, where ``vtr serve`` puts it.
    """

    def __init__(self, app: App, depth: int | None = None) -> None:
        self.app = app
        self.depth = depth if depth is not None else int(os.environ.get(LAYERS_ENV, "32"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": "vtr: not open here"})
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        try:
            path = scope["path"]
            if path not in (*CHECKED, *PLAIN):
                raise Refused("path", f"{path} is not open here: {', '.join((*CHECKED, *PLAIN))}", 404)
            if scope["method"] != "POST":
                raise Refused("path", f"{path} takes POST", 405)
            if not _says_json(scope):
                raise Refused("json", "send JSON with the header content-type: application/json", 415)
            body = checked(await _body(receive), self.depth)
        except Refused as refused:
            metrics.refused(refused.reason)
            return await _answer(send, refused)
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.app({**scope, "headers": headers}, _once(body, receive), send)


def _says_json(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    return bool(kinds) and kinds[0].split(b";")[0].strip().lower() == b"application/json"


async def _body(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused("disconnect", "the client is gone")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST:
            raise Refused("size", f"a request has at most {LARGEST} bytes", 413)
        more = message.get("more_body", False)
    return b"".join(parts)


def _once(body: bytes, receive: Receive) -> Receive:
    """The body, then whatever the server says of the connection (that the client is gone)."""
    left = [body]

    async def again() -> MutableMapping[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


async def _answer(send: Send, refused: Refused) -> None:
    param = KEY if refused.reason == "policy" else None
    error = {"message": f"vtr: {refused}", "type": "invalid_request_error", "param": param, "code": refused.status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
