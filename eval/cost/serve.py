"""What policies change for a server: ``vtr bench serve``. Bounded load on an OpenAI server, policies in turns.

Each load (requests at a time, length of answers) is sent under each contender, round by round, so that ratios are of
neighbours. Pictures are fresh in every round: no cache of the server helps anybody. Server and client share the cores.
With a second server the contenders are the two servers, and nothing is reduced.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vtr.eval.cost.interleave import Ratio, median_ratio
from vtr.eval.cost.serve_contenders import CONTENDERS, NONE
from vtr.eval.cost.served_by import Processes

GAUGES = {"usage": "vllm:kv_cache_usage_perc", "running": "vllm:num_requests_running",
          "waiting": "vllm:num_requests_waiting", "preemptions": "vllm:num_preemptions_total"}  # fmt: skip
WARM = 8
"""Requests of the round that warms up, at most."""
EVERY = 0.2
"""Seconds between two looks at a server's metrics."""
CACHE = re.compile(r"^vllm:cache_config_info\{([^}]*)\}", re.M)
SIZES = {"blocks": "num_gpu_blocks", "block_size": "block_size"}
LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Load:
    """concurrency: requests under way at a time. requests: in a round. tokens: of each answer, exactly."""

    concurrency: int
    requests: int
    tokens: int


@dataclass
class Round:
    """One round of one contender.

    Attributes:
        ttft, tpot: of each request, seconds. seen: (cache blocks in use, requests running) at each look, if known.
        preemptions: how many requests lost their blocks for a while, if known.
        cpu: seconds of the processor that the server's processes took, where they are on this machine.
    """

    seconds: float
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    seen: list[tuple[int, int]] = field(default_factory=list)
    preemptions: int | None = None
    cpu: float | None = None


@dataclass(frozen=True)
class Behind:
    """A server. processes: of it, where they are on this machine."""

    client: Any
    processes: Processes | None = None


def loads(small: bool, inside: bool = False) -> list[Load]:
    """The loads: more and more at a time, then long answers. inside: those again with long answers."""
    if small:
        return [Load(1, 4, 8), Load(8, 16, 8)]
    if inside:
        return [Load(at, count, tokens) for tokens in (16, 128) for at, count in ((1, 4), (8, 16), (32, 32))]
    return [Load(1, 8, 16), Load(8, 32, 16), Load(32, 64, 16), Load(8, 16, 128)]


def load_of(text: str) -> Load:
    """``8x128``: 8 requests at a time, answers of 128 tokens, twice as many requests; ``8x128x40``: 40 of them.

    Raises:
        ValueError: written otherwise.
    """
    numbers = text.lower().replace("×", "x").split("x")
    if len(numbers) not in (2, 3) or not all(one.strip().isdecimal() and int(one) > 0 for one in numbers):
        raise ValueError(f"--load {text}: write AT_A_TIMExTOKENS or AT_A_TIMExTOKENSxREQUESTS, e.g. 8x128")
    at, tokens, *rest = map(int, numbers)
    return Load(at, rest[0] if rest else 2 * at, tokens)


def picture(draw: np.random.Generator, side: int) -> Any:
    """A random picture."""
    from PIL import Image

    coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST)


def data_url(image: Any) -> str:
    """A picture as what stands in a request."""
    raw = io.BytesIO()
    image.save(raw, "PNG")
    return "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()


