"""Parsers that meet strangers, given whatever hypothesis draws: refusals in words, in bounded time and memory.

A few cases in every run; `.ci/full` draws 2,000 of each with a fresh seed. By hand:
`pytest tests/data/test_fuzz.py --hypothesis-profile=fuzz --hypothesis-seed=1`.
"""

from __future__ import annotations

import json
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import vtr.eval.accuracy.blind  # "diverse"
from hypothesis import example, given
from hypothesis import strategies as st
from vtr.integrations.vllm import bodies as bodies_of
from vtr.integrations.vllm.gateway import Gateway
from vtr.integrations.vllm.specs import RequestError, read, spec_of

import vtr
from tests.integrations.test_gateway import exchanged
from tests.policies.test_limits import EXTREME, settings

SECONDS, BYTES = 0.5, 64 * 2**20
"""What a case may cost: of its thread's time, of memory at its peak."""


@contextmanager
def bounded(work: Callable[[], Any]) -> Iterator[None]:
    """Check what ``work`` costs when it runs again, once what it does has been looked at."""
    yield
    took = []
    while not took or (min(took) >= SECONDS and len(took) < 3):  # others use this machine too
        tracemalloc.start()
        start = time.thread_time()
        work()
        took.append(time.thread_time() - start)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < BYTES, peak
    assert min(took) < SECONDS, took


# -- spec strings ------------------------------------------------------------------------------------------------------
numbers = st.integers() | st.floats() | st.integers(-(2**70), 2**70)
values = st.recursive(
    numbers | st.booleans() | st.none() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=30,
)
written = values.map(json.dumps) | st.sampled_from(EXTREME) | st.text(max_size=30)
one = st.tuples(st.sampled_from(settings()), st.lists(st.tuples(st.sampled_from(settings()), written), max_size=3))
named = one.map(lambda drawn: drawn[0][0] + ":" + ",".join(f"{s}={v}" for (_, s), v in drawn[1]))
own = st.sampled_from(settings()).flatmap(lambda s: written.map(lambda v: f"{s[0]}:{s[1]}={v}"))
specs = st.lists(own | named | st.text(max_size=40), min_size=1, max_size=3).map("+".join)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(specs)
@example("m3:tokens=" + "[" * 5000)
@example("+".join(["m3"] * 5000))
def test_spec_strings(spec: str) -> None:
    def make() -> vtr.Policy | None:
        try:
            return vtr.policy(spec)
        except (ValueError, TypeError, OSError) as error:
            assert len(str(error)) < 3000
            return None

    def serve() -> str | None:
        try:
            return spec_of(spec, 32)
        except RequestError as error:
            assert 0 < len(str(error)) <= 600
            return None

    with bounded(make):
        made = make()
        if made is not None and not getattr(made, "folder", None):
            assert vtr.policy(made.spec) == made or "NaN" in made.spec
    with bounded(serve):
        served = serve()
        if served is not None:
            assert len(served) < 2000 and read([served], 1, 32) == [served]


# -- bodies ------------------------------------------------------------------------------------------------------------
parts = st.fixed_dictionaries({"type": st.sampled_from(["image_url", "text", "image", ""])}) | values
messages = st.lists(st.fixed_dictionaries({"content": st.lists(parts, max_size=4) | values}) | values, max_size=3)
asked = specs | st.lists(specs | st.none() | values, max_size=4) | values
options = st.dictionaries(st.sampled_from(["vtr", "do_resize"]) | st.text(max_size=5), asked, max_size=3) | values
requests = st.fixed_dictionaries(
    {"model": values}, optional={"messages": messages, "vtr": asked, "mm_processor_kwargs": options, "x": values}
)
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1"])
whole = st.tuples(requests | values, encodings).map(lambda drawn: json.dumps(drawn[0]).encode(drawn[1]))
cut = st.tuples(whole, st.integers(0, 400), st.binary(max_size=8), st.integers(0, 8)).map(
    lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + drawn[3] :]
)
bodies = whole | cut | st.binary(max_size=200)


def through(body: bytes, chunk: int) -> tuple[int, Any, list[Any]]:
    """(status, answer of the gate, bodies that the server got)."""
    seen: list[Any] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        got = await receive()
        assert dict(scope["headers"])[b"content-length"] == str(len(got["body"])).encode() and not got["more_body"]
        seen.append(json.loads(got["body"], parse_constant=pytest.fail))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    gate = Gateway(server, 32)
    try:
        sent = exchanged(gate, body, max(chunk, len(body) // 500))  # a part has a cost of its own, whatever it says
    finally:
        gate.readers.shutdown()
    assert (gate.open, gate.held) == (0, 0)
    return sent[0]["status"], json.loads(sent[1]["body"]), seen


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(bodies, st.integers(1, 300))
@example(b'{"x":' * 3000, 300)
@example(b'{"model":"m","vtr":"gsearch:schedule=[1.0],layers=20000000","messages":[]}', 300)
def test_bodies(body: bytes, chunk: int) -> None:
    with bounded(lambda: through(body, chunk)):
        status, answer, seen = through(body, chunk)
        if status != 200:
            assert status in (400, 413) and seen == [] and 5 < len(answer["error"]["message"]) <= 1100
            return
        (got,) = seen
        assert "vtr" not in got and "media_io_kwargs" not in got
        assert set(got.get("mm_processor_kwargs") or {}) <= {"vtr"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given_to = (got.get("mm_processor_kwargs") or {}).get("vtr")
            for one in given_to if isinstance(given_to, list) else [given_to]:
                spec_of(one, 32)


strings = st.text(alphabet='a"\\\\[,é\\n', max_size=200) | st.text(alphabet="ab+/=", min_size=60, max_size=200)


@given(st.recursive(strings | st.integers(), lambda v: st.lists(v) | st.dictionaries(strings, v), max_leaves=20))
def test_long_strings_come_back(drawn: Any) -> None:
    """A body whose long strings are taken out says the same as before."""
    asked = {"model": "m", "x": drawn}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies_of, "LONG", 64)
        for ascii_only in (True, False):
            request, taken = bodies_of.read(json.dumps(asked, ensure_ascii=ascii_only).encode())
            assert json.loads(bodies_of.write(request, taken)) == asked
