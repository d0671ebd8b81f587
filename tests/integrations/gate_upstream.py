"""A stand-in for a vLLM server, and the gate in front of it, both in threads of this process, on free ports."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any


class Upstream:
    """Answers every request in its own way; notes (head, body) of each.

    ``"wait"`` in a body: answers after ``wait`` seconds, unless the client goes before. ``"stream"``: a part every
    0.05 s, for ``wait`` seconds. ``"break"``: half of an answer. ``"half a head"``; ``"early hint"``: before an answer.
    ``"garbage"``: no HTTP. A header ``x-refuse``: answers before the body came, and closes.
    """

    def __init__(self, wait: float = 0.0, extra: bytes = b"") -> None:
        self.wait, self.extra = wait, extra
        self.seen: list[tuple[bytes, bytes]] = []
        self.gone = self.done = self.here = self.most = 0
        self.port: int | None = None
        threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True).start()
        until(lambda: self.port is not None)

    async def _main(self) -> None:
        server = await asyncio.start_server(self._one, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            await server.serve_forever()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.here += 1
        self.most = max(self.most, self.here)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"x-refuse" in head.lower():
                writer.write(b"HTTP/1.1 413 No\r\ncontent-length: 8\r\nconnection: close\r\n\r\ntoo much")
                return
            sizes = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            body = await reader.readexactly(sizes[0] if sizes else 0)
            self.seen.append((head, body))
            await self._answer(body, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone += 1
        finally:
            self.here -= 1
            writer.close()

    async def _answer(self, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n" + self.extra
        leaving = asyncio.ensure_future(reader.read(1))
        try:
            if b"stream" in body:
                writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
                for _ in range(int(self.wait / 0.05)):
                    writer.write(b"5\r\npart \r\n")
                    if (await asyncio.wait({leaving}, timeout=0.05))[0]:
                        raise ConnectionError
                writer.write(b"0\r\n\r\n")
            elif b"break" in body:
                writer.write(head + b"content-length: 100\r\n\r\nhalf of it")
            elif b"half a head" in body:
                writer.write(head)
            elif b"early hint" in body:
                writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
                writer.write(head + b'content-length: 11\r\n\r\n{"ok":true}')
            elif b"garbage" in body:
                writer.write(b"no HTTP at all\r\n\r\n")
            else:
                if b"wait" in body and (await asyncio.wait({leaving}, timeout=self.wait))[0]:
                    raise ConnectionError
                writer.write(head + b'content-length: 11\r\n\r\n{"ok":true}')
            await writer.drain()
            self.done += 1
        finally:
            leaving.cancel()


class Gate:
    """The gate alone in front of a port, as ``vtr serve --upstream`` runs it."""

    def __init__(self, upstream: int | None, **more: Any) -> None:
        import uvicorn
        from vtr.integrations.vllm.proxy import proxy
        from vtr.integrations.vllm.timeouts import protocol

        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.gateway = proxy(f"http://127.0.0.1:{upstream}", 10, **more)
        config = uvicorn.Config(self.gateway, log_level="critical", http=protocol(), backlog=1024)  # type: ignore[arg-type]
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[listening]), daemon=True)
        self.thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)

    def send(self, data: bytes, timeout: float = 20.0) -> tuple[int, bytes]:
        """(status, the whole answer) to raw bytes; status 0: the connection was closed without one."""
        with self.connect(data, timeout) as client:
            return read(client)

    def connect(self, data: bytes, timeout: float = 20.0) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        client.sendall(data)
        return client


def read(client: socket.socket) -> tuple[int, bytes]:
    """What comes until the other side closes: requests of :func:`post` and :func:`get` ask for that."""
    answer = b""
    while part := client.recv(65536):
        answer += part
    return int(answer.split(b" ")[1]) if answer else 0, answer


def post(body: bytes, path: bytes = b"/v1/chat/completions", extra: bytes = b"", host: bytes = b"x") -> bytes:
    head = b"POST %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Type: application/json\r\n" % (path, host)
    return head + extra + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def get(path: bytes, extra: bytes = b"", host: bytes = b"x") -> bytes:
    return b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n%s\r\n" % (path, host, extra)


def until(what: Any, seconds: float = 20.0) -> None:
    """Wait until ``what()``; AssertionError after some time."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.01)