def body(model: str, spec: str, url: str, tokens: int) -> dict[str, Any]:
    """A request for exactly so many tokens, streamed."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is in the picture"}]
    return {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "min_tokens": tokens,
        "ignore_eos": True, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "vtr": spec,
    }  # fmt: skip


async def ask(client: Any, request: dict[str, Any], made: Round) -> None:
    """Send one request and note when its first and its last token came.

    Raises:
        RuntimeError: the server refused it, or gave up.
    """
    began, first, last = time.perf_counter(), 0.0, 0.0
    async with client.stream("POST", "/v1/chat/completions", json=request) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"the server said {answer.status_code}: {(await answer.aread()).decode()[:300]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the server broke off an answer: {json.dumps(event['error'])[:300]}")
            if event["choices"] and event["choices"][0]["delta"].get("content") is not None:
                last = time.perf_counter()
                first = first or last
            if event.get("usage"):
                made.prompt_tokens.append(event["usage"]["prompt_tokens"])
    made.ttft.append((first or time.perf_counter()) - began)
    made.tpot.append((last - first) / max(request["max_tokens"] - 1, 1))


async def one_round(server: Behind, requests: Sequence[dict[str, Any]], concurrency: int) -> Round:
    """All requests, at most ``concurrency`` at a time."""
    made, gate, running = Round(0.0), asyncio.Semaphore(concurrency), True
    client, processes = server.client, server.processes

    async def bounded(request: dict[str, Any]) -> None:
        async with gate:
            await ask(client, request, made)

    async def watch(total: int) -> None:
        while running:
            found = gauges((await client.get("/metrics")).text)
            if "usage" in found:
                made.seen.append((round(found["usage"] * total), int(found.get("running", 0))))
            await asyncio.sleep(EVERY)

    before = (await client.get("/metrics")).text
    total, spent = cache_of(before)["blocks"], 0.0 if processes is None else processes.seconds()
    watcher = None if total is None else asyncio.create_task(watch(total))
    began = time.perf_counter()
    await asyncio.gather(*map(bounded, requests))
    made.seconds = time.perf_counter() - began
    made.cpu = None if processes is None else processes.seconds() - spent
    running = False
    if watcher is not None:
        await watcher
    after, name = gauges((await client.get("/metrics")).text), "preemptions"
    made.preemptions = int(after[name] - gauges(before)[name]) if name in after else None
    return made


def gauges(metrics: str) -> dict[str, float]:
    """What a server's ``/metrics`` say of its cache and its requests, by the names of :data:`GAUGES`."""
    found = {}
    for name, theirs in GAUGES.items():
        if told := re.findall(rf"^{theirs}(?:\{{[^}}]*\}})? ([\d.eE+-]+)$", metrics, re.M):
            found[name] = sum(map(float, told))
    return found


def cache_of(metrics: str) -> dict[str, Any]:
    """What a server's ``/metrics`` say of its cache: blocks, tokens of a block, whether prefixes are cached."""
    found = CACHE.search(metrics)
    labels = dict(LABEL.findall(found[1])) if found else {}
    numbers = {key: int(labels[name]) if labels.get(name, "").isdigit() else None for key, name in SIZES.items()}
    return {**numbers, "prefix_caching": labels.get("enable_prefix_caching")}


async def about(client: Any) -> dict[str, Any]:
    """The server's version and cache, as far as it tells."""
    told = await client.get("/version")
    version = told.json().get("version") if told.status_code == 200 else None
    return {"vllm": version, **cache_of((await client.get("/metrics")).text)}


def first_model(url: str) -> str:
    """The name of the first model a server has.

    Raises:
        OSError: it cannot be reached.
    """
    return str(_models(url)[0]["id"])


def model_of(url: str, name: str | None = None) -> str:
    """The folder or hub name of a server's model, the first one's by default.

    Raises:
        OSError: it cannot be reached. ValueError: it has no such model.
    """
    there = _models(url)
    found = [one for one in there if name in (None, one["id"])]
    if not found:
        raise ValueError(f"the server has no model {name!r}, but {', '.join(one['id'] for one in there)}")
    return str(found[0].get("root") or found[0]["id"])


def _models(url: str) -> list[dict[str, Any]]:
    import httpx

    try:
        told: list[dict[str, Any]] = httpx.get(f"{url}/v1/models", timeout=30).raise_for_status().json()["data"]
    except httpx.HTTPError as error:
        raise OSError(f"{url} does not answer: {error}; start a server with `vtr serve`") from error
    return told


