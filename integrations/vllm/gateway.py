"""A gate in front of an OpenAI server: of all processor options a client may set ``vtr`` alone, and that is checked.

vLLM takes ``mm_processor_kwargs`` of requests only with ``--trust-request-mm-kwargs``, which opens every option of the
processor to every client. This gate closes all of them but ``vtr``, and all paths but those it knows. Plain ASGI: it
runs inside vLLM's server (``--middleware``, as ``vtr serve`` does) or in front of a proxy to one (:mod:`.proxy`).

What is behind the gate gets what was checked and nothing else: the body is written anew from what was read, the path is
the one that was compared. Bodies are read off the event loop, and everything a client can make grow has a bound.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from vtr.integrations.vllm import bodies, metrics
from vtr.integrations.vllm.inside.asked import divided
from vtr.integrations.vllm.specs import RequestError, read

from vtr.limits import short

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CHECKED = ("/v1/chat/completions", "/v1/completions")
"""Requests that may carry images; their bodies are read."""
PLAIN = ("/tokenize", "/detokenize")
ALWAYS = ("/health", "/metrics")
"""What is asked about the server itself: answered also when it is full."""
READING = ("GET", "HEAD", "OPTIONS")
OPTIONS, MEDIA, EXTRA, KEY = "mm_processor_kwargs", "media_io_kwargs", "vllm_xargs", "vtr"
IMAGES = ("image_url", "input_image", "image", "image_pil", "image_embeds")
LARGEST = 64 * 2**20
"""Bytes a request may have."""
MOST_OPEN = 2048
"""Requests under way at a time. One more is told to come again."""
MOST_HELD = 2**30
"""Bytes of bodies held at a time."""
PART_SECONDS, BODY_SECONDS = 10.0, 60.0
"""Within how long the next part of a body must come, and all of it."""
READERS = 2
"""Threads that read bodies, those that are not read at once. Each takes Python's lock from the event loop."""
LAYERS_ENV, INSIDE_ENV = "VTR_DECODER_LAYERS", "VTR_DECODER_POLICIES"
"""Where ``vtr serve`` puts the number of decoder layers and, for policies inside it, names of weights (JSON)."""
HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=\[\]:-]*")
"""What a Host header may be made of: nothing that begins a path, a query or a name before the host."""
REWRITTEN = (b"content-length", b"content-type", b"content-encoding", b"transfer-encoding", b"expect", b"trailer")
"""Headers that say how the client wrote its body."""


class Refused(Exception):
    """A request that is answered here, in few words. reason: a word for the metrics."""

    def __init__(self, reason: str, message: str, status: int = 400) -> None:
        super().__init__(short(message, 1000))
        self.reason, self.status = reason, status


def images_in(messages: Any) -> int:
    """How many images the messages of a chat hold."""
    if not isinstance(messages, list):
        return 0
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(
        isinstance(part, dict) and (part.get("type") in IMAGES or any(k in part for k in IMAGES)) for part in parts
    )


def checked(body: bytes | bytearray, depth: int, inside: Mapping[str, str] | None = None) -> bytes:
    """A request's body as the server gets it: ``vtr`` checked and moved to where vLLM looks for it.

    Args:
        depth: decoder layers. inside: the weights that policies inside the decoder may name, where these are served.

    Raises:
        Refused: no JSON object, an option that is not open to clients, or a policy that cannot be served.
    """
    try:
        request, taken = bodies.read(body)
    except bodies.TooLarge as error:
        raise Refused("size", f"the body has {error}", 413) from error
    except ValueError as error:
        raise Refused("json", f"the body is no JSON that is taken here: {error}") from error
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
        names = ", ".join(repr(short(name, 80)) for name in closed[:5])
        raise Refused("option", f"of {OPTIONS} only {KEY!r} is open to clients here, not {names}")
    extra = request.get(EXTRA)
    places = [where for where in (request, options, extra) if isinstance(where, dict)]
    asked = [where.pop(KEY) for where in places if KEY in where]
    asked = [one for one in asked if one is not None]
    if len(asked) > 1:
        raise Refused("policy", f"vtr is there twice: as a field of its own, in {OPTIONS} or in {EXTRA}; name it once")
    if asked:
        _place_policy(request, asked[0], depth, inside)
    try:
        return bodies.write(request, taken)
    except ValueError as error:
        raise Refused("json", "the body has a number larger than JSON's readers take") from error


def _place_policy(request: dict[str, Any], asked: Any, depth: int, inside: Mapping[str, str] | None) -> None:
    """Put what a request asks for to where vLLM looks for it; both places, so that no default of the server is added.

    Raises:
        Refused: a policy that cannot be served.
    """
    images = images_in(request.get("messages"))
    try:
        before, within = (asked, None) if inside is None else divided(asked, depth, inside)
        read(before, images if images or isinstance(before, list) else 1, depth)
    except RequestError as error:
        raise Refused("policy", str(error)) from error
    if not images:
        return
    request[OPTIONS] = {KEY: before}
    if within is not None:
        request[EXTRA] = {**(request.get(EXTRA) or {}), KEY: within}


