"""What policies change for a server: ``vtr bench serve``. Bounded load on an OpenAI server, policies in turns.

Each load (requests at a time, length of answers) is sent under each contender, round by round, so that ratios are of
neighbours. Pictures are fresh in every round: no cache of the server helps anybody. Server and client share the cores.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vtr.eval.cost.interleave import median_ratio

CONTENDERS: dict[str, Sequence[str]] = {
    "none": ["none"],
    "fixed": ["m3:tokens=36"],
    "mixed": ["none", "m3:tokens=36", 'globalcom2:retention=0.25,budget="exact"', "m3:tokens=9"],
}
"""What the requests of a load ask for, one after the other. "mixed": what a server gets whose clients choose."""
USAGE = re.compile(r"^vllm:kv_cache_usage_perc\{[^}]*\} ([\d.eE+-]+)$", re.M)
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
    """One round of one contender. ttft, tpot: of each request, seconds. blocks: most in use at a time, if known."""

    seconds: float
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    blocks: int | None = None


def loads(small: bool) -> list[Load]:
    """The loads: more and more at a time, then long answers."""
    if small:
        return [Load(1, 4, 8), Load(8, 16, 8)]
    return [Load(1, 8, 16), Load(8, 32, 16), Load(32, 64, 16), Load(8, 16, 128)]


def picture(draw: np.random.Generator, side: int) -> str:
    """A random picture, as a data URL."""
    from PIL import Image

    coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    raw = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST).save(raw, "PNG")
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
        RuntimeError: the server refused it.
    """
    began, first, last = time.perf_counter(), 0.0, 0.0
    async with client.stream("POST", "/v1/chat/completions", json=request) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"the server said {answer.status_code}: {(await answer.aread()).decode()[:300]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["delta"].get("content") is not None:
                last = time.perf_counter()
                first = first or last
            if event.get("usage"):
                made.prompt_tokens.append(event["usage"]["prompt_tokens"])
    made.ttft.append((first or time.perf_counter()) - began)
    made.tpot.append((last - first) / max(request["max_tokens"] - 1, 1))


async def one_round(client: Any, requests: Sequence[dict[str, Any]], concurrency: int) -> Round:
    """All requests, at most ``concurrency`` at a time."""
    made, gate, running = Round(0.0), asyncio.Semaphore(concurrency), True

    async def bounded(request: dict[str, Any]) -> None:
        async with gate:
            await ask(client, request, made)

    async def watch() -> None:
        total = cache_of((await client.get("/metrics")).text)["blocks"]
        while running and total is not None:
            if used := USAGE.search((await client.get("/metrics")).text):
                made.blocks = max(made.blocks or 0, round(float(used[1]) * total))
            await asyncio.sleep(0.2)

    watcher = asyncio.create_task(watch())
    began = time.perf_counter()
    await asyncio.gather(*map(bounded, requests))
    made.seconds = time.perf_counter() - began
    running = False
    await watcher
    return made


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
    import httpx

    try:
        return httpx.get(f"{url}/v1/models", timeout=30).raise_for_status().json()["data"][0]["id"]
    except httpx.HTTPError as error:
        raise OSError(f"{url} does not answer: {error}; start a server with `vtr serve`") from error


def measure(
    url: str, model: str, steps: Sequence[Load], rounds: int, side: int, seed: int, done: Callable[[], Any]
) -> dict[str, Any]:
    """All loads under all contenders, in turns.

    Args:
        url: the server, without ``/v1``. side: of the pictures, in pixels. done: called after each round.

    Raises:
        RuntimeError: the server refused a request. OSError: it cannot be reached.
    """
    import httpx

    async def everything() -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        limits = httpx.Limits(max_connections=None)
        try:
            async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
                server = await about(client)
                for load in steps:
                    rows += await _load(client, model, load, rounds, side, seed, done)
        except httpx.TransportError as error:
            raise OSError(f"{url} does not answer: {error}; start it with `vtr serve`") from error
        return {"server": server, "rows": rows}

    asked = {"model": model, "side": side, "rounds": rounds, "contenders": {k: list(v) for k, v in CONTENDERS.items()}}
    return {**asked, **asyncio.run(everything())}


async def _load(
    client: Any, model: str, load: Load, rounds: int, side: int, seed: int, done: Callable[[], Any]
) -> list[dict[str, Any]]:
    draw = np.random.default_rng([seed, load.concurrency, load.tokens])
    found: dict[str, list[Round]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds + 1):  # the first one warms up
        names = list(CONTENDERS)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            specs = CONTENDERS[name]
            requests = [
                body(model, specs[i % len(specs)], picture(draw, side), load.tokens) for i in range(load.requests)
            ]
            made = await one_round(client, requests, load.concurrency)
            if turn:
                found[name].append(made)
            done()
    base = [one.seconds for one in found["none"]]
    return [_row(name, load, found[name], base) for name in CONTENDERS]


def _row(name: str, load: Load, found: Sequence[Round], base: Sequence[float]) -> dict[str, Any]:
    ttft, tpot = ([1000 * t for one in found for t in getattr(one, what)] for what in ("ttft", "tpot"))
    gain = median_ratio(base, [one.seconds for one in found])
    blocks = [one.blocks for one in found if one.blocks is not None]
    return {
        "contender": name, "concurrency": load.concurrency, "requests": load.requests, "tokens": load.tokens,
        "per_second": statistics.median(load.requests / one.seconds for one in found),
        "gain": {"median": gain.value, "low": gain.low, "high": gain.high},
        "ttft_ms": {"median": statistics.median(ttft), "p90": float(np.percentile(ttft, 90))},
        "tpot_ms": {"median": statistics.median(tpot), "p90": float(np.percentile(tpot, 90))},
        "prompt_tokens": statistics.mean(n for one in found for n in one.prompt_tokens),
        "kv_blocks": max(blocks, default=0) or None,  # 0: over before it was looked at
    }  # fmt: skip


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Requests/s without reduction and what each policy makes of it, a line for each load, results side by side."""
    several = [list(result["contenders"])[1:] for result in results]
    heads = [
        f"{result['model']}: req/s | {' | '.join(f'{name} ÷ none' for name in names)}"
        for result, names in zip(results, several, strict=True)
    ]
    lines = [
        f"| at a time × tokens | {' | '.join(heads)} |",
        "|---|" + "--:|" * sum(len(names) + 1 for names in several),
    ]
    loads = dict.fromkeys((row["concurrency"], row["tokens"]) for row in results[0]["rows"])
    for load in loads:
        cells = []
        for result in results:
            for row in result["rows"]:
                if (row["concurrency"], row["tokens"]) == load:
                    gain = row["gain"]
                    spread = f"{gain['median']:.2f} ({gain['low']:.2f}–{gain['high']:.2f})"
                    cells.append(f"{row['per_second']:.1f}" if row["contender"] == "none" else spread)
        lines.append(f"| {load[0]} × {load[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> list[list[str]]:
    """A line for each load and contender."""
    return [
        [
            f"{row['concurrency']} × {row['tokens']}", row["contender"], f"{row['per_second']:.2f}",
            f"{row['gain']['median']:.2f} ({row['gain']['low']:.2f}–{row['gain']['high']:.2f})",
            f"{row['ttft_ms']['median']:.0f}", f"{row['ttft_ms']['p90']:.0f}", f"{row['tpot_ms']['median']:.1f}",
            f"{row['prompt_tokens']:.0f}", "—" if row["kv_blocks"] is None else str(row["kv_blocks"]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
