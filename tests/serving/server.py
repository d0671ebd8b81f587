"""``vtr serve pocket`` in a process of its own, and requests to it."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving import engine as settings
from tests.serving.asked import STEPS, Asked

SMALL = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "3000", "--max-num-seqs", "8"]
SMALL += ["--max-num-batched-tokens", "128", "--limit-mm-per-prompt", '{"image": 3}']


@dataclass
class Server:
    """A server that is up. url: without ``/v1``."""

    url: str

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)


@contextmanager
def serving(
    folder: Path, *options: str, engine: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A small server, or with ``--upstream`` the gate alone.

    Args:
        folder: for its log. options: of ``vtr serve``. engine: more of vLLM's. environment: beside this process's own.
    """
    rest = [] if "--upstream" in options else ["--", *SMALL, *engine]
    with running(folder, *options, *rest, environment=environment) as made:
        yield made


@contextmanager
def running(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, model: str = "pocket"
) -> Iterator[Server]:
    """``vtr serve`` of a model with these arguments, from when it is up to the end of the block."""
    assert settings.os is os  # its environment: small, quiet, no hub
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vtr.cli", "serve", model, "--port", str(port), *arguments]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # frontend, scheduler and worker in processes of their own, as users have them
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(environment or {})},
        )
    made = Server(f"http://127.0.0.1:{port}")
    try:
        for _ in range(300):
            assert process.poll() is None, "the server ended: " + log.read_text()[-3000:]
            try:
                if made.get("/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(1)
        else:
            pytest.fail("the server did not come up: " + log.read_text()[-3000:])
        yield made
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def part(picture: Any) -> dict[str, Any]:
    """A picture as a part of a message."""
    raw = io.BytesIO()
    picture.save(raw, "PNG")
    url = "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def body(asked: Asked, **more: Any) -> dict[str, Any]:
    """What the OpenAI client is called with."""
    content = [*map(part, asked.images()), {"type": "text", "text": asked.question}]
    made = {
        "model": "pocket", "messages": [{"role": "user", "content": content}], "max_tokens": STEPS, "temperature": 0,
        "logit_bias": {"4": -100},
        # the pocket model's template leaves BOS to the tokenizer
        "extra_body": {"ignore_eos": True, "min_tokens": STEPS, "add_special_tokens": True},
    }  # fmt: skip
    if asked.policy is not None:
        made["extra_body"]["vtr"] = asked.policy
    return {**made, **more}


def ask(server: Server, requests: Sequence[dict[str, Any]]) -> list[Any]:
    """All at once; an answer or the error of each."""

    async def one(client: openai.AsyncOpenAI, request: dict[str, Any]) -> Any:
        try:
            return await client.chat.completions.create(**request)
        except openai.APIStatusError as error:
            return error

    async def everybody() -> list[Any]:
        url = server.url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
            return await asyncio.gather(*(one(client, request) for request in requests))

    return asyncio.run(everybody())
