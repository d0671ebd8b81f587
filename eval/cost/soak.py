"""A server under mixed load for long: ``python -m vtr.eval.cost.soak``. The pocket model, any number of requests.

First the server, with a small cache, so that requests lose their blocks, and small caches of pictures:

    vtr serve pocket --decoder-policies -- --dtype float32 --enforce-eager --max-model-len 2048 --max-num-seqs 16 \\
      --block-size 32 --num-gpu-blocks-override 640 --mm-processor-cache-gb 0.05

Clients ask under policies before the decoder, inside it, both, none, with two pictures or none; some send what is no
request (HTTP 400 each), some hang up. Answers are compared with vtr on transformers, token by token: those to a set of
requests that come again and again, all of them; of the others, which no cache has seen, a sample. At the end everything
must have been right, all cache blocks free, no request left, and the server's memory what it was after the first tenth.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm
from vtr.eval.cost import soak_requests as requests
from vtr.eval.cost.serve import gauges
from vtr.eval.cost.served_by import Processes
from vtr.eval.cost.soak_requests import Asked

PATH = "/v1/chat/completions"
WHAT = {"known": 45, "fresh": 33, "malformed": 12, "leaves": 10}
"""What clients do, and how often in a hundred."""
AGAIN = "Internal server error"
"""All that vLLM tells a client whose picture was lost on its way from the frontend to the engine."""
DRAINED = 60.0
"""Seconds within which a server has ended what is under way."""
GROWTH = 0.05
"""By how much of it memory may grow between the first tenth and the last."""


@dataclass
class Notes:
    """What came of it. done: kind of request → how it ended → how often. wrong: whatever should not have been.
    fresh: a sample of those that no cache had seen, and what was said. again: requests sent a second time. memory: of
    the server's processes, MiB, once in two seconds.
    """

    done: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    fresh: list[tuple[Asked, list[int]]] = field(default_factory=list)
    looks: list[dict[str, float]] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)
    count: int = 0
    again: int = 0

    def note(self, kind: str, end: str, wrong: str | None = None) -> None:
        self.count += 1
        self.done.setdefault(kind, Counter())[end] += 1
        if wrong is not None:
            self.wrong.append(f"{kind}: {wrong}"[:500])


class Soak:
    """Clients of one server.

    Args:
        known: requests that come again and again, with what is right. most: requests; seconds: as long at most.
    """

    def __init__(
        self, client: Any, model: str, known: Sequence[tuple[Asked, list[int], list[float]]], most: int, seconds: float,
        sample: int, seed: int, processes: Processes | None,
    ) -> None:  # fmt: skip
        self.client, self.model, self.known, self.most = client, model, known, most
        self.malformed = requests.malformed(model)
        self.dice, self.sample, self.processes = random.Random(seed), sample, processes
        self.began, self.end = time.monotonic(), time.monotonic() + seconds
        self.begun, self.notes = 0, Notes()
        self.bar = tqdm(total=most, desc="soak", unit="request", mininterval=5)

    def over(self) -> bool:
        return self.begun >= self.most or time.monotonic() >= self.end

    async def client_of_many(self) -> None:
        """One request after the other, whatever the dice say."""
        ways = {"known": self.ask_known, "fresh": self.ask_fresh, "malformed": self.ask_wrongly, "leaves": self.leave}
        while not self.over():
            self.begun += 1
            (kind,) = self.dice.choices(list(WHAT), list(WHAT.values()))
            try:
                await ways[kind]()
            except Exception as error:  # a server that is gone, an answer that is none: all of it is noted
                self.notes.note(kind, type(error).__name__, f"{type(error).__name__}: {error}")
                self.gone(error)
            self.bar.update()

    def gone(self, error: Exception) -> None:
        """Where nobody takes connections any more, it is over."""
        if type(error).__name__ == "ConnectError":
            self.end = 0.0

    async def ask_known(self) -> None:
        await self.check(*self.dice.choice(self.known))

    async def check(self, asked: Asked, right: list[int], margins: list[float]) -> None:
        """Ask, and compare the answer."""
        said = await self.said(asked, "known")
        if said is not None:
            found = requests.verdict(said, right, margins)
            self.notes.note(
                "known", f"{asked.kind}: {found}", None if found != "wrong" else f"{asked}: {said}, not {right}"
            )

    async def ask_fresh(self) -> None:
        asked = requests.draw(self.dice)
        said = await self.said(asked, "fresh")
        if said is None:
            return
        self.notes.note("fresh", asked.kind, None if len(said) == asked.tokens else f"{asked}: {len(said)} tokens")
        kept = self.notes.fresh
        if len(kept) < self.sample:
            kept.append((asked, said))
        elif (at := self.dice.randrange(self.notes.count)) < self.sample:
            kept[at] = (asked, said)

    async def said(self, asked: Asked, kind: str) -> list[int] | None:
        """The tokens of the answer; every third is streamed. None: it was refused, which is noted.

        Once more where vLLM's frontend thought that its engine had a picture, since a client had hung up while it was
        on its way: vLLM says so in its log, answers 500 once, and wants the request again.
        """
        body, streamed = requests.body(self.model, asked), self.dice.random() < 0.33
        for again in (True, False):
            tokens, refusal = await (self._streamed(body) if streamed else self._whole(body))
            if refusal is None:
                return tokens
            if not (again and AGAIN in refusal):
                break
            self.notes.again += 1
        self.notes.note(kind, "refused", f"{asked}: {refusal}")
        return None

    async def _whole(self, body: dict[str, Any]) -> tuple[list[int], str | None]:
        answer = await self.client.post(PATH, json=body)
        if answer.status_code != 200:
            return [], f"{answer.status_code} {answer.text[:300]}"
        return answer.json()["choices"][0]["token_ids"], None

    async def _streamed(self, body: dict[str, Any]) -> tuple[list[int], str | None]:
        tokens: list[int] = []
        async with self.client.stream("POST", PATH, json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                return [], f"{answer.status_code} {(await answer.aread()).decode()[:300]}"
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line[6:])
                    if "error" in event:
                        return [], f"error {json.dumps(event['error'])[:300]}"
                    tokens += [one for choice in event["choices"] for one in choice.get("token_ids") or ()]
        return tokens, None

    async def ask_wrongly(self) -> None:
        """What is no request gets 400."""
        body = self.dice.choice(self.malformed)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await self.client.post(PATH, content=raw, headers={"content-type": "application/json"})
        status, told = answer.status_code, raw[-200:].decode()
        self.notes.note("malformed", str(status), None if status == 400 else f"{status} {answer.text[:200]} to …{told}")

    async def leave(self) -> None:
        """Hang up before the answer, or in the middle of it."""
        asked = requests.draw(self.dice)
        body = {**requests.body(self.model, asked), "stream": True, "max_tokens": 64, "min_tokens": 64}
        stay, parts = self.dice.uniform(0, 1.5), self.dice.randint(1, 12)
        try:
            async with asyncio.timeout(stay), self.client.stream("POST", PATH, json=body) as answer:
                async for _ in answer.aiter_lines():
                    parts -= 1
                    if parts <= 0:
                        break
        except TimeoutError:
            return self.notes.note("leaves", "before the answer" if parts > 0 else "at once")
        self.notes.note("leaves", "in the middle")

    async def watch(self) -> None:
        """The server's memory, and how full its cache is, once in two seconds."""
        while not self.over():
            try:
                await self.look()
            except Exception as error:  # noted, as above
                self.notes.wrong.append(f"/metrics: {type(error).__name__}: {error}")
                self.gone(error)
            if self.processes is not None:
                self.notes.memory.append(self.processes.resident())
            await asyncio.sleep(2)

    async def look(self) -> dict[str, float]:
        """Now: requests done, seconds, and what the server's metrics say."""
        found = gauges((await self.client.get("/metrics")).text)
        now = {"done": self.notes.count, "seconds": time.monotonic() - self.began, **found}
        self.notes.looks.append(now)
        return now

    async def drained(self) -> dict[str, float]:
        """A look when nothing is under way any more, or after :data:`DRAINED` seconds."""
        end = time.monotonic() + DRAINED
        while (now := await self.look()).get("running", 0) + now.get("waiting", 0) > 0 and time.monotonic() < end:
            await asyncio.sleep(0.5)
        return now


