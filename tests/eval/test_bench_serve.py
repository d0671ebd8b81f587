"""``vtr bench serve`` against a server that is made up: what it counts and how it compares."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vtr.eval.cost import serve as bench
from vtr.eval.cost import serve_contenders, serve_tables, served_by
from vtr.eval.cost.serve import CONTENDERS, Load
from vtr.eval.report import plots

from tests import result_files

ROOT = Path(__file__).parents[2]


class Stream:
    def __init__(self, server: Server, request: dict[str, Any]) -> None:
        self.server, self.request = server, request
        self.status_code = server.status

    async def __aenter__(self) -> Stream:
        self.server.running += 1
        self.server.most = max(self.server.most, self.server.running)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.server.running -= 1

    async def aread(self) -> bytes:
        return b"no such policy"

    async def aiter_lines(self) -> AsyncIterator[str]:
        yield ": comment"
        for i in range(self.request["max_tokens"]):
            await asyncio.sleep(0.001)
            yield "data: " + json.dumps({"choices": [{"delta": {"content": str(i)}}]})
        yield "data: " + json.dumps(
            {"choices": [], "usage": {"prompt_tokens": 9 if "m3" in self.request["vtr"] else 99}}
        )
        yield "data: [DONE]"


class Server:
    """Answers as vLLM does; also its metrics."""

    def __init__(self, status: int = 200) -> None:
        self.running = self.most = self.looks = 0
        self.status, self.seen = status, []  # type: ignore[var-annotated]

    def stream(self, method: str, path: str, json: dict[str, Any]) -> Stream:
        assert (method, path) == ("POST", "/v1/chat/completions") and json["stream"] and json["ignore_eos"]
        self.seen.append(json)
        return Stream(self, json)

    async def get(self, path: str) -> Any:
        assert path == "/metrics"
        blocks = 'vllm:cache_config_info{block_size="16",enable_prefix_caching="False",num_gpu_blocks="200"} 1.0'
        self.looks += 1
        text = blocks + '\nvllm:kv_cache_usage_perc{engine="0"} 0.25\n'
        text += f'vllm:num_requests_running{{engine="0"}} {self.running}.0\n'
        text += f'vllm:num_preemptions_total{{engine="0"}} {self.looks}.0\n'
        return SimpleNamespace(text=text)


def behind(server: Server, contenders: Mapping[str, Any] = CONTENDERS) -> dict[str, bench.Behind]:
    """One server for all contenders."""
    return dict.fromkeys(contenders, bench.Behind(server))


def test_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "EVERY", 0.001)
    server, done = Server(), []
    rows = asyncio.run(bench._load(behind(server), "m", Load(2, 4, 5), 2, 16, 0, lambda: done.append(1)))
    assert len(done) == 3 * len(CONTENDERS) and len(server.seen) == 4 * len(done) and server.most == 2
    pictures = [request["messages"][0]["content"][0]["image_url"]["url"] for request in server.seen]
    assert len(set(pictures)) == len(pictures)  # no cache can help
    assert [row["contender"] for row in rows] == list(CONTENDERS)
    none, fixed, mixed = rows
    assert (none["prompt_tokens"], fixed["prompt_tokens"]) == (99, 9) and 9 < mixed["prompt_tokens"] < 99
    assert none["gain"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert all(row["kv_blocks"] == 50 and row["ttft_ms"]["median"] > 0 and row["tpot_ms"]["median"] > 0 for row in rows)
    lines = serve_tables.table({"rows": rows})
    assert len(lines) == 3 and lines[0][:2] == ["2 × 5", "none"]
    assert all(row["running"] == 2 and 25 <= row["blocks_each"] <= 50 and row["preemptions"] >= 2 for row in rows)
    line = serve_tables.taken({"rows": rows})[0]
    assert line == ["2 × 5", "none", "50", str(round(none["blocks_each"])), "2", str(none["preemptions"]), "—", "—"]


def test_two_servers_in_turns() -> None:
    """The second one is what the first is compared with; what a server's processes took is compared as well."""

    class Counted:
        def __init__(self, each: float) -> None:
            self.each, self.now = each, 0.0

        def seconds(self) -> float:
            self.now += self.each
            return self.now

    plain, other = Server(), Server()
    servers = {"none": bench.Behind(plain, Counted(0.2)), "here": bench.Behind(other, Counted(0.4))}  # type: ignore[arg-type]
    contenders = {"none": ["none"], "here": ["none"]}
    rows = asyncio.run(bench._load(servers, "m", Load(2, 4, 5), 2, 16, 0, lambda: None, contenders))
    assert len(plain.seen) == len(other.seen) == 12 and {request["vtr"] for request in plain.seen} == {"none"}
    assert [row["cpu_ms"] for row in rows] == pytest.approx([50, 100])
    assert rows[1]["cpu_gain"] == pytest.approx({"median": 0.5, "low": 0.5, "high": 0.5})
    assert serve_tables.taken({"rows": rows})[1][-2:] == ["100", "0.50 (0.50–0.50)"]


def test_loads_of_ones_own() -> None:
    assert bench.load_of("8x128") == Load(8, 16, 128) and bench.load_of("16×64x40") == Load(16, 40, 64)
    for wrong in ("8", "8x", "0x4", "8x-1", "axb", "1x2x3x4"):
        with pytest.raises(ValueError, match="AT_A_TIME"):
            bench.load_of(wrong)
    assert {(one.concurrency, one.tokens) for one in bench.loads(False, inside=True)} == {
        (at, tokens) for at in (1, 8, 32) for tokens in (16, 128)
    }


