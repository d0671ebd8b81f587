"""The soak against a server that is made up: what it notices."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vtr.eval.cost import soak, soak_requests
from vtr.eval.cost.soak_requests import Asked

RIGHT = 7
"""The only token that this server says."""


class Server:
    """Answers at once, refuses what is malformed; ``faults`` say what it does wrong.

    Args:
        faults: "word", one of its answers is another; "takes", it takes what is malformed; "lost", every fifth request
            is to be sent again; "blocks", cache blocks stay in use.
    """

    def __init__(self, *faults: str) -> None:
        self.faults, self.asked = faults, 0

    def _answer(self, request: dict[str, Any]) -> tuple[int, list[int]]:
        self.asked += 1
        if "lost" in self.faults and self.asked % 5 == 0:
            return 500, []
        word = RIGHT + ("word" in self.faults and self.asked % 7 == 0)
        return 200, [word] * request["max_tokens"]

    async def post(self, path: str, json: Any = None, content: bytes = b"", headers: Any = None) -> Any:
        await asyncio.sleep(0)
        if json is None:
            return SimpleNamespace(status_code=200 if "takes" in self.faults else 400, text="malformed")
        status, tokens = self._answer(json)
        choices = [{"token_ids": tokens}]
        return SimpleNamespace(status_code=status, text="Internal server error", json=lambda: {"choices": choices})

    def stream(self, method: str, path: str, json: Any) -> Any:
        return Stream(*self._answer(json))

    async def get(self, path: str) -> Any:
        usage = 0.5 if "blocks" in self.faults else 0
        text = f"vllm:kv_cache_usage_perc{{}} {usage}\nvllm:num_requests_running{{}} 0.0\n"
        return SimpleNamespace(text=text, status_code=200)

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass


class Stream:
    def __init__(self, status: int, tokens: list[int]) -> None:
        self.status_code, self.tokens = status, tokens

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def aread(self) -> bytes:
        return b"Internal server error"

    async def aiter_lines(self) -> AsyncIterator[str]:
        for one in self.tokens:
            await asyncio.sleep(0)
            yield "data: " + json.dumps({"choices": [{"token_ids": [one]}]})
        yield "data: [DONE]"


def soaked(monkeypatch: pytest.MonkeyPatch, *faults: str) -> soak.Soak:
    """After 200 requests."""
    httpx = pytest.importorskip("httpx", reason="httpx (extra: serve) is not installed here")
    monkeypatch.setattr(httpx, "AsyncClient", lambda **how: Server(*faults))
    monkeypatch.setattr(soak, "DRAINED", 0.0)
    dice = random.Random(0)
    asked = [soak_requests.draw(dice) for _ in range(6)]
    known = [(one, [RIGHT] * one.tokens, [1.0] * one.tokens) for one in asked]
    return asyncio.run(soak.soak("http://192.0.2.1", "m", known, 200, 60, 4, 10, 0))


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    made = soaked(monkeypatch)
    assert made.notes.wrong == [] and made.notes.count == 206 and len(made.notes.fresh) == 10
    assert set(made.notes.done) == set(soak.WHAT)
    body = soak.summary(made, Counter(same=10))
    assert body["requests"] == 206 and body["wrong"] == [] and body["memory_mib"] == {} and body["again"] == 0
    assert json.loads(json.dumps(body)) == body


@pytest.mark.parametrize(
    ("fault", "what"),
    [("word", "known: Asked("), ("takes", "malformed: 200"), ("blocks", "at the end: cache blocks are not free")],
)
def test_what_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch, fault: str, what: str) -> None:
    wrong = soaked(monkeypatch, fault).notes.wrong
    assert wrong and all(one.startswith(what) for one in wrong)


def test_what_was_lost_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = soaked(monkeypatch, "lost")
    assert made.notes.again > 10 and made.notes.wrong == []


def test_a_server_that_goes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is over then, and what was found until then is told."""
    httpx = pytest.importorskip("httpx", reason="httpx (extra: serve) is not installed here")

    class Gone(Server):
        async def get(self, path: str) -> Any:
            raise httpx.ConnectError("nobody there")

    monkeypatch.setattr(sys.modules[__name__], "Server", Gone)
    made = soaked(monkeypatch)
    assert made.notes.wrong[0] == "/metrics: ConnectError: nobody there"
    assert made.notes.wrong[-1] == "at the end: the server is gone (ConnectError: nobody there)"
    assert made.notes.count < 200 and soak.summary(made, Counter())["wrong"]


def test_memory_that_grows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = soaked(monkeypatch)
    made.notes.memory = [{"1 server": 100.0 + i, "2 worker": 50.0} for i in range(20)]
    body = soak.summary(made, Counter())
    assert body["memory_mib"]["all"][0] == 150.5 and body["memory_mib"]["all"][-1] == 168.5
    assert body["wrong"] == ["memory: 150 MiB in the first tenth, 168 in the last"]


def test_words_that_are_equally_probable_may_change_places() -> None:
    assert soak_requests.verdict([1, 2], [1, 2], [0.5, 0.5]) == "same"
    assert soak_requests.verdict([1, 3], [1, 2], [0.5, 1e-5]) == "close"
    assert soak_requests.verdict([1, 3], [1, 2], [0.5, 0.5]) == "wrong"
    assert soak_requests.verdict([1], [1, 2], [0.5, 0.5]) == "wrong"


def test_requests_of_all_kinds_can_be_served() -> None:
    """Each good one passes the gate, and each policy can be served; of the malformed the gate refuses its part."""
    from vtr.integrations.vllm.gateway import Refused, checked

    dice = random.Random(0)
    for asked in (soak_requests.draw(dice) for _ in range(100)):
        assert checked(json.dumps(soak_requests.body("m", asked)).encode(), 10, {})
    refused = 0
    for body in soak_requests.malformed("m"):
        try:
            checked(body if isinstance(body, bytes) else json.dumps(body).encode(), 10, {})
        except Refused as error:
            assert error.status == 400
            refused += 1
    assert refused >= 20  # the others are vLLM's to refuse


def test_what_is_right() -> None:
    reference = soak_requests.Reference()
    tokens, margins = reference.says(Asked("inside", "what color is there", (0,), soak_requests.FASTV, 3))
    assert len(tokens) == len(margins) == 3 and min(margins) >= 0 and soak_requests.IMAGE not in tokens
