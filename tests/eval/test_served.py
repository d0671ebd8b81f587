"""A server's answers beside those of ``vtr eval``: the server is made up, the run is one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vtr.eval.accuracy import served
from vtr.eval.accuracy.data import open_data
from vtr.eval.report import results

QUESTIONS = 3
POLICIES = ["none", "pool:grid=6"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as ``vtr eval --out`` leaves it; every answer was right."""
    settings = {
        "data": "pocket", "limit": QUESTIONS, "seed": 0, "columns": {}, "instruction": "{question}", "metric": "exact",
        "max_new_tokens": 4, "policies": POLICIES,
    }  # fmt: skip
    with (tmp_path / "samples.jsonl").open("w") as file:
        for one in open_data("pocket", limit=QUESTIONS, seed=0):
            cells = {spec: {"said": one.answers[0], "score": 1.0} for spec in POLICIES}  # type: ignore[union-attr]
            row = {"index": one.index, "id": one.id, "question": one.question, "policies": cells}  # type: ignore[union-attr]
            file.write(json.dumps(row) + "\n")
    results.save(tmp_path / "results.json", "served", {"model": "pocket", "settings": settings}, seed=0)
    return tmp_path


class Server:
    """Says what is right, but under ``wrong`` something else once."""

    def __init__(self, wrong: str | None, status: int = 200) -> None:
        self.wrong, self.status, self.asked = wrong, status, list[dict[str, Any]]()
        found = open_data("pocket", limit=QUESTIONS, seed=0)
        self.answers = {one.question: one.answers[0] for one in found}  # type: ignore[union-attr]

    async def post(self, path: str, json: dict[str, Any]) -> Any:
        text = self.answers[json["messages"][0]["content"][1]["text"]]
        if json["vtr"] == self.wrong and not any(one["vtr"] == self.wrong for one in self.asked):
            text = "nothing"
        self.asked.append(json)
        body = {"choices": [{"message": {"content": f" {text}"}}]}
        return SimpleNamespace(status_code=self.status, text="no such policy", json=lambda: body)

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass


def compare(monkeypatch: pytest.MonkeyPatch, run: Path, server: Server) -> dict[str, Any]:
    httpx = pytest.importorskip("httpx", reason="httpx (extra: serve) is not installed here")
    monkeypatch.setattr(httpx, "AsyncClient", lambda **how: server)
    return served.compare(run, "http://192.0.2.1", "pocket", None, 2)


def test_answers_are_compared_one_by_one(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    server = Server("pool:grid=6")
    body = compare(monkeypatch, run, server)
    assert [request["vtr"] for request in server.asked] == [spec for spec in POLICIES for _ in range(QUESTIONS)]
    assert all(request["max_tokens"] == 4 and request["temperature"] == 0 for request in server.asked)
    none, pool = body["rows"]
    assert (none["equal"], none["accuracy"], none["differ"]) == (QUESTIONS, 1.0, [])
    assert pool["equal"] == QUESTIONS - 1 and pool["accuracy"] == pytest.approx(2 / 3)
    assert [one["server"] for one in pool["differ"]] == ["nothing"] and pool["accuracy_of_eval"] == 1.0
    assert "| `pool:grid=6` | 2 of 3 | 66.7 % | 100.0 % |" in served.markdown(body)


def test_a_refusal_ends_it(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    with pytest.raises(RuntimeError, match="the server said 400: no such policy"):
        compare(monkeypatch, run, Server(None, 400))


def test_questions_that_are_others_now(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    path = run / "samples.jsonl"
    path.write_text(path.read_text().replace('"question": "', '"question": "not '))
    with pytest.raises(ValueError, match="cannot be had again"):
        compare(monkeypatch, run, Server(None))