async def soak(
    url: str, model: str, known: Sequence[tuple[Asked, list[int], list[float]]], most: int, seconds: float,
    at_a_time: int, sample: int, seed: int,
) -> Soak:  # fmt: skip
    """All of it; then what is known is asked once more, all at once.

    Raises:
        OSError: the server cannot be reached at all.
    """
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        made = Soak(client, model, known, most, seconds, sample, seed, Processes.behind(url))
        await asyncio.gather(made.watch(), *(made.client_of_many() for _ in range(at_a_time)))
        made.bar.close()
        try:
            made.notes.wrong += [f"at the end: {what}" for what in await _ended(made, client)]
        except httpx.TransportError as error:
            made.notes.wrong.append(f"at the end: the server is gone ({type(error).__name__}: {error})")
    return made


async def _ended(made: Soak, client: Any) -> list[str]:
    """What is wrong when all is over: what is known is asked once more, all at once, then nothing may be left."""
    await made.drained()
    await asyncio.gather(*(made.check(*one) for one in made.known))
    last = await made.drained()
    checks = {
        "/health does not answer": (await client.get("/health")).status_code != 200,
        "requests are left": last.get("running", 0) + last.get("waiting", 0) > 0,
        "cache blocks are not free": last.get("usage") != 0,
    }
    return [f"{what} ({last})" for what, bad in checks.items() if bad]


