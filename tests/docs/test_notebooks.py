"""The saved notebooks: their code ran, animations show where notebooks are only read, and they end well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.parametrize("book", BOOKS, ids=lambda path: path.stem)


def cells(book: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(book.read_text())["cells"]
    return found


def outputs(book: Path) -> list[dict[str, Any]]:
    return [out for cell in cells(book) for out in cell.get("outputs", [])]


def test_no_cell_failed(book: Path) -> None:
    assert outputs(book) and all(out["output_type"] != "error" for out in outputs(book))


def test_animations_are_html(book: Path) -> None:
    """GitHub and nbconvert leave image/gif out."""
    assert not any("image/gif" in out.get("data", {}) for out in outputs(book))
    animated = [cell for cell in cells(book) if "visualize.animate(" in "".join(cell["source"])]
    for cell in animated:
        assert any("data:image/gif" in "".join(out.get("data", {}).get("text/html", "")) for out in cell["outputs"])


def test_no_output_is_a_bare_truth_value(book: Path) -> None:
    """What a reader sees last is an answer, a table or a picture."""
    texts = ["".join(out.get("text", out.get("data", {}).get("text/plain", ""))).strip() for out in outputs(book)]
    assert not {"True", "False", "None"} & set(texts)
