"""What the pretrained pocket model learns: drawings, canvases, and questions about them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vtr
from vtr.commands.eval import of_task
from vtr.commands.search import POCKET, Search
from vtr.data.sources import open_data
from vtr.pocket.pretrained import canvases, drawings, train, wheels


# -- drawings ----------------------------------------------------------------------------------------------------------
def test_things_have_names_of_their_own() -> None:
    found = drawings.things()
    assert len(found) == len({one.name for one in found}) == 151
    ids = Counter(one for thing in found for one in thing.ids)
    assert max(ids.values()) == 1
    assert {"animal", "food", "vehicle", "musical instrument"} < {one.kind for one in found}


def test_the_held_out_style_is_shipped_whole() -> None:
    found = drawings.held_out()
    assert [one.thing for one in found] == list(drawings.things())
    assert all(one.pixels.shape == (drawings.SIDE, drawings.SIDE, 4) for one in found)
    assert min(float((one.pixels[..., 3] > 128).mean()) for one in found) > 0.02
    assert len({one.pixels.tobytes() for one in found}) == len(found)


def test_a_sheet_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = [
        drawings.Drawing(one, "flat", np.full((drawings.SIDE, drawings.SIDE, 4), (n % 200, 90, 40, 255), np.uint8))
        for n, one in enumerate(drawings.things())
    ]
    drawings.write_sheet(flat, tmp_path / "sheet.webp")
    monkeypatch.setattr(drawings, "SHEET", tmp_path / "sheet.webp")
    for n, one in enumerate(drawings.held_out.__wrapped__()):
        middle = one.pixels[40:-40, 40:-40].reshape(-1, 4).mean(0)
        np.testing.assert_allclose(middle, (n % 200, 90, 40, 255), atol=12)


def test_an_icon_becomes_a_square(tmp_path: Path) -> None:
    wide = Image.new("RGBA", (60, 20))
    wide.paste((255, 0, 0, 255), (10, 5, 50, 15))
    found = drawings.square(wide)
    assert found.shape == (drawings.SIDE, drawings.SIDE, 4)
    rows = np.flatnonzero((found[..., 3] > 128).any(1))
    columns = np.flatnonzero((found[..., 3] > 128).any(0))
    assert len(columns) == drawings.SIDE and abs(len(rows) - drawings.SIDE // 4) <= 2


def test_a_package_of_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    style = drawings.STYLES[0]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(wheels.PackageError, match=r"npm is missing.*twemoji"):
        drawings.fetch(style, tmp_path)
    (tmp_path / style.archive).write_bytes(b"another file")
    with pytest.raises(wheels.PackageError, match=f"{style.sha256}: delete"):
        drawings.fetch(style, tmp_path)


def test_photographs_are_found_by_their_sentences(tmp_path: Path) -> None:
    said = {"a.png": "A wild wolf.", "b.png": "The cat", "c.png": "A wolf in a green field.", "d.png": "A fire truck!"}
    for name, text in said.items():
        Image.new("RGBA", (9, 9), (9, 9, 9, 255)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(text + "\nfr.utf8=Autre chose")
    (tmp_path / "cartoon").mkdir()
    Image.new("RGBA", (9, 9)).save(tmp_path / "cartoon" / "e.png")
    (tmp_path / "cartoon" / "e.txt").write_text("A cat.")
    assert [one.thing.name for one in drawings.photographs(tmp_path)] == ["wolf", "cat", "fire truck"]
    with pytest.raises(ValueError, match="no photographs"):
        train.parted([])
    one, other = train.parted(drawings.photographs(tmp_path))
    assert len(one) == 2 and len(other) == 1 and other[0] not in one


# -- canvases ----------------------------------------------------------------------------------------------------------
def test_answers_are_what_is_drawn() -> None:
    draw = random.Random(0)
    seen = Counter()
    for _ in range(60):
        canvas = canvases.paint(draw, drawings.held_out())
        names, kinds = {one.name for one in canvas.shown.values()}, [one.kind for one in canvas.shown.values()]
        for one in canvases.ask(draw, canvas):
            seen[one.type] += 1
            place = next((place for place in canvases.PLACES if f"at the {place}" in one.text), "")
            if one.type in ("name", "options"):
                assert one.answer == canvas.shown[place].name
            if one.type == "options":
                assert len(one.text.split("Choose one: ")[1].replace(" or ", ", ").split(", ")) == canvases.OPTIONS
            if one.type == "kind":
                assert one.answer == canvas.shown[place].kind
            if one.type == "where":
                assert one.text == f"Where is the {canvas.shown[one.answer].name}?"
            if one.type == "there":
                assert (one.text.removeprefix("Is there a ").rstrip("?") in names) == (one.answer == "yes")
            if one.type == "count":
                kind = one.text.removeprefix("How many ").removesuffix(" are there?")
                many = sum(canvases.plural(one) == kind for one in kinds)
                assert one.answer == canvases.NUMBERS[many]
    assert set(seen) == {"name", "options", "kind", "where", "there", "count"}


def test_every_name_is_asked_for_once() -> None:
    draw = random.Random(3)
    for _ in range(20):
        canvas = canvases.paint(draw, drawings.held_out())
        asked = [one for one in canvases.ask(draw, canvas, names=True) if one.type == "name"]
        assert sorted(one.text for one in asked) == sorted(canvases.what(place) for place in canvas.shown)
        assert sorted(one.answer for one in asked) == sorted(one.name for one in canvas.shown.values())


def test_a_drawing_lies_where_the_answer_says() -> None:
    draw, black = random.Random(2), np.zeros((drawings.SIDE, drawings.SIDE, 4), np.uint8)
    black[..., 3] = 255
    inked = [drawings.Drawing(one, "ink", black) for one in drawings.things()[:9]]
    for _ in range(20):
        canvas = canvases.paint(draw, inked)
        ink = np.asarray(canvas.image).max(2) < 8
        half = canvases.SIDE // 2
        if "" not in canvas.shown:
            for place in canvases.PLACES:
                rows = slice(half, None) if "bottom" in place else slice(0, half)
                columns = slice(half, None) if "right" in place else slice(0, half)
                assert (ink[rows, columns].mean() > 0.1) == (place in canvas.shown), place


def test_questions_come_again() -> None:
    one, again = (list(vtr.pocket.canvases(7)) for _ in range(2))
    assert [row["question"] for row in one] == [row["question"] for row in again] and len(one) == 7
    assert all(a["image"].tobytes() == b["image"].tobytes() for a, b in zip(one, again, strict=True))
    other = list(vtr.pocket.canvases(7, split="val"))
    assert [row["question"] for row in one] != [row["question"] for row in other]
    assert next(vtr.pocket.canvases(1, side=448))["image"].size == (448, 448)
    asked = vtr.pocket.sample(1, "pocket-pretrained")
    assert asked[0].size == (224, 224) and asked[1].endswith(("?", "."))
    with pytest.raises(ValueError, match=r"no sample 9.*choose one of 0"):
        vtr.pocket.sample(9, "pocket-pretrained")


def test_they_are_data(tmp_path: Path) -> None:
    found = list(open_data("pocket:task=canvases,side=448", limit=4))
    assert [one.id.split("-")[-1] for one in found] == ["0", "1", "2", "3"]
    assert found[0].group == found[1].group != found[2].group
    for spec, said in {
        "pocket:task=canvases,split=train": "not shipped", "pocket:task=canvases,side=300": "224 or 448",
        "pocket:side=448": "only pocket:task=canvases",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=said):
            open_data(spec)
    assert of_task(None, None, "pocket", "pocket-pretrained", "auto")[0] == "pocket:task=canvases"
    assert of_task("canvases", None, "pocket", None, "auto")[1] == "pocket-pretrained"
    assert of_task(None, None, "pocket", "pocket-joint", "auto")[0] == "pocket"
    assert Search(model="pocket-pretrained").source == f"{POCKET},task=canvases"
    assert Search(model="pocket-pretrained", data="x.jsonl").source == "x.jsonl" and Search().source == POCKET
    assert vtr.pocket.data_of("pocket-pretrained", "pocket:task=listing") == "pocket:task=listing"
    one_each = list(open_data("pocket:task=canvases,per_scene=1", limit=3))
    assert len({one.group for one in one_each}) == 3
    with pytest.raises(ValueError, match=r"per_scene=6.*task=canvases, 1 to 5"):
        open_data("pocket:task=canvases,per_scene=6")