def test_contenders_of_ones_own() -> None:
    given = ["fastv:keep=0.5,layer=2", "mine=none;pool:grid=6", "none"]
    named = {"none": ["none"], "fastv": ["fastv:keep=0.5,layer=2"], "mine": ["none", "pool:grid=6"]}
    assert serve_contenders.named(given) == named
    for wrong in (["mine="], ["fastv:keep=0.5", "fastv:keep=0.25"]):
        with pytest.raises(ValueError, match="--policy"):
            serve_contenders.named(wrong)


@pytest.mark.parametrize("depth", [6, 10, 32])
def test_contenders_inside_the_decoder(depth: int) -> None:
    """They can be served at this depth, and have one mean budget."""
    from vtr.integrations.vllm.inside.asked import divided, entering

    import vtr

    found = serve_contenders.inside(depth)
    share = {}
    for name, (spec, *_) in found.items():
        before, inside = divided(spec, depth)
        if name in ("fastv", "gsearch"):
            share[name] = sum(entering(vtr.policy(inside), depth, [10_000])) / depth / 10_000
        assert (before != "none") == (name == "before") and (inside != "none") == (
            name in ("fastv", "gsearch", "pyramid")
        )
    assert share["fastv"] == pytest.approx(share["gsearch"], abs=1e-3)
    assert f"retention={round(share['fastv'], 4)}" in found["before"][0]
    with pytest.raises(ValueError, match="too shallow"):
        serve_contenders.inside(4)


def test_an_answer_that_breaks_off() -> None:
    class Breaks(Stream):
        async def aiter_lines(self) -> AsyncIterator[str]:
            yield 'data: {"error": {"message": "failed on an image"}}'

    server = Server()
    server.stream = lambda method, path, json: Breaks(server, json)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="failed on an image"):
        asyncio.run(bench._load(behind(server), "m", Load(1, 1, 5), 1, 16, 0, lambda: None))


def test_processes_of_a_server_on_this_machine() -> None:
    psutil = pytest.importorskip("psutil")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        found = served_by.Processes.behind(f"http://127.0.0.1:{listening.getsockname()[1]}")
        assert found is not None and os.getpid() in found.pids
        assert found.seconds() > 0 and sum(found.resident().values()) == pytest.approx(
            psutil.Process().memory_info().rss / 2**20, rel=0.5
        )
    assert served_by.Processes.behind("http://192.0.2.1:80") is None


def test_loads_do_not_share_pictures() -> None:
    server = Server()
    for load in (Load(2, 2, 1), Load(2, 2, 3), Load(1, 2, 1)):
        asyncio.run(bench._load(behind(server), "m", load, 1, 16, 0, lambda: None))
    pictures = [request["messages"][0]["content"][0]["image_url"]["url"] for request in server.seen]
    assert len(set(pictures)) == len(pictures) == 3 * 2 * 2 * len(CONTENDERS)


def test_what_a_server_says_of_itself() -> None:
    class Told(Server):
        async def get(self, path: str) -> Any:
            if path == "/version":
                return SimpleNamespace(status_code=200, json=lambda: {"version": "0.32.0"})
            return await super().get(path)

    assert asyncio.run(bench.about(Told())) == {
        "vllm": "0.32.0", "blocks": 200, "block_size": 16, "prefix_caching": "False",
    }  # fmt: skip
    assert bench.cache_of("nothing") == {"blocks": None, "block_size": None, "prefix_caching": None}


def test_the_plot_has_a_bar_for_each_load_and_contender() -> None:
    result = result_files.serve()
    figure = plots.serve(result)
    assert [len(axes.patches) for axes in figure.axes] == [len(result["rows"])] * 4
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(result["contenders"])
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sorted(heights) == sorted(row["gain"]["median"] for row in result["rows"])


def test_the_docs_have_the_measured_figures() -> None:
    measured = [json.loads((ROOT / f"eval/results/{name}.json").read_text()) for name in ("serve", "serve-mid")]
    assert serve_tables.markdown(measured) in (ROOT / "docs/serving.md").read_text()


def test_a_refusal_is_not_a_fast_answer() -> None:
    with pytest.raises(RuntimeError, match="the server said 400: no such policy"):
        asyncio.run(bench._load(behind(Server(400)), "m", Load(1, 1, 5), 1, 16, 0, lambda: None))


def test_pictures_are_the_seeds() -> None:
    one, two = (bench.picture(np.random.default_rng(seed), 24) for seed in (0, 0))
    assert one == two != bench.picture(np.random.default_rng(1), 24)


def test_nobody_there() -> None:
    pytest.importorskip("httpx", reason="httpx (extra: serve) is not installed here")
    with pytest.raises(OSError, match="vtr serve"):
        bench.first_model("http://127.0.0.1:9")
    with pytest.raises(OSError, match="vtr serve"):
        bench.measure("http://127.0.0.1:9", "m", [Load(1, 1, 1)], 1, 16, 0, lambda: None)


def test_every_contender_can_be_served() -> None:
    from vtr.integrations.vllm.specs import spec_of

    assert all(spec_of(spec, 10) == spec for specs in CONTENDERS.values() for spec in specs)
