"""The gate under load, some of it hostile: `python -m vtr.eval.cost.gate`. No model, no GPU, 127.0.0.1 only.

A stand-in for the server, the gate (`vtr serve --upstream`), the clients and who asks for /health are a process each.
Nine in ten clients send a picture, wait for the answer and send again; one in thirty each sends its body too slowly,
hangs up, or sends what is no request. Meanwhile /health is asked 40 times a second, whether the last answer has come or
not, and as often a server that does nothing else: what one waits for that one is the machine's doing, not the gate's.
Said at the end: answers by status, wrong ones, both waits, the gate's memory and time of the processor. Needs Linux or
another system that forks, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

PICTURE = "data:image/png;base64," + "A" * 100_000
GOOD = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}],
    "vtr": "m3:tokens=36",
}
ANSWER = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n{"ok":true}'
EVERY = 0.025
"""Seconds between two questions for /health."""
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
MALFORMED: list[tuple[bytes, int]] = [
    (b"{no json", 400),
    (b"[" * 50_000, 400),
    (b'{"x": [' + b"[]," * 300_000 + b"1]}", 413),
    (b'{"x": NaN}', 400),
    (b'{"vtr": "gsearch:schedule=[1.0],layers=20000000"}', 400),
    (b'{"vtr": "' + b"x" * 400_000 + b'"}', 400),
    (b'{"mm_processor_kwargs": {"do_resize": false}}', 400),
]
"""(body, the status it gets)."""


def serve_upstream(tell: Connection) -> None:
    """Answers every request but GETs after one to three seconds."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                sizes = [int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(sizes[0] if sizes else 0)
                if not head.startswith(b"get"):
                    await asyncio.sleep(random.uniform(1, 3))
                writer.write(ANSWER)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(one, "127.0.0.1", 0, backlog=1024)
        tell.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def serve_gate(upstream: int, tell: Connection) -> None:
    """As ``vtr serve --upstream`` does."""
    import uvicorn
    from vtr.integrations.vllm.proxy import proxy
    from vtr.integrations.vllm.timeouts import SWITCH, protocol

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)  # whoever connects now waits until the gate is ready
    app = proxy(f"http://127.0.0.1:{upstream}", 32)
    gc.freeze()
    config = uvicorn.Config(app, log_level="critical", http=protocol(), backlog=1024)  # type: ignore[arg-type]
    sys.setswitchinterval(SWITCH)
    tell.send(listening.getsockname()[1])
    uvicorn.Server(config).run(sockets=[listening])


class Load:
    """Clients of a gate at ``port`` and what they noted, until ``end`` of the loop's clock."""

    def __init__(self, port: int, end: float) -> None:
        self.port, self.end = port, end
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []

    def over(self) -> bool:
        return asyncio.get_running_loop().time() >= self.end

    async def ask(self, data: bytes, slow: bool = False, stay: float = 60.0) -> int:
        """The status of the answer; 0 if there was none within ``stay`` seconds, and the client left."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            async with asyncio.timeout(stay):
                head, _, body = data.partition(b"\r\n\r\n")
                writer.write(head + b"\r\n\r\n" + (body[:20] if slow else body))
                await writer.drain()
                return int((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1])
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            return 0
        finally:
            writer.close()

    def note(self, kind: str, got: int, *right: int) -> None:
        self.answers[f"{kind} {got}"] += 1
        if got not in right:
            self.wrong.append(f"{kind}: {got}, not {right}")

    async def good(self) -> None:
        data = post(json.dumps(GOOD).encode())
        while not self.over():
            self.note("good", await self.ask(data), 200)

    async def slow(self) -> None:
        data = post(json.dumps(GOOD).encode())
        while not self.over():
            self.note("slow", await self.ask(data, slow=True), 408)

    async def leaving(self) -> None:
        data = post(json.dumps(GOOD).encode())
        while not self.over():
            self.note("leaving", await self.ask(data, stay=random.uniform(0, 0.9)), 0)

    async def malformed(self) -> None:
        while not self.over():
            body, status = random.choice(MALFORMED)
            self.note("malformed", await self.ask(post(body)), status)
            await asyncio.sleep(random.uniform(0, 1))


async def ask_health(ports: list[int], seconds: float) -> tuple[list[list[float]], list[str]]:
    """How long each server let wait for /health (seconds), asked at fixed times; what was answered but 200."""
    waits: list[list[float]] = [[] for _ in ports]
    wrong: list[str] = []

    async def one(at: int) -> None:
        start = time.perf_counter()
        got = await Load(ports[at], 0.0).ask(HEALTH)
        waits[at].append(time.perf_counter() - start)
        if got != 200:
            wrong.append(f"health: {got}, not 200")

    loop = asyncio.get_running_loop()
    begun = loop.time()
    asked: list[asyncio.Task[None]] = []
    for tick in range(int(seconds / EVERY)):
        await asyncio.sleep(begun + tick * EVERY - loop.time())
        asked += [asyncio.create_task(one(at)) for at in range(len(ports))]
    await asyncio.gather(*asked)
    return waits, wrong


def serve_prober(ports: list[int], seconds: float, tell: Connection) -> None:
    """Asks, and tells what :func:`ask_health` gives."""
    tell.send(asyncio.run(ask_health(ports, seconds)))


def post(body: bytes) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


async def load(port: int, pid: int, clients: int, seconds: float) -> tuple[Load, list[float]]:
    """All clients at once for some seconds; the gate's memory, MiB, once a second."""
    made = Load(port, asyncio.get_running_loop().time() + seconds)
    few = max(clients // 30, 1)
    kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
        (made.good, clients - 3 * few), (made.slow, few), (made.leaving, few), (made.malformed, few),
    ]  # fmt: skip
    memory: list[float] = []

    async def watch() -> None:
        while not made.over():
            memory.append(resident(pid))
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(kind() for kind, count in kinds for _ in range(count)))
    return made, memory


