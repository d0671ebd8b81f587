"""The saved notebooks: their code ran, animations show where they are only read, they end well, and open on Colab."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 1_000_000
"""Bytes of a notebook."""
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


# -- anywhere: Colab, a GPU --------------------------------------------------------------------------------------------
def source(book: Path, name: str) -> str:
    (found,) = [cell for cell in cells(book) if cell.get("id") == name]
    return "".join(found["source"])


def test_one_click_opens_it_on_colab(book: Path) -> None:
    """The badge stands on top, and leads to this file where pyproject.toml says that the repository is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"].removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{book.name}"
    assert cells(book)[0]["id"] == "badge" and source(book, "badge").endswith(f"({link})")
    assert book.stat().st_size < LARGEST


def test_vtr_is_installed_where_it_is_missing(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first code cell; nothing is done where vtr can be imported."""
    code = [cell for cell in cells(book) if cell["cell_type"] == "code"]
    assert [cell["id"] for cell in code[:2]] == ["install", "switch"] and not code[0]["outputs"]
    text, magics = re.subn(r"%pip (.*)", r"asked.append('\1')", source(book, "install"))
    assert magics == 1
    for found, wanted in ((importlib.util.find_spec("vtr"), []), (None, ["install -q git+https://github.com/"])):
        asked: list[str] = []
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        exec(compile(text, book.name, "exec"), {"asked": asked})
        assert len(asked) == len(wanted) and all(map(str.startswith, asked, wanted))


def test_one_cell_names_the_model(book: Path) -> None:
    """A pocket model, which every cell behind it takes from there; uncommented, its last line names another one."""
    from vtr.pocket import SHIPPED_NAMES

    text = source(book, "switch")
    names: dict[str, Any] = {}
    exec(compile(text, book.name, "exec"), names)
    assert names["MODEL"] in SHIPPED_NAMES and "GPU" in text
    exec(compile(re.sub(r"^# (.*MODEL.* = )", r"\1", text, flags=re.M), book.name, "exec"), names)
    assert names["MODEL"] not in SHIPPED_NAMES
    loads = [c for c in cells(book) if 'model, processor = load(MODEL, "auto")' in "".join(c["source"])]
    assert len(loads) == 1


def test_prompts_go_where_the_model_is(book: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells(book) if cell["cell_type"] == "code")
    for name in re.findall(r"(\w+) = (?:vtr\.chat\.)?(?:encode|processor)\(", code):
        assert re.search(rf"\b{name} = .*?\)\.to\(model\.device\)|{name} = {name}\.to\(model\.device\)", code, re.S)
