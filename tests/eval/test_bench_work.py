"""``vtr bench engine --count``: what is counted, how long turns are taken, and what is said of it."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner
from vtr.eval.cost import callgrind, engine, midsize, work
from vtr.eval.report import ratios

import vtr
from vtr.cli import app
from vtr.commands import _console

TINY = midsize.Size(6, 32, 64, 2, side=6, text_tokens=8, vocab_size=64, decode_tokens=(9, 10, 17), repeats=2)
NAMES = ["no_policy", "fastv", "gsearch", "pyramid"]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return work.measure(TINY, "cpu", fewest=4, most=6)


def test_every_ratio_has_its_spread_and_turns(result: dict[str, Any]) -> None:
    assert result["counted"] == "CPU time" and json.loads(json.dumps(result)) == result
    for name in NAMES:
        low, ratio, high = (result[f"counted_{name}{end}"] for end in ("_min", "", "_max"))
        assert all(map(math.isfinite, (low, ratio, high))) and 0 < low <= ratio <= high
        assert 4 <= result[f"counted_{name}_turns"] <= 6
        first, third = result[f"counted_{name}_quartiles"]
        assert first <= ratio <= third


def test_the_result_is_said_in_words(result: dict[str, Any]) -> None:
    rows = ratios.rows(result)
    assert [row[0] for row in rows] == [f"counted_{name}" for name in NAMES]
    assert all(row[3].startswith("CPU time of a prefill") for row in rows)
    said = " ".join(ratios.footer(result))
    assert "95 % intervals" in said and "gsearch" in said and "decode" not in said


def test_one_thread_while_it_is_measured() -> None:
    before, seen = torch.get_num_threads(), []
    work.measure(TINY, "cpu", fewest=2, most=2, done=lambda found: seen.append(torch.get_num_threads()))
    assert seen == [1] * len(NAMES) and torch.get_num_threads() == before


def test_turns_until_the_interval_is_narrow() -> None:
    order: list[str] = []

    def side(name: str, values: Any) -> Any:
        return lambda: (order.append(name), next(values))[1]

    same = work.compare(side("a", itertools.repeat(3.0)), side("b", itertools.repeat(2.0)), fewest=4, most=50)
    assert (same.ratio, same.turns, same.low, same.high) == (1.5, 4, 1.5, 1.5)
    assert "".join(order) == "ab" + "abba" * 2  # after one of each that warms up
    wild = work.compare(lambda: 1.0, side("b", itertools.cycle([1.0, 2.0, 4.0])), fewest=4, most=30)
    assert wild.turns == 30 and not wild.narrow


def test_the_interval_is_that_of_the_median() -> None:
    values = [1 + i / 100 for i in range(101)]
    low, high = work.interval_of_median(values)
    assert 1.3 < low < statistics.median(values) < high < 1.7
    assert work.interval_of_median(values) == (low, high)  # draws are the same every time


def test_cpu_time_of_this_thread() -> None:
    count = work.counter("cpu")
    before = count.read()
    sum(range(200_000))
    assert count.name == "CPU time" and count.read() > before


def test_auto_takes_instructions_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "instructions", lambda: work.Counter("instructions", lambda: 1.0))
    assert work.counter("auto").name == "instructions"


def test_without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SYSCALLS", {})
    assert work.counter("auto").name == "CPU time"
    with pytest.raises(RuntimeError, match="--count callgrind or --count cpu"):
        work.counter("instructions")
    with pytest.raises(ValueError, match="choose one of auto, instructions, cpu, callgrind"):
        work.counter("clock")


def test_instructions_are_counted_or_refused() -> None:
    try:
        count = work.instructions()
    except RuntimeError as error:
        assert "count" in str(error)
        return
    few, before = [], count.read()
    for n in (1_000, 1_000_000):
        sum(range(n))
        few.append(count.read() - before)
        before = count.read()
    assert few[1] > 50 * few[0] > 0 or sys.platform != "linux"


def test_what_is_counted_is_the_text_model() -> None:
    """A counter that grows by one a reading: two spans on the policy's side, one on the limit's."""
    stock = midsize.build(TINY, "cpu", torch.float32)
    bench = engine.Bench(TINY, stock, vtr.patch(midsize.twin(stock)), 1, 0)
    ticks = itertools.count()
    with torch.no_grad():
        sides = work.sides(work.Counter("ticks", lambda: float(next(ticks))), bench)
        assert {name: (over(), under()) for name, (over, under) in sides.items()} == {
            "no_policy": (2.0, 2.0), "fastv": (2.0, 1.0), "gsearch": (2.0, 1.0), "pyramid": (2.0, 1.0),
        }  # fmt: skip


def test_each_ratio_is_printed_as_it_comes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a terminal too: when the second one is begun, the first is there to be read."""
    seen: list[str] = []

    def compare(*_: Any) -> work.Compared:
        seen.append(capfd.readouterr().out)
        return work.summary([3.0, 3.0], [2.0, 2.0])

    monkeypatch.setattr(midsize, "SMALL", TINY)
    monkeypatch.setattr(work, "compare", compare)
    monkeypatch.setattr(_console, "console", Console(width=160))
    with pytest.raises(SystemExit) as done:
        app(["bench", "engine", "--small", "--count", "cpu"])
    assert not done.value.code
    assert seen == ["", *(f"counted_{name} 1.500 (exact, 2 turns)\n" for name in NAMES[:3])]


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(midsize, "SMALL", TINY)
    compare = work.compare
    monkeypatch.setattr(work, "compare", lambda over, under, fewest, most: compare(over, under, fewest, most=2))
    out = tmp_path / "work.json"
    told = ["bench", "engine", "--small", "--count", "cpu", "--repeats", "2", "--json", str(out)]
    done = CliRunner().invoke(app, told, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "counted_gsearch" in done.output and "95 %" in done.output
    saved = json.loads(out.read_text())
    assert saved["kind"] == "engine" and saved["counted"] == "CPU time" and saved["counted_pyramid"] > 0


@pytest.mark.parametrize(
    ("told", "says"),
    [(["--count", "clock"], "choose one of"), (["--count", "cpu", "--dtype", "bfloat16"], "leave out --device")],
)
def test_the_command_refuses(told: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["bench", "engine", "--small", *told], env={"COLUMNS": "160"})
    assert done.exit_code != 0 and says in " ".join(done.output.split())


# -- under valgrind ----------------------------------------------------------------------------------------------------
def test_valgrind_is_switched_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(callgrind, "control", lambda *words: told.append(words))
    switch = callgrind.Switch()
    switch.read()
    assert told == []  # while warming up
    assert switch.dump(lambda: [switch.read() for _ in range(4)]) == 2
    assert told == [("-i", "on"), ("-i", "off")] * 2 + [("--dump",)]


def test_what_a_dump_says(tmp_path: Path) -> None:
    dump = tmp_path / "out.1"
    dump.write_text("events: Ir\nsummary: 0\n\nfn=(1)\n1 2\n\ntotals: 1234567\n")
    assert callgrind.counted(dump) == 1234567
    dump.write_text("events: Ir\n")
    with pytest.raises(RuntimeError, match="no totals"):
        callgrind.counted(dump)


def test_without_valgrind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callgrind.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="valgrind is not installed"):
        callgrind.measure(TINY)


@pytest.mark.slow
@pytest.mark.skipif(not callgrind.available(), reason="needs valgrind")
def test_instructions_under_valgrind() -> None:
    out = callgrind.measure(TINY)
    assert out["counted"] == "instructions"
    for name in NAMES:
        assert out[f"counted_{name}_over"] > 1e5 and out[f"counted_{name}_under"] > 1e5
        assert 0.5 < out[f"counted_{name}"] < 20