def resident(pid: int) -> float:
    """Memory of a process, MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def spent(pid: int) -> float:
    """Seconds of the processor that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Run it; 1 if any answer was wrong."""
    words = argparse.ArgumentParser(prog="python -m vtr.eval.cost.gate", description=__doc__)
    words.add_argument("--clients", type=int, default=300)
    words.add_argument("--seconds", type=float, default=60.0)
    given = words.parse_args()
    made, memory, waits, wrong, spent = run(given.clients, given.seconds)
    third = max(len(memory) // 3, 1)
    print(f"{given.clients} clients for {given.seconds:.0f} s:", dict(sorted(made.answers.items())))
    print("wrong:", dict(Counter(made.wrong + wrong)) or "none")
    for name, got in zip(("/health of the gate", "of a server without load"), waits, strict=True):
        times = sorted(1000 * wait for wait in got)
        print(f"{name}: {len(times)} times, median {statistics.median(times):.1f} ms, "
              f"99th percentile {times[int(len(times) * 0.99)]:.1f}, longest {times[-1]:.1f}")  # fmt: skip
    print(f"memory: {memory[0]:.0f} MiB at first, at most {max(memory[:third]):.0f} in the first third, "
          f"{max(memory[-third:]):.0f} in the last")  # fmt: skip
    print(f"time of the processor: {1000 * spent / sum(made.answers.values()):.1f} ms a request")
    return int(bool(made.wrong + wrong))


def run(clients: int, seconds: float) -> tuple[Load, list[float], list[list[float]], list[str], float]:
    """The load, the gate's memory, the waits for /health of both servers, what went wrong there, the gate's seconds."""
    fork = multiprocessing.get_context("fork")
    hear, tell = fork.Pipe(duplex=False)
    started: list[BaseProcess] = []

    def start(target: Callable[..., None], *args: object) -> BaseProcess:
        started.append(fork.Process(target=target, args=(*args, tell), daemon=True))
        started[-1].start()
        return started[-1]

    try:
        start(serve_upstream)
        upstream = hear.recv()
        start(serve_upstream)
        idle = hear.recv()
        gate = start(serve_gate, upstream).pid or 0
        port = hear.recv()
        asyncio.run(Load(port, 0.0).ask(HEALTH))
        before = spent(gate)
        start(serve_prober, [port, idle], seconds)
        made, memory = asyncio.run(load(port, gate, clients, seconds))
        waits, wrong = hear.recv()
        return made, memory, waits, wrong, spent(gate) - before
    finally:
        for process in started:
            process.terminate()


if __name__ == "__main__":
    raise SystemExit(main())