class Gateway:
    """The gate as ASGI middleware.

    Args:
        app: what is behind it. depth: decoder layers of the model; None reads the environment, where ``vtr serve``
            puts it. most: requests under way at a time. inside: see :func:`checked`; read off the environment as well.
    """

    def __init__(
        self, app: App, depth: int | None = None, most: int = MOST_OPEN, inside: Mapping[str, str] | None = None
    ) -> None:
        self.app, self.most = app, most
        self.inside = inside
        if inside is None and depth is None and (names := os.environ.get(INSIDE_ENV)):
            self.inside = json.loads(names)
        self.depth = depth if depth is not None else int(os.environ.get(LAYERS_ENV, "32"))
        self.open, self.held = 0, 0
        self.turn = asyncio.Lock()
        self.readers = ThreadPoolExecutor(READERS, "vtr-gate")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": "vtr: not open here"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            _check_address(scope)
            if scope["method"] not in READING:
                _check_head(scope)
            elif scope["path"] in ALWAYS:
                return await self.app(scope, receive, send)
            with self._place() as held:
                raw = b"" if scope["method"] in READING else await self._body(receive, held)
                async with self.turn:  # who is ready goes on one by one; in between the loop turns to everybody else
                    await asyncio.sleep(0)
                if scope["method"] not in READING:
                    scope, receive = await self._checked(scope, receive, raw)
                await self.app(scope, receive, send)
        except Refused as refused:
            metrics.refused(refused.reason)
            if refused.reason != "disconnect":
                await _answer(send, refused)

    @contextmanager
    def _place(self) -> Iterator[list[int]]:
        """A place among the requests under way. Gives [bytes held by this one], to be added to."""
        if self.open >= self.most:
            raise Refused("busy", f"{self.open} requests are under way here: come again", 503)
        held = [0]
        self.open += 1
        try:
            yield held
        finally:
            self.open -= 1
            self.held -= held[0]

    async def _checked(self, scope: Scope, receive: Receive, raw: bytes | bytearray) -> tuple[Scope, Receive]:
        """The request as what is behind the gate gets it."""
        if bodies.quick(raw):
            body = checked(raw, self.depth, self.inside)
        else:
            body = await asyncio.get_running_loop().run_in_executor(self.readers, checked, raw, self.depth, self.inside)
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in REWRITTEN]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        passed = {**scope, "headers": headers, "raw_path": scope["path"].encode()}
        return passed, _once(body, receive)

    async def _body(self, receive: Receive, held: list[int]) -> bytearray:
        body, more = bytearray(), True
        end = asyncio.get_running_loop().time() + BODY_SECONDS
        while more:
            message = await _in_time(receive, end)
            if message["type"] == "http.disconnect":
                raise Refused("disconnect", "the client is gone")
            part = message.get("body", b"")
            body += part
            held[0] += len(part)
            self.held += len(part)
            if len(body) > LARGEST:
                raise Refused("size", f"a request has at most {LARGEST} bytes", 413)
            if self.held > MOST_HELD:
                raise Refused("busy", "too much is on its way here: come again", 503)
            more = message.get("more_body", False)
        return body


def _check_address(scope: Scope) -> None:
    """Raise unless everybody reads the same path and host off this request."""
    hosts = [value for name, value in scope["headers"] if name.lower() == b"host"]
    if len(hosts) > 1 or not all(HOST.fullmatch(host) for host in hosts):
        raise Refused("path", "send one Host header, a name or an address and perhaps a port")
    path = scope["path"]
    if not path.startswith("/") or {".", ".."} & set(path.split("/")):
        raise Refused("path", f"{short(path, 80)} is no path: it begins with / and has no . or .. in it")


def _check_head(scope: Scope) -> None:
    """Raise unless this is a request that may have a body, and says what it is."""
    path = scope["path"]
    if path not in (*CHECKED, *PLAIN):
        raise Refused("path", f"{short(path, 80)} is not open here: {', '.join((*CHECKED, *PLAIN))}", 404)
    if scope["method"] != "POST":
        raise Refused("path", f"{path} takes POST", 405)
    kinds = [
        value.split(b";")[0].strip().lower() for name, value in scope["headers"] if name.lower() == b"content-type"
    ]
    if set(kinds) != {b"application/json"}:
        raise Refused("json", "send JSON with the header content-type: application/json", 415)
    codings = [value.strip().lower() for name, value in scope["headers"] if name.lower() == b"content-encoding"]
    if set(codings) - {b"identity"}:
        raise Refused("json", "send the body as it is, without a content-encoding", 415)
    sizes = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
    if any(size.isdigit() and (len(size) > 15 or int(size) > LARGEST) for size in sizes):
        raise Refused("size", f"a request has at most {LARGEST} bytes", 413)


async def _in_time(receive: Receive, end: float) -> MutableMapping[str, Any]:
    """The next part of a body, if it comes before ``end`` (of the loop's clock) and soon."""
    try:
        async with asyncio.timeout_at(min(end, asyncio.get_running_loop().time() + PART_SECONDS)):
            return await receive()
    except TimeoutError:
        raise Refused("slow", "the body did not come in time", 408) from None


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
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    error = {"message": f"vtr: {refused}", "type": kind, "param": param, "code": refused.status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", b"1")] if refused.status == 503 else []
    headers += [(b"connection", b"close")] if refused.status == 408 else []
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