def tenths(memory: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Memory of each process and of all in each tenth of the time, medians, MiB; nothing where it is not known."""
    if len(memory) < 10:
        return {}
    edges = [round(i * len(memory) / 10) for i in range(11)]
    series = {"all": [sum(look.values()) for look in memory]}
    series |= {name: [look.get(name, 0.0) for look in memory] for name in memory[0]}
    return {
        name: [round(statistics.median(values[a:b]), 1) for a, b in pairwise(edges)] for name, values in series.items()
    }


def summary(made: Soak, verified: Counter[str]) -> dict[str, Any]:
    """What the result file says."""
    notes, looks = made.notes, made.notes.looks or [{}]
    memory = tenths(notes.memory)
    if memory and memory["all"][-1] > (1 + GROWTH) * memory["all"][0]:
        notes.wrong.append(
            f"memory: {memory['all'][0]:.0f} MiB in the first tenth, {memory['all'][-1]:.0f} in the last"
        )
    return {
        "requests": notes.count, "seconds": looks[-1].get("seconds"),
        "done": {k: dict(v) for k, v in notes.done.items()}, "again": notes.again,
        "verified": dict(verified), "wrong": notes.wrong, "memory_mib": memory,
        "preemptions": looks[-1].get("preemptions", 0) - looks[0].get("preemptions", 0),
        "running": max(look.get("running", 0) for look in looks), "usage": max(look.get("usage", 0) for look in looks),
        "usage_at_the_end": looks[-1].get("usage"),
    }  # fmt: skip


def main(
    url: Annotated[str, typer.Option(help="the server, started by `vtr serve pocket --decoder-policies`")] = (
        "http://127.0.0.1:8000"
    ),
    most: Annotated[int, typer.Option("--requests", min=1, help="so many at most")] = 10_000,
    seconds: Annotated[float, typer.Option(help="as long at most")] = 1500.0,
    at_a_time: Annotated[int, typer.Option(min=1, help="clients")] = 16,
    known: Annotated[int, typer.Option(min=1, help="requests that come again and again, checked each time")] = 96,
    sample: Annotated[int, typer.Option(min=0, help="of the others, so many are checked at the end")] = 96,
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """Load a server for long with good requests, bad ones and clients that hang up; 1 if anything was wrong."""
    from vtr.eval.cost.serve import first_model
    from vtr.eval.report import results

    reference, dice = requests.Reference(), random.Random(seed)
    model = first_model(url)
    asked = [requests.draw(dice) for _ in range(known)]
    right = [(one, *reference.says(one)) for one in tqdm(asked, desc="what is right", mininterval=5)]
    made = asyncio.run(soak(url, model, right, most, seconds, at_a_time, sample, seed))
    verified: Counter[str] = Counter()
    for one, said in tqdm(made.notes.fresh, desc="what was right", mininterval=5):
        found = requests.verdict(said, *reference.says(one))
        verified[found] += 1
        if found == "wrong":
            made.notes.wrong.append(f"fresh: {one}: {said}"[:500])
    body = summary(made, verified)
    if json_file is not None:
        results.save(json_file, "soak", body, seed=seed)
    typer.echo(json.dumps({**body, "wrong": body["wrong"][:10]}, indent=1))
    raise typer.Exit(int(bool(body["wrong"])))


if __name__ == "__main__":
    typer.run(main)
