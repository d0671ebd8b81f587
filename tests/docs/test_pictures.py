"""Pictures with answers on them are true: the model, asked again, says the same, and right is marked as right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vtr.eval.report import figures
from vtr.eval.report.page import screens

from vtr import visualize
from vtr.picture import RIGHT, WRONG, verdict

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module", params=sorted(figures.PICTURES))
def named(request: pytest.FixtureRequest) -> tuple[str, list[visualize.Shot]]:
    return request.param, figures.PICTURES[request.param][0]()


def test_the_answers_are_those_of_the_shipped_weights(named: tuple[str, list[visualize.Shot]]) -> None:
    name, shots = named
    assert figures.written(ROOT / figures.FOLDER / name) == figures.facts(shots), "python -m vtr.eval.report.figures"


def test_question_right_answer_and_marks_stand_on_it(named: tuple[str, list[visualize.Shot]]) -> None:
    """Each answer once, with sign and color; every question; at 700 pixels no label is smaller than 9 of them."""
    name, shots = named
    figure = figures.PICTURES[name][1](shots)
    figure.canvas.draw()
    texts = [text for text in figure.findobj(match=lambda artist: hasattr(artist, "get_fontsize")) if text.get_text()]
    said = [(text.get_text(), text.get_color()) for text in texts]
    for shot in shots:
        right = shot.answer == shot.expected
        marked = f"✓ {shot.answer}" if right else f"✗ {shot.answer}\n(right: {shot.expected})"
        assert (marked, RIGHT if right else WRONG) in said
        assert any(shot.question in text for text, _ in said)
    width = figure.get_size_inches()[0]
    assert min(text.get_fontsize() / 72 * 700 / width for text in texts) >= 9


def test_a_verdict_has_a_sign_and_a_color() -> None:
    assert verdict("Two.", "two") == ("✓ Two.", RIGHT) and verdict("three", "two") == ("✗ three  (right: two)", WRONG)
    assert verdict("a cat", None)[0] == "→ a cat"


def test_what_the_first_commands_show_is_right() -> None:
    """Those of the figure that explains the idea, and the first command of the docs, as its picture shows it."""
    for name in ("idea.png", "kept.png"):
        for fact in figures.written(ROOT / figures.FOLDER / name):
            assert fact["answer"] == fact["expected"]
    sample, policy = figures.FIRST
    first = re.search(r"^vtr run .*$", (ROOT / "docs" / "index.md").read_text(), re.M)
    assert first and f"--sample {sample} --policy {policy} " in first[0]


SCREENSHOTS = {"play.png", "play-narrow.png"}
"""Cut from what ``VTR_SCREENSHOTS=FOLDER pytest tests/play/test_browser.py`` writes."""


def test_every_picture_is_there_and_none_is_left_over() -> None:
    there = {path.name: path.stat().st_size for path in (ROOT / figures.FOLDER).iterdir()}
    every = {*figures.PICTURES, *screens.PICTURES}
    assert set(there) == every | SCREENSHOTS
    assert all(there[name] < 100_000 for name in SCREENSHOTS)
    shown = {link for page in PAGES for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())}
    assert {Path(link).name for link in shown} >= every


@pytest.mark.parametrize("name", sorted(screens.PICTURES))
def test_the_pages_pictures_are_of_the_results_there_are(name: str) -> None:
    path = ROOT / screens.FOLDER / name
    with Image.open(path) as picture:
        assert picture.size == screens.PICTURES[name]
        said = screens.sentence([ROOT / screens.RESULTS])
        assert picture.text["vtr"] == said, "python -m vtr.eval.report.page.screens"  # type: ignore[attr-defined]
    assert path.stat().st_size < 100_000


def test_a_picture_without_facts_is_told(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "old.png")
    with pytest.raises(ValueError, match=r"python -m vtr\.eval\.report\.figures makes it"):
        figures.written(tmp_path / "old.png")


def test_the_command_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {"kept.png": figures.PICTURES["kept.png"]}
    monkeypatch.setattr(figures, "PICTURES", kept)
    figures.main(tmp_path)
    assert figures.written(tmp_path / "kept.png")[0]["answer"] == "orange"
