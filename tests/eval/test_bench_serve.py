"""``vtr bench serve`` against a server that is made up: what it counts and how it compares."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vtr.eval.cost import serve as bench
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
        self.running = self.most = 0
        self.status, self.seen = status, []  # type: ignore[var-annotated]

    def stream(self, method: str, path: str, json: dict[str, Any]) -> Stream:
        assert (method, path) == ("POST", "/v1/chat/completions") and json["stream"] and json["ignore_eos"]
        self.seen.append(json)
        return Stream(self, json)

    async def get(self, path: str) -> Any:
        assert path == "/metrics"
        blocks = 'vllm:cache_config_info{block_size="16",enable_prefix_caching="False",num_gpu_blocks="200"} 1.0'
        text = blocks + '\nvllm:kv_cache_usage_perc{engine="0"} 0.25\n'
        return SimpleNamespace(text=text)


def test_a_load() -> None:
    server, done = Server(), []
    rows = asyncio.run(bench._load(server, "m", Load(2, 4, 5), 2, 16, 0, lambda: done.append(1)))
    assert len(done) == 3 * len(CONTENDERS) and len(server.seen) == 4 * len(done) and server.most == 2
    pictures = [request["messages"][0]["content"][0]["image_url"]["url"] for request in server.seen]
    assert len(set(pictures)) == len(pictures)  # no cache can help
    assert [row["contender"] for row in rows] == list(CONTENDERS)
    none, fixed, mixed = rows
    assert (none["prompt_tokens"], fixed["prompt_tokens"]) == (99, 9) and 9 < mixed["prompt_tokens"] < 99
    assert none["gain"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert all(row["kv_blocks"] == 50 and row["ttft_ms"]["median"] > 0 and row["tpot_ms"]["median"] > 0 for row in rows)
    lines = bench.table({"rows": rows})
    assert len(lines) == 3 and lines[0][:2] == ["2 × 5", "none"] and lines[0][-1] == "50"


def test_loads_do_not_share_pictures() -> None:
    server = Server()
    for load in (Load(2, 2, 1), Load(2, 2, 3), Load(1, 2, 1)):
        asyncio.run(bench._load(server, "m", load, 1, 16, 0, lambda: None))
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
    assert bench.markdown(measured) in (ROOT / "docs/serving.md").read_text()


def test_a_refusal_is_not_a_fast_answer() -> None:
    with pytest.raises(RuntimeError, match="the server said 400: no such policy"):
        asyncio.run(bench._load(Server(400), "m", Load(1, 1, 5), 1, 16, 0, lambda: None))


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
