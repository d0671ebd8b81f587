"""``vtr bench decode``: what its result holds, that nothing is left out silently, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import CompileConfig, StaticCache
from typer.testing import CliRunner
from vtr.eval.cost import decode, midsize
from vtr.eval.report import decoded, plots, results
from vtr.eval.report.page import markdown, tables
from vtr.eval.report.page.data import read

import vtr
from tests import result_files
from vtr.cli import app
from vtr.commands import _console

TINY = midsize.Size(4, 32, 64, 2, side=6, text_tokens=8, vocab_size=64)


class Growing(decode.Way):
    """A way that is given a growing cache whatever it is called."""

    def told(self, device: torch.device) -> dict[str, Any]:
        return {}


class Refused(decode.Way):
    """A way that vtr has no cache for."""

    def told(self, device: torch.device) -> dict[str, Any]:
        return {"cache_implementation": "quantized"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo traces and nothing is built."""

    def traced(device: torch.device) -> CompileConfig:
        config = CompileConfig(fullgraph=True, backend="eager", mode="default")
        config._compile_all_devices = True  # type: ignore[assignment]
        return config

    monkeypatch.setattr(decode, "compiling", traced)
    monkeypatch.setattr(decode, "NARROW", TINY)
    yield
    torch.compiler.reset()


def ways(monkeypatch: pytest.MonkeyPatch, **ways: decode.Way) -> None:
    """Some ways replaced by others."""
    monkeypatch.setattr(decode, "WAYS", {**decode.WAYS, **ways})


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["bench", "decode", *map(str, args)], env={"COLUMNS": "160"})


# ---------------------------------------------------------------------------------------------------- what is measured
@pytest.mark.usefixtures("quick")
def test_every_way_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ways(monkeypatch, vtr_static=Growing(True), vtr_static_compiled=Growing(True))
    threads, seen = torch.get_num_threads(), []
    found = decode.measure(TINY, names=["fastv", "keep-all", "mixed"], batches=[8], tokens=[9], found=seen.append)
    assert json.loads(json.dumps(found)) == found and found["rows"] == seen
    assert torch.get_num_threads() == threads and found["threads"] == 1
    for row in found["rows"]:
        assert list(row["ways"]) == list(decoded.WORDS) == list(decode.WAYS)
        for name, way in row["ways"].items():
            assert way["refused"] is None and way["ratio"]["low"] <= way["ratio"]["high"]
            assert way["ms"]["median"] > 0 and 0 < way["kv_live"] <= way["kv_allocated"]
            assert (way["compile_s"] is None) == (name != "hf_static_compiled") and way["graphs_while_timed"] == 0
            assert way["same_tokens"] is True or not name.startswith("vtr")
        assert row["ways"]["hf"]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert row["ways"]["hf_static_compiled"]["graphs"] == 1
    fastv, alike, mixed = (row["ways"] for row in found["rows"])
    assert all(way["same_tokens"] for way in alike.values()), "equal lengths: transformers says the same"
    # an image of 36 tokens and a text of 8; of nine timed tokens, four before and one of the prompt all but one cached
    cached, token = 8 * (36 + 8 + 9 + decode.WARM), 2 * 32 * 4
    assert alike["hf"]["kv_live"] == alike["hf"]["kv_allocated"] == alike["vtr"]["kv_live"] == 4 * cached * token
    assert fastv["vtr"]["kv_live"] == (4 * cached - 2 * 8 * 27) * token
    assert mixed["hf"]["kv_live"] < mixed["hf"]["kv_allocated"], "padding is not live"
    assert len(found["rows"][2]["specs"]) == 8 and "none" in found["rows"][2]["specs"]


@pytest.mark.usefixtures("quick")
def test_what_cannot_run_is_said_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ways(monkeypatch, vtr_static=Refused(True, True), vtr_static_compiled=Growing(True, True, True))
    found = decode.measure(TINY, names=["fastv"], batches=[1], tokens=[8])
    row = found["rows"][0]["ways"]
    assert "quantized" in row["vtr_static"]["refused"] and list(row["vtr_static"]) == ["refused"]
    assert row["vtr_static_compiled"]["refused"].endswith("transformers compiled nothing")
    assert all(row[name]["refused"] is None for name in ("hf", "hf_static_compiled", "vtr"))
    said = "\n".join(decoded.lines(found["rows"][0]) + decoded.refusals(found))
    assert said.count("compiled nothing") == 2 and said.count("quantized") == 2
    assert decoded.goals(found) == [], "what was not measured has reached nothing"


