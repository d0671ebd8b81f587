"""Which crops are laid: BlueLM-V-3B's relaxed matching, and Mini-Monkey's two grids, against given numbers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution

import vtr
from tests import official
from vtr.policies.input._crops import AnyRes, grids
from vtr.policies.input.fewer_crops import relaxed
from vtr.policies.input.msac import closest

TILES = json.loads((official.GOLDEN / "bluelm" / "tiles.json").read_text())["configs"]
CROPS = json.loads((official.GOLDEN / "mini_monkey" / "crops.json").read_text())
PINS = {name: tuple((w * c["tile"], h * c["tile"]) for w, h in c["candidates"]) for name, c in TILES.items()}
sides = st.integers(1, 4000)


@pytest.mark.parametrize("name", TILES)
def test_relaxed_matching(name: str) -> None:
    """Index for index; of the orders of canvases that area is, since pinpoints come in any order."""
    tile = TILES[name]["tile"]
    for row in TILES[name]["rows"]:
        for key in (key for key in row if key.startswith("relaxed_") and not key.endswith("_ascending")):
            alpha, order = key.split("_")[1:]
            if order == "area" or row[key] == row[f"relaxed_{alpha}_area"]:
                got = relaxed(tuple(row["size"]), PINS[name], float(alpha))
                assert got is not None and [side // tile for side in got] == row[key], (row["size"], key)


@pytest.mark.parametrize("name", TILES)
def test_what_processors_choose(name: str) -> None:
    """The canvas that an AnyRes processor takes has as many tiles as given; InternVL's grid is the one given."""
    tile, among = TILES[name]["tile"], TILES[name]["candidates"]
    for row in TILES[name]["rows"]:
        width, height = row["anyres"]
        assert AnyRes(PINS[name]).count(tuple(row["size"])) == width * height * tile**2
        most = max(w * h for w, h in among)
        got = closest(tuple(row["size"]), grids(1, 12 if most == 36 else most), tile)
        assert list(got) == row["internvl"]


def test_the_cases_of_the_paper() -> None:
    """Figures 3 and 4: LLaVA-NeXT 2:2, InternVL 5:1, LLaVA-NeXT 1:2; relaxed 1:1 each."""
    nine = [(384 * w, 384 * h) for w in range(1, 4) for h in range(1, 4)]
    for size in ((394, 390), (380, 76), (380, 393)):
        assert relaxed(size, nine, 0.1) == (384, 384)


@pytest.mark.parametrize("name", TILES)
@given(width=sides, height=sides, alpha=st.sampled_from([0.0, 0.1, 0.3]))
@example(width=394, height=390, alpha=0.1)
@example(width=1, height=4000, alpha=0.1)
def test_a_scaled_picture_gets_the_crops_of_the_relaxed_canvas(
    name: str, width: int, height: int, alpha: float
) -> None:
    """And never more than before: the unchanged choice, of the scaled picture."""

    class Processor:
        image_grid_pinpoints = [[h, w] for w, h in PINS[name]]  # noqa: RUF012

    size = vtr.FewerCrops(alpha).size_for((width, height), Processor(), {})
    crops, canvas = AnyRes(PINS[name]), relaxed((width, height), PINS[name], alpha)
    assert crops.count(size) <= crops.count((width, height))
    assert (size == (width, height)) == (crops.count(size) == crops.count((width, height)))
    if canvas is not None and size != (width, height):
        assert crops.count(size) <= canvas[0] * canvas[1] and size[0] <= width and size[1] <= height


@pytest.mark.parametrize("name", TILES)
def test_the_unchanged_choice_of_a_scaled_picture_is_the_relaxed_canvas(name: str) -> None:
    """Of all given sizes, and of drawn ones."""
    crops, rng = AnyRes(PINS[name]), random.Random(0)
    sizes = [tuple(row["size"]) for row in TILES[name]["rows"]]
    sizes += [(rng.randint(32, 2500), rng.randint(32, 2500)) for _ in range(400)]
    for size in sizes:
        canvas = relaxed(size, PINS[name], 0.1)
        if canvas is not None and canvas[0] * canvas[1] < crops.count(size):
            fitted = crops.fit(size, canvas)
            pins = [pin[::-1] for pin in PINS[name]]
            assert select_best_resolution(fitted[::-1], pins) == canvas[::-1], size


def test_means_that_the_page_names() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "methods" / "input.md").read_text().split())
    fixture = json.loads((Path(__file__).parents[1] / "golden" / "bluelm" / "tiles.json").read_text())["configs"]
    for name in ("bluelm_3x3_384", "ov_6x6_384", "next_336"):
        rows = fixture[name]["rows"]
        means = [sum(r[key][0] * r[key][1] for r in rows) / len(rows) for key in ("anyres", "relaxed_0.1_area")]
        assert f"from {means[0]:.2f} to {means[1]:.2f}" in page


@pytest.mark.parametrize("name", CROPS["configs"])
def test_two_grids(name: str) -> None:
    """Index for index, in all settings that the official code has."""
    config: dict[str, Any] = CROPS["configs"][name]
    rule = "and" if config["functions"] == "train" else "or"
    policy = vtr.MSAC(tuple(config["detail"]), tuple(config["adaptive"]), rule)
    for size, detail, tiles, adaptive, _ in config["rows"]:
        got = policy.grids_for(tuple(size), CROPS["tile"])
        assert [list(grid) for grid in got] == [detail, adaptive], size
        count = detail[0] * detail[1]
        assert tiles == (count + 1 if count > 1 else 1)
