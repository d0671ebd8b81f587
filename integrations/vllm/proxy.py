"""The gate in a process of its own, in front of a vLLM server somewhere else. Needs starlette and httpx."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from vtr.integrations.vllm.gateway import Gateway
from vtr.integrations.vllm.metrics import REFUSED

DROPPED = {"host", "connection", "transfer-encoding", "content-length", "keep-alive", "te", "upgrade"}
"""Headers of one connection, not of the request."""


def proxy(upstream: str, depth: int, timeout: float = 600.0, transport: Any = None) -> Gateway:
    """An ASGI app: the gate, and behind it everything is passed on to ``upstream``, streams as they come.

    ``/health`` is the upstream's (503 where it cannot be reached); ``/metrics`` the upstream's, then the gate's.

    Args:
        upstream: the server's address, e.g. ``http://127.0.0.1:8000``. transport: for tests, what httpx sends with.
    """
    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    client = httpx.AsyncClient(base_url=upstream, timeout=timeout, transport=transport)

    async def passed_on(request: Request) -> Response:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in DROPPED]
        url = httpx.URL(path=request.url.path, query=request.url.query.encode())
        sent = client.build_request(request.method, url, headers=headers, content=await request.body())
        try:
            got = await client.send(sent, stream=True)
        except httpx.HTTPError as error:
            return JSONResponse({"error": {"message": f"vtr: {upstream} does not answer: {error}", "code": 503}}, 503)
        kept = {name: value for name, value in got.headers.items() if name.lower() not in DROPPED}
        return StreamingResponse(_raw(got), got.status_code, kept)

    async def metrics(request: Request) -> Response:
        from prometheus_client import REGISTRY, generate_latest

        try:
            theirs = (await client.get("/metrics")).text
        except httpx.HTTPError:
            theirs = ""
        ours = REGISTRY.restricted_registry([REFUSED])  # not what every process counts: theirs has that already
        return PlainTextResponse(theirs + generate_latest(ours).decode())

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await client.aclose()

    anything = Route("/{path:path}", passed_on, methods=["GET", "POST", "HEAD"])
    return Gateway(Starlette(routes=[Route("/metrics", metrics), anything], lifespan=lifespan), depth)


async def _raw(got: Any) -> AsyncIterator[bytes]:
    try:
        async for part in got.aiter_raw():
            yield part
    finally:
        await got.aclose()
