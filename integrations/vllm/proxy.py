"""The gate in a process of its own, in front of a vLLM server somewhere else. Needs starlette and httpx."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from vtr.integrations.vllm.gateway import ALWAYS, MOST_OPEN, Gateway, Receive, Refused, Scope, Send
from vtr.integrations.vllm.metrics import REFUSED

logger = logging.getLogger(__name__)

DROPPED = {
    b"host", b"connection", b"transfer-encoding", b"content-length", b"keep-alive", b"te", b"trailer", b"upgrade",
    b"expect", b"proxy-connection", b"proxy-authorization", b"proxy-authenticate",
}  # fmt: skip
"""Headers of one connection, not of the request. What ``Connection`` names is dropped as well."""
CONNECT, QUICK, STALLED = 10.0, 5.0, 60.0
"""Seconds for a connection to the server, for its /health and /metrics, for a client to take a part of an answer."""
SPARE = 64
"""Files that are left to others than requests."""


def proxy(
    upstream: str, depth: int, timeout: float = 600.0, transport: Any = None, inside: Mapping[str, str] | None = None
) -> Gateway:
    """An ASGI app: the gate, and behind it everything is passed on to ``upstream``, streams as they come.

    ``/health`` is the upstream's (503 where it does not answer within 5 seconds); ``/metrics`` the upstream's, then the
    gate's. Both have connections of their own, and are answered however many requests wait. A request whose client has
    gone is ended upstream as well.

    Args:
        upstream: the server's address, e.g. ``http://127.0.0.1:8000``. timeout: seconds until the upstream must say
            something (more). transport: for tests, what httpx sends with. inside: see
            :func:`~vtr.integrations.vllm.gateway.checked`.
    """
    import httpx
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route, Router

    patient, quick = Upstream(upstream, timeout, transport), Upstream(upstream, QUICK, transport)

    async def passed_on(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health":
            return await _while_there(quick.answer(scope, b"", send), receive)
        body = b"" if scope["method"] != "POST" else (await receive())["body"]  # the gate's: whole, in one part
        await _while_there(patient.answer(scope, body, send), receive)

    async def metrics(request: Request) -> Response:
        from prometheus_client import REGISTRY, generate_latest

        try:
            theirs = await quick.text("/metrics")
        except (httpx.HTTPError, TimeoutError):
            theirs = ""
        ours = REGISTRY.restricted_registry([REFUSED])  # not what every process counts: theirs has that already
        return PlainTextResponse(theirs + generate_latest(ours).decode())

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        if transport is not None:
            await transport.aclose()

    routes = [Route("/metrics", metrics)]
    behind = Router(routes, redirect_slashes=False, default=passed_on, lifespan=lifespan)
    return Gateway(behind, depth, most_open(), inside)


def most_open() -> int:
    """Requests that may be under way here: each takes two files, and a process may have so many."""
    try:
        import resource
    except ImportError:  # no such limit here
        return MOST_OPEN
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if files == resource.RLIM_INFINITY else max(8, min(MOST_OPEN, (files - SPARE) // 2))


class Upstream:
    """Sends requests to a server as they came, and its answers back: as many at a time as are asked for."""

    def __init__(self, address: str, timeout: float, transport: Any) -> None:
        import httpx
        from vtr.integrations.vllm.wire import Direct

        self.address, self.base = address, httpx.URL(address)
        self.transport = transport or Direct(httpx.create_ssl_context())
        waits = {"connect": min(CONNECT, timeout), "read": timeout, "write": min(STALLED, timeout), "pool": None}
        self.extensions = {"timeout": waits}

    @asynccontextmanager
    async def sent(self, request: Any) -> AsyncIterator[Any]:
        """The answer to a request, over a connection of its own, closed at the end.

        No client, which would share cookies; no pool, which looks through all its connections at every request.
        """
        got = await self.transport.handle_async_request(request)
        try:
            yield got
        finally:
            await got.aclose()

    def request(self, scope: Scope, body: bytes) -> Any:
        """What is sent for the request of ``scope``: its path, as the gate saw it, its query and its headers.

        Raises:
            Refused: it cannot be sent.
        """
        import httpx

        path = self.base.raw_path.partition(b"?")[0].rstrip(b"/") + _quoted(scope["path"].encode("utf-8", "replace"))
        query = scope.get("query_string", b"")
        target = path + (b"?" + _quoted(query, "?") if query else b"")
        headers = kept(scope["headers"])
        try:
            url = self.base.copy_with(raw_path=target)
            return httpx.Request(scope["method"], url, headers=headers, content=body, extensions=self.extensions)
        except (httpx.InvalidURL, ValueError) as error:
            raise Refused("path", f"this request cannot be passed on: {error}") from error

    async def answer(self, scope: Scope, body: bytes, send: Send) -> None:
        """Send the request of ``scope``, and to ``send`` whatever comes back, part by part.

        Raises:
            Refused: there is no answer.
        """
        import httpx

        begun = False
        try:
            async with self.sent(self.request(scope, body)) as got:
                headers = [(name.lower(), value) for name, value in kept(got.headers.raw, (b"content-length",))]
                begun = True
                await send({"type": "http.response.start", "status": got.status_code, "headers": headers})
                async for part in got.aiter_raw():
                    async with asyncio.timeout(STALLED):
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except (httpx.HTTPError, TimeoutError) as error:
            if not begun:
                raise self._said(scope, error) from error
            logger.warning("an answer of %s broke off (%s)", self.address, type(error).__name__)  # uvicorn closes it

    def _said(self, scope: Scope, error: Exception) -> Refused:
        """What the client is told where there is no answer."""
        import httpx

        if isinstance(error, httpx.LocalProtocolError):
            return Refused("header", f"this request cannot be passed on: {error}")
        if isinstance(error, (httpx.ReadTimeout, httpx.WriteTimeout)):
            return Refused(
                "upstream", f"{self.address} did not answer in time", 503 if scope["path"] in ALWAYS else 504
            )
        if isinstance(error, httpx.RemoteProtocolError):
            return Refused("upstream", f"{self.address} gave no whole answer: {error}", 502)
        return Refused("upstream", f"{self.address} does not answer: {error}", 503)

    async def text(self, path: str) -> str:
        """What is there to read at ``path``; nothing where the answer is no 200."""
        async with asyncio.timeout(QUICK):
            async with self.sent(self.request({"method": "GET", "path": path, "headers": []}, b"")) as got:
                text = (await got.aread()).decode("utf-8", "replace") if got.status_code == 200 else ""
        return text if text.endswith("\n") or not text else text + "\n"


async def _while_there(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run ``work``, and end it when the client goes."""
    working, left = asyncio.current_task(), False
    assert working is not None

    async def gone() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        working.cancel()

    watching = asyncio.create_task(gone())
    try:
        await work
    except asyncio.CancelledError:
        if not left or working.uncancel() > 0:  # somebody else ends it
            raise
    finally:
        watching.cancel()


def kept(headers: Iterable[tuple[bytes, bytes]], also: tuple[bytes, ...] = ()) -> list[tuple[bytes, bytes]]:
    """The headers that go on, as they are and in their order. also: some that would be dropped."""
    headers = list(headers)
    named = [part.strip().lower() for n, v in headers if n.lower() == b"connection" for part in v.split(b",")]
    dropped = (DROPPED | set(named)) - set(also)
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def _quoted(raw: bytes, also: str = "") -> bytes:
    """Bytes of a path or query as they may stand in a URL; what is quoted already in a query stays so."""
    return quote(raw, safe="/:@!$&'()*+,;=~" + (also and "?%")).encode()
