"""Requests to a server, each over a connection of its own. Needs httpx and h11 (which uvicorn brings).

What httpx itself sends with does the same on top of four layers, and costs several times as much of the event loop's
time for each request: under load that is what everybody waits for.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import httpx

PART = 2**16
"""Bytes that are read, or written before the other side must have taken them."""
LONGEST_HEAD = 100 * 2**10


class Direct(httpx.AsyncBaseTransport):
    """Sends requests of httpx; raises what its own transport raises. tls: for servers with https."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self.tls = tls

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The head of the answer; its body comes as it is read, and ``aclose`` ends the connection."""
        waits = request.extensions["timeout"]
        talk = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST_HEAD)
        body = request.content
        try:
            head = talk.send(
                h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
            )
            parts = [head, talk.send(h11.Data(data=body)) if body else b"", talk.send(h11.EndOfMessage())]
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from error
        with _called(httpx.ConnectTimeout, httpx.ConnectError):
            async with asyncio.timeout(waits["connect"]):
                url = request.url
                tls = self.tls if url.scheme == "https" else None
                port = url.port or (443 if tls else 80)
                reader, writer = await asyncio.open_connection(url.host, port, ssl=tls, limit=PART)
        answer = _Answer(talk, reader, writer, waits["read"])
        try:
            await _write(writer, b"".join(parts), waits["write"])
            got = await answer.event()
            while isinstance(got, h11.InformationalResponse):
                got = await answer.event()
        except BaseException:
            await answer.aclose()
            raise
        return httpx.Response(got.status_code, headers=got.headers.raw_items(), stream=answer)


class _Answer(httpx.AsyncByteStream):
    """An answer under way."""

    def __init__(
        self, talk: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wait: float
    ) -> None:
        self.talk, self.reader, self.writer, self.wait = talk, reader, writer, wait

    async def event(self) -> Any:
        """What the server says next."""
        with _called(httpx.ReadTimeout, httpx.ReadError):
            try:
                while (event := self.talk.next_event()) is h11.NEED_DATA:
                    async with asyncio.timeout(self.wait):
                        self.talk.receive_data(await self.reader.read(PART))
            except h11.RemoteProtocolError as error:
                raise httpx.RemoteProtocolError(str(error)) from error
        if isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            raise httpx.RemoteProtocolError("the server ended the connection without an answer to take")
        return event

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while isinstance(event := await self.event(), h11.Data):
            yield bytes(event.data)

    async def aclose(self) -> None:
        self.writer.transport.abort()


async def _write(writer: asyncio.StreamWriter, data: bytes, wait: float) -> None:
    """Send ``data``, part by part. A server that takes no more of it may still have answered: no error then."""
    with _called(httpx.WriteTimeout, None):
        for at in range(0, len(data), 16 * PART):
            writer.write(data[at : at + 16 * PART])
            async with asyncio.timeout(wait):
                await writer.drain()


@contextmanager
def _called(late: type[Exception], broken: type[Exception] | None) -> Iterator[None]:
    """Errors of connections as httpx calls them. broken: None lets them pass."""
    try:
        yield
    except TimeoutError as error:
        raise late("it took too long") from error
    except OSError as error:
        if broken is not None:
            raise broken(str(error)) from error