def measure(
    url: str, model: str, steps: Sequence[Load], rounds: int, side: int, seed: int, done: Callable[[], Any],
    contenders: Mapping[str, Sequence[str]] = CONTENDERS, against: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All loads under all contenders, in turns.

    Args:
        url: the server, without ``/v1``. side: of the pictures, in pixels. done: called after each round.
        contenders: what the requests of a load ask for, one after the other; "none" is first.
        against: another server, which is asked what "none" asks; the other contenders ask the first.

    Raises:
        RuntimeError: the server refused a request. OSError: it cannot be reached.
    """
    import httpx

    async def everything() -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        how: dict[str, Any] = {"timeout": 600, "limits": httpx.Limits(max_connections=None)}
        try:
            async with (
                httpx.AsyncClient(base_url=url, **how) as here,
                httpx.AsyncClient(base_url=against or url, **how) as there,
            ):
                servers = {name: Behind(here, Processes.behind(url)) for name in contenders}
                servers[NONE] = Behind(there, Processes.behind(against or url))
                told = {"server": await about(here)} | ({} if against is None else {"against": await about(there)})
                for load in steps:
                    rows += await _load(servers, model, load, rounds, side, seed, done, contenders)
        except httpx.TransportError as error:
            raise OSError(f"{url} does not answer: {error}; start it with `vtr serve`") from error
        return {**told, "rows": rows}

    asked = {"model": model, "side": side, "rounds": rounds, "contenders": {k: list(v) for k, v in contenders.items()}}
    return {**asked, **asyncio.run(everything())}


async def _load(
    servers: Mapping[str, Behind], model: str, load: Load, rounds: int, side: int, seed: int, done: Callable[[], Any],
    contenders: Mapping[str, Sequence[str]] = CONTENDERS,
) -> list[dict[str, Any]]:  # fmt: skip
    draw = np.random.default_rng([seed, load.concurrency, load.tokens])
    found: dict[str, list[Round]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):  # the first one warms up
        names = list(contenders)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            specs, count = contenders[name], load.requests if turn else min(load.requests, WARM)
            urls = [data_url(picture(draw, side)) for _ in range(count)]
            requests = [body(model, specs[i % len(specs)], url, load.tokens) for i, url in enumerate(urls)]
            made = await one_round(servers[name], requests, load.concurrency)
            if turn:
                found[name].append(made)
            done()
    return [_row(name, load, found[name], found[NONE]) for name in contenders]


def _row(name: str, load: Load, found: Sequence[Round], base: Sequence[Round]) -> dict[str, Any]:
    ttft, tpot = ([1000 * t for one in found for t in getattr(one, what)] for what in ("ttft", "tpot"))
    looks = [look for one in found for look in one.seen]
    busy = [look for look in looks if look[1]]
    lost = [one.preemptions for one in found if one.preemptions is not None]
    row: dict[str, Any] = {
        "contender": name, "concurrency": load.concurrency, "requests": load.requests, "tokens": load.tokens,
        "per_second": statistics.median(load.requests / one.seconds for one in found),
        "gain": _spread(median_ratio([one.seconds for one in base], [one.seconds for one in found])),
        "ttft_ms": {"median": statistics.median(ttft), "p90": float(np.percentile(ttft, 90))},
        "tpot_ms": {"median": statistics.median(tpot), "p90": float(np.percentile(tpot, 90))},
        "prompt_tokens": statistics.mean(n for one in found for n in one.prompt_tokens),
        "kv_blocks": max((blocks for blocks, _ in looks), default=0) or None,  # 0: over before it was looked at
        "running": max((running for _, running in looks), default=0) or None,
        "blocks_each": sum(look[0] for look in busy) / sum(look[1] for look in busy) if busy else None,
        "preemptions": sum(lost) if lost else None,
    }  # fmt: skip
    mine, theirs = ([one.cpu for one in rounds if one.cpu] for rounds in (found, base))
    if len(mine) == len(theirs) == len(found):
        row["cpu_ms"] = 1000 * statistics.median(mine) / load.requests
        row["cpu_gain"] = _spread(median_ratio(theirs, mine))
    return row


def _spread(found: Ratio) -> dict[str, float]:
    return {"median": found.value, "low": found.low, "high": found.high}
