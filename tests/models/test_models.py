"""Outcomes are those that were committed: fifteen classes that differ in kind, the others where there is time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from rich.console import Console

from tests.models import compare, page, tiny
from tests.models.outcome import outcome

DATA = json.loads((Path(__file__).parent / "outcomes.json").read_text(encoding="utf-8"))
SAME = DATA["transformers"] == transformers.__version__
CORE = {
    "AyaVision": "windows", "Gemma3": "images that look both ways", "Gemma4": "head sizes that differ by layer",
    "Glm4v": "positions of three axes", "Idefics2": "a method inputs_merger", "Kimi_K25": "latents in the cache",
    "Lfm2Vl": "convolutions", "Llama4": "chunks", "MiniCPMV4_6": "recurrent layers", "Mistral3": "Pixtral's pictures",
    "MistralLarge4": "indexed attention", "Mllama": "attends to pictures", "MuseGlimmer": "layers without positions",
    "Ovis2": "pictures as words of a vocabulary", "PaliGemma": "a prompt that looks both ways",
}  # fmt: skip
"""Fifteen classes and what is special about each."""
FEW = ("random", "fastv")
"""Policies that the fast tests ask."""


def name_of(short: str) -> str:
    return f"{short}ForConditionalGeneration"


def check(name: str, found: dict[str, Any]) -> None:
    """The outcome is the committed one; with another transformers than it was made with, it is no worse."""
    known = DATA["classes"].get(name)
    if known is None:
        pytest.skip("a class that the table does not have yet: python -m tests.models --write")
    asked = found.get("policies", {})
    known = {**known, "policies": {policy: known.get("policies", {}).get(policy) for policy in asked}}
    if "pictures" not in found:
        known.pop("pictures", None)
    lines, worse = compare.changes(known, found)
    assert not (lines if SAME else worse), "\n".join(lines)


@pytest.mark.parametrize("short", CORE)
def test_fifteen_kinds_of_model_do_what_the_table_says(short: str) -> None:
    name = name_of(short)
    if name not in tiny.CLASSES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    check(name, outcome(name, FEW, pictures=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.CLASSES)
def test_every_class_does_what_the_table_says(name: str) -> None:
    check(name, outcome(name))


def test_the_table_has_every_class_and_the_pages_say_what_it_says() -> None:
    if SAME:
        assert set(DATA["classes"]) == set(tiny.CLASSES), "python -m tests.models --write"
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_table(text, DATA) == text, "python -m tests.models --page"
    for where in (page.README, page.FAMILIES):
        assert page.COUNT.findall(where.read_text(encoding="utf-8")) == [page.count(DATA)], where


def test_nothing_in_the_table_is_wrong() -> None:
    """Whatever does not pass is refused, with a sentence."""
    for name, one in DATA["classes"].items():
        assert one["path"] in page.PATHS and (one["path"] == "packed" or one["why"]), name
        wrong = {check: said for check, said in compare.checks(one).items() if said.startswith(("fails", "raises"))}
        assert not wrong and not one.get("by_accident"), f"{name}: {wrong or one['why']}"


def test_a_new_release_is_compared_with_the_old() -> None:
    passes = {"path": "packed", "off": True, "policies": {"random": "passes", "fastv": "passes"}}
    old = {"transformers": "1", "classes": {"A": passes, "B": passes, "C": passes, "D": passes}}
    new = {
        "transformers": "2",
        "classes": {
            "A": {**passes, "policies": {"random": "passes", "fastv": "fails: batch"}},
            "B": {
                **passes,
                "path": "padded",
                "why": "of its layers",
                "policies": {"random": "passes", "fastv": "refused: x"},
            },
            "C": passes,
            "E": {"path": "refused", "why": "it is new"},
        },
    }
    console = Console(record=True, width=200, file=io.StringIO())
    assert compare.report(old, new, console)
    said = console.export_text().splitlines()
    assert said == [
        "transformers 1 → 2",
        "new: E: refused (it is new)",
        "gone: D",
        "A: fastv: passes → fails: batch",
        "B: packed → padded (of its layers)",
        "B: fastv: passes → refused: x",
    ]
    assert not compare.report(new, {"transformers": "3", "classes": {**old["classes"], "E": passes}}, console)
    assert not compare.report(old, {"transformers": "0", "classes": {"A": passes}}, console, gone_is_fine=True)
    not_built = {"transformers": "0", "classes": {"A": {"path": "not built", "why": "its config is another"}}}
    assert not compare.report({**old, "classes": {"A": passes}}, not_built, console, gone_is_fine=True)
    assert compare.report({**old, "classes": {"A": passes}}, not_built, console)
