"""``vtr bench launches``: what its result and its tables hold, and how an earlier count is put beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from vtr.eval.cost import launches, midsize
from vtr.eval.report import counted, results
from vtr.eval.report.page import tables
from vtr.eval.report.page.data import read

from tests import result_files
from vtr.cli import app

TINY = midsize.Size(4, 16, 32, 1, side=6, text_tokens=20, vocab_size=64)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens and policies."""
    few = launches.policies
    monkeypatch.setattr(launches, "size_of", lambda layers: TINY)
    monkeypatch.setattr(launches, "policies", lambda *given: {k: p for k, p in few(*given).items() if k == "fastv"})
    monkeypatch.setattr(launches, "SEVEN", ("fastv",) * 7)


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["bench", "launches", "--layers", "4", "--dtype", "float32", *map(str, args)])


@pytest.mark.usefixtures("tiny")
def test_what_is_counted(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    said = run("--batch", 1, "--batch", 2, "--out", first, "--where", 3)
    assert said.exit_code == 0, said.output
    data = results.load(first)
    rows = {(row["policy"], row["batch"], row["ragged"]): row for row in data["rows"]}
    assert len(rows) == 3 * 3 + 2 and data["kind"] == "launches" and data["policies"] == {"fastv": "fastv:keep=0.25"}
    for at in ((1, False), (2, False), (2, True)):
        unpatched, patched, fastv = (rows[name, *at] for name in ("unpatched", "no policy", "fastv"))
        assert {**patched, "policy": "unpatched"} == unpatched
        assert fastv["prefill"]["launches"] > unpatched["prefill"]["launches"] > 100
    assert "prefill, launches" in said.output and "vtr/engine/" in said.output

    said = run("--batch", 1, "--against", first, "--out", second)
    assert said.exit_code == 0 and "before → after" in said.output
    ours = rows["fastv", 1, False]["prefill"]["launches"]
    shown = {row[0]: row[1] for row in counted.rows(results.load(second), "prefill")}
    assert shown["fastv"] == f"{ours:,} → {ours:,}"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--dtype", "int8"], "choose one of float32, bfloat16"),
        (["--layers", "2"], "give at least 4"),
        (["--batch", "0"], "at least one row"),
        (["--against", "engine.json"], "give what `vtr bench launches` wrote"),
        (["--against", "launches.json"], "was counted with --layers 8: give the same here"),
        (["--against", "none.json"], "No such file: none.json"),
        (["--out", "."], "is a folder"),
    ],
)
def test_what_cannot_be_counted_is_said_before(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launches, "measure", lambda *_: pytest.fail("counted"))
    result_files.write(tmp_path, "engine", "launches")
    result = run(*args)
    assert result.exit_code == 1 and said in " ".join(result.output.split())


def test_tables_show_every_case_and_what_was_before(tmp_path: Path) -> None:
    body = result_files.launches()
    results.save(tmp_path / "a.json", "launches", body, seed=0)
    main, prefill, waits, token, _ = tables.all_of(read(tmp_path / "a.json"))
    assert len(main.rows) == 9 and [column.label for column in prefill.columns[1:]] == [
        "B 1",
        "B 8 equal",
        "B 8 ragged",
    ]
    assert [cell.text for cell in prefill.rows[2].cells] == ["gsearch", "900", "5,100", "5,100"]
    assert [cell.text for cell in waits.rows[0].cells] == ["unpatched", "0 / 13", "0 / 104", "0 / 104"]
    assert token.rows[0].cells[3].text == "510" and "not times:" in token.caption
    before = [{**row, "prefill": {**row["prefill"], "launches": 7}} for row in body["rows"] if row["batch"] == 8]
    results.save(tmp_path / "b.json", "launches", {**body, "before": before}, seed=0)
    prefill = tables.all_of(read(tmp_path / "b.json"))[1]
    assert [cell.text for cell in prefill.rows[2].cells] == ["gsearch", "900", "7 → 5,100", "7 → 5,100"]
    assert "before → after" in prefill.caption
