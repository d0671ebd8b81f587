"""notebooks/search.ipynb: was run whole, and its code still runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BOOK = Path(__file__).parent.parent / "notebooks" / "search.ipynb"


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(BOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_was_run_whole_and_ended_well() -> None:
    ran = cells()
    assert len(ran) > 5
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    for cell in ran:
        assert not any(out["output_type"] == "error" for out in cell["outputs"])


@pytest.mark.slow
def test_the_code_of_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    for cell in cells():
        exec(compile("".join(cell["source"]), "notebook", "exec"), names)
    assert len(names["found"]) == len(names["sigmoid"]) == 10