def test_without_transformers_own_way_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: decode.Run, criteria: Any) -> None:
        raise RuntimeError("no such luck\nat all")

    monkeypatch.setattr(decode.Run, "decode", fails)
    with pytest.raises(RuntimeError, match=r"cannot decode: RuntimeError: no such luck$"):
        decode.measure(TINY, names=["fastv"], batches=[1], tokens=[8])


def test_static_ways_ask_for_a_static_cache() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name, way in decode.WAYS.items():
        told = way.told(cpu)
        assert way.static == (told.get("cache_implementation") == "static") == ("static" in name)
        assert way.compiled == ("compile_config" in told) == ("compiled" in name)
        assert way.patched == name.startswith("vtr")
    assert decode.WAYS["vtr_static"].told(cpu)["disable_compile"], "on a GPU transformers would compile by itself"
    one, other = (decode.WAYS["vtr_static_compiled"].told(device)["compile_config"] for device in (cpu, cuda))
    assert one.fullgraph and one._compile_all_devices
    assert other.fullgraph and not other._compile_all_devices and other.mode == "reduce-overhead"


def test_bytes_of_a_static_cache() -> None:
    stock = midsize.build(TINY, "cpu", torch.float32)
    inputs = midsize.prompts(stock, TINY, [(1, 8), (0, 6)])
    cache = StaticCache(config=stock.config.get_text_config(decoder=True), max_cache_len=60)
    for layer in range(TINY.layers):
        cache.update(torch.ones(2, 2, 44, 16), torch.ones(2, 2, 44, 16), layer)
    assert decode.cache_bytes(cache, inputs) == ((44 + 6) * 4 * 2 * 32 * 4, 2 * 60 * 4 * 2 * 32 * 4)


def test_what_compiling_took_is_that_of_the_tokens_that_compiled() -> None:
    case = decode.Case("fastv", [(None, True, 8)], 8)
    run = decode.Run(decode.WAYS["hf_static_compiled"], None, {}, case)
    run.close([np.array([5.0, 31.0, 1.0]), *[np.array([0.5, 1.0, 0.0])] * 11])
    assert run.compile_seconds == 30.0 and run.graphs == 1 and run.seconds == [0.5] * 8 and run.refused is None


def test_the_cases() -> None:
    stock = midsize.build(TINY, "cpu", torch.float32)
    found = decode.cases(stock, TINY, decode.EVERY, [1, 8], [8, 16])
    assert len(found) == 2 * (2 * len(decode.EVERY) - 1), "one row is not mixed"
    policies = {case.name: case.policies[0] for case in found}
    assert policies["fastv"] == vtr.FastV(0.25, layer=2) and policies["keep-all"] == vtr.FastV(1.0, layer=2)
    forgets = policies["dynamic-llava"]
    assert forgets is not None and forgets.asks("remember")
    own = decode.cases(stock, TINY, ["random:keep=0.5"], [3], [8])
    assert [(case.name, case.policies) for case in own] == [("random:keep=0.5", [vtr.Random(0.5)] * 3)]


# --------------------------------------------------------------------------------------------------------- the command
@pytest.mark.usefixtures("quick")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways(monkeypatch, vtr_static=Refused(True, True))
    asked = ["--small", "--tokens", 8, "--batch", 2, "--policy", "fastv", "--policy", "random:keep=0.5"]
    done = run(*asked, "--out", tmp_path / "some.json", "--plot", tmp_path / "plots" / "some.svg")
    assert done.exit_code == 0, done.output
    data = results.load(tmp_path / "some.json")
    assert data["kind"] == "decode" and [row["policy"] for row in data["rows"]] == ["fastv", "random:keep=0.5"]
    assert (tmp_path / "some.png").exists() and (tmp_path / "plots" / "some.svg").exists()
    assert "fastv, 2 rows, 8 tokens" in done.output and "refused" in done.output and "quantized" in done.output
    done = run("--small", "--tokens", 8, "--batch", 1, "--policy", "fastv", "--out", tmp_path / "folder")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"decode.json", "decode.png"}


