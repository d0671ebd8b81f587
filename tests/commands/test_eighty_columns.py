"""Every table of the command line fits a terminal of eighty columns: no folded number, no broken word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner
from vtr.eval.cost import batch, policies, scale, serve_tables
from vtr.eval.report import ratios, results

import vtr
from vtr.cli import app
from vtr.commands import _bench, _console, bench_decode, bench_serve
from vtr.commands import eval as eval_command

RESULTS = Path(__file__).parents[2] / "eval" / "results"


def of_policies(body: Any) -> tuple[Any, ...]:
    columns, rows = policies.table(body, wide=False)
    return columns[:1], columns[1:], rows, True


def of_decode(body: Any) -> tuple[Any, ...]:
    heads, rows = bench_decode.table(body)
    return heads[:1], heads[1:], rows, True


TABLES: dict[str, Any] = {
    "policies": of_policies,
    "policies-anyres": of_policies,
    "batch": lambda body: (["eight rows"], ["ms", "÷ its rows alone", "÷ unpatched, padded"], batch.table(body), True),
    "scale": lambda body: (["what grows", "policy"], ["from", "to", "slope"], scale.table(body), True),
    "serve": lambda body: (["at a time × tokens"], bench_serve.WAITS, _bench.medians(serve_tables.table(body)), True),
    "serve-mid": lambda body: (
        ["at a time × tokens"],
        bench_serve.TAKEN,
        _bench.medians(serve_tables.taken(body)),
        True,
    ),
    "decode": of_decode,
    "engine": lambda body: (["ratio", "median", "min–max"], ["what ÷ what"], ratios.rows(body), False),
}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(width=80, record=True)
    monkeypatch.setattr(_console, "console", console)
    return console


@pytest.mark.parametrize("name", TABLES)
def test_bench_tables(name: str, narrow: Console) -> None:
    fixed, others, rows, right = TABLES[name](results.load(RESULTS / f"{name}.json"))
    _bench.show(fixed, others, rows, right=right)
    shown = narrow.export_text()
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    words = shown.split()
    for row in rows:
        for cell in row:
            for word in cell.replace(",", ", ").split() if len(cell) > 20 else cell.split():
                assert any(word in one for one in words), f"{word!r} of {cell!r} is broken"


@pytest.mark.parametrize("name", ["pocket", "pocket-joint", "pocket-internvl"])
def test_eval_tables(name: str, narrow: Console) -> None:
    body = results.load(RESULTS / f"{name}.json")
    eval_command.show(body)
    shown = narrow.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    table = shown[: shown.index(f"on {body['data']['name']}")]
    for row in body["policies"]:
        assert re.search(rf"^ *{re.escape(row['name'])}\b", table, re.M), f"{row['name']} is broken"


def test_list() -> None:
    shown = CliRunner().invoke(app, ["list"], env={"COLUMNS": "80"}).output
    assert max(map(len, shown.splitlines())) <= 80
    words = shown.split()
    for name in vtr.list_policies():
        assert name == "chain" or name in words
    for word in (
        "keep=0.5",
        "keeps=[0.5,0.25,0.125]",
        "pocket-internvl",
        "LlavaOnevisionForConditionalGeneration",
        "NAME",
    ):
        assert word in words
    assert "name:setting=value" in shown and "m3:tokens=144+fastv:keep=0.5" in shown


@pytest.mark.parametrize("name", vtr.list_policies())
def test_list_of_one_policy_says_what_every_setting_means(name: str) -> None:
    import dataclasses

    from vtr.about import meanings_of
    from vtr.settings import policy_class

    shown = CliRunner().invoke(app, ["list", name], env={"COLUMNS": "80"}).output
    assert f"vtr run --sample 0 --compare --policy {vtr.policy_class(name).example()}" in shown
    assert vtr.policy(vtr.policy_class(name).example()).name == name
    if name != "chain":
        cls = policy_class(name)
        meanings = meanings_of(cls)
        for field in dataclasses.fields(cls):
            assert len(meanings[field.name]) > 8, f"{name}: Args does not say what {field.name} means"
            assert field.name in shown.split()
