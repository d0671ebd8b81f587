"""notebooks/search.ipynb: its code runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BOOK = Path(__file__).parents[2] / "notebooks" / "search.ipynb"


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(BOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_code_of_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    for cell in cells():
        if cell["id"] != "install":  # IPython's own, and vtr is here
            exec(compile("".join(cell["source"]), "notebook", "exec"), names)
    assert len(names["found"]) == len(names["sigmoid"]) == 10