def test_each_case_is_printed_as_it_comes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a terminal too: when the second case begins, the first is there to be read."""
    rows, seen = iter(result_files.decode()["rows"]), []

    def one(*_: Any) -> dict[str, Any]:
        seen.append(capfd.readouterr().out)
        return next(rows)

    monkeypatch.setattr(decode, "measure_case", one)
    monkeypatch.setattr(decode, "NARROW", TINY)
    monkeypatch.setattr(_console, "console", Console(width=160))
    with pytest.raises(SystemExit) as done:
        app(["bench", "decode", "--small", "--policy", "fastv", "--tokens", "8"])
    assert not done.value.code
    assert seen[0] == "" and seen[1].startswith("fastv, 1 row, 64 tokens\n  HF dynamic ") and seen[1].count("\n") == 6


def test_help_teaches() -> None:
    text = " ".join(run("--help").output.split())
    for word in (*decode.EVERY, "HF static, compiled", "--tokens", "--plot", "vtr bench decode --small", "refused"):
        assert word in text, word


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--batch", 0], "at least one row"),
        (["--tokens", 4], "decode at least 8"),
        (["--policy", "mixed", "--batch", 1], "at least two rows"),
        (["--policy", "fastvv"], "did you mean fastv?"),
        (["--policy", "fastv:layer=9"], "layer"),
        (["--plot", "plot.txt"], "name a .png, .pdf or .svg file"),
        (["--out", "there.txt"], "this is a file"),
        (["--plot", "."], "is a folder"),
        (["--dtype", "int8"], "choose one of float32, bfloat16"),
        (["--device", "tpu"], "choose cpu or cuda"),
    ],
)
def test_mistakes_are_said_before(args: list[Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").touch()
    monkeypatch.setattr(decode, "measure_case", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(decode, "NARROW", TINY)
    done = run("--small", *args)
    assert done.exit_code == 1 and said in done.output and len(done.output.strip().splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- what is shown
def test_lines_tables_and_goals(tmp_path: Path) -> None:
    body = result_files.decode()
    results.save(tmp_path / "decode.json", "decode", body, seed=0)
    main, short, every = tables.all_of(read(tmp_path / "decode.json"))
    assert [len(one.rows) for one in (main, short, every)] == [3, 2, 15]
    assert len(main.columns) == 8 and len(short.columns) == 5
    assert main.rows[2].cells[-1].text == short.rows[1].cells[-1].text == "refused"
    value = body["rows"][1]["ways"]["vtr_static_compiled"]["ratio"]["value"]
    assert short.rows[0].cells[-1].value == main.rows[1].cells[-1].value == round(value, 2)
    assert "cannot be had [mixed, 8 rows, 64 tokens]" in every.caption
    assert "| `fastv` | 8 | 64 |" in markdown.table(main)
    goals = decoded.goals(body)
    assert goals[0].startswith("fastv, 8 rows, 64 tokens: 0.5") and goals[0].endswith("the goal is 0.55: reached")
    assert goals[1] == "below HF static, compiled, in 2 of 2 cases: reached"
    slow = body["rows"][1]["ways"]["vtr_static_compiled"]
    slow["ratio"]["value"], slow["over_hf_static"]["value"], slow["same_tokens"] = 0.56, 1.0, False
    slow |= {"graphs": 3, "graphs_while_timed": 2}
    wrong = decoded.goals(body)
    assert wrong[0].endswith("not reached") and wrong[1].endswith("in 1 of 2 cases: not reached")
    assert wrong[2] == "says other tokens than vtr with a dynamic cache: vtr static, compiled: fastv, 8 rows, 64 tokens"
    assert decoded.lines(body["rows"][1])[-1].endswith("compiled in 31 (3 graphs, 2 of them while timed) s")


def test_the_plot_has_a_bar_for_each_way_that_ran() -> None:
    figure = plots.decode(result_files.decode())
    assert [len(axes.patches) for axes in figure.axes] == [4, 7]
    legend = figure.axes[0].get_legend()
    assert legend is not None and len(legend.get_texts()) == 4
