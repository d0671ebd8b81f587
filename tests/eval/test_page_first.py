"""The page's first screen and what rows open to: the figures are the files', and nothing is opened unasked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from vtr.eval.report import page, results
from vtr.eval.report.page import details, first, groups
from vtr.eval.report.page.data import Result, read

from tests import result_files
from tests.page_html import Tree
from vtr import pocket
from vtr.groups import brief, grouped

RESULTS = Path(__file__).parents[2] / "eval" / "results"
EVIL = "<script>alert(1)</script>\"'&"


def evaluation(model: str = "pocket", n: int = 2000, timed: bool = True, **rows: dict[str, Any]) -> Result:
    """An evaluation with what is given of some rows, by name, replaced."""
    body = result_files.evaluation(n=n) | {"kind": "eval", "model": model}
    body |= {"hardware": results.hardware(), "command": "vtr eval", "versions": {}, "seed": 0}
    for row in body["policies"]:
        row |= {} if timed else {"prefill_ms": None}
        row |= rows.get(row["name"], {})
    return Result(Path(f"{model}-{n}.json"), body)


def bad(result: Result, but: str = "") -> Result:
    """The same with every policy far below no reduction, but for those of one name."""
    for row in first.cuts(result):
        if row["name"] != but:
            row["versus_none"] |= {"difference": -0.3, "low": -0.35, "high": -0.25}
    return result


# -- the sentence ------------------------------------------------------------------------------------------------------
def test_the_sentence_says_what_the_files_say() -> None:
    """Of the committed results: the named policy's figures, and that no cheaper one stays within the margin."""
    found = [read(path) for path in sorted(RESULTS.glob("*.json")) if json.loads(path.read_text())["kind"] == "eval"]
    made = first.screen(found)
    assert made is not None
    said = re.sub("<[^>]+>", "", str(made.sentence))
    parts = re.fullmatch(
        r"On (\S+), take (.+): prefill is ([\d.]+)× faster, and accuracy is ([\d.]+)% on ([\d,]+) questions, "
        r"([+−][\d.]+) points against no reduction \(95% interval ([+−][\d.]+) to ([+−][\d.]+)\)\.",
        said,
    )
    assert parts, said
    path = RESULTS / made.under.partition(":")[0]
    data = json.loads(path.read_text())
    rows = {row["policy"]: row for row in data["policies"]}
    row, none = rows[parts[2]], rows["none"]
    assert data["model"] == parts[1] and data["data"]["shown"] == int(parts[5].replace(",", ""))
    speed = none["prefill_ms"]["median"] / row["prefill_ms"]["median"]
    assert float(parts[3]) == pytest.approx(speed, abs=0.05)
    assert float(parts[4]) == pytest.approx(100 * row["accuracy"], abs=0.05)
    told = [float(part.replace("−", "-")) for part in parts.group(6, 7, 8)]
    assert told == pytest.approx([100 * row["versus_none"][key] for key in ("difference", "low", "high")], abs=0.051)
    assert [figure for figure, _ in made.numbers] == [
        f"{parts[3]}×",
        f"{none['kv_mib'] / row['kv_mib']:.1f}×",
        parts[6],
    ]
    within = [one for one in data["policies"] if one["policy"] != "none" and one["versus_none"]["low"] >= -0.02]
    assert row is min(within, key=lambda one: one["prefill_ms"]["median"])


def test_where_a_baseline_wins_the_method_that_comes_next_is_named() -> None:
    fine = {"difference": 0.0, "low": -0.01, "high": 0.01}
    result = bad(evaluation())
    for row in result.rows:
        if row["name"] in ("uniform", "pmod"):
            row["versus_none"] = dict(fine)
    made = first.screen([result])
    assert made is not None and ", take <code>uniform:" in str(made.sentence)
    assert made.under.endswith("It is a plain baseline; the cheapest method that stays there is pmod:capacity=0.3.")
    made = first.screen([bad(result, but="uniform")])  # now pmod is not
    assert made is not None and made.under.endswith("It is a plain baseline; no method does as much.")


def test_where_none_is_within_the_margin_the_sentence_says_so() -> None:
    result = bad(evaluation())
    for row in first.cuts(result):
        if row["name"] == "pmod":
            row["versus_none"] |= {"difference": -0.02, "low": -0.03, "high": -0.01}
    made = first.screen([result])
    assert made is not None
    said = re.sub("<[^>]+>", "", str(made.sentence))
    assert said.startswith(
        "On pocket, no cheaper policy is surely within 2 points of no reduction; pmod:capacity=0.3 comes nearest: "
        "−2.0 points against no reduction (95% interval −3.0 to −1.0) on 2,000 questions, and prefill is "
    )
    assert "take" not in said and len(made.numbers) == 3


def test_what_costs_more_than_no_reduction_is_not_recommended() -> None:
    slow = {"median": 1e6, "low": 1e6, "high": 1e6}
    fine = {"difference": 0.0, "low": -0.01, "high": 0.01}
    row, good = first.chosen(bad(evaluation(pmod={"prefill_ms": slow, "versus_none": fine}), but="pmod"))
    assert row is not None and row["name"] == "pmod" and not good
    row, good = first.chosen(bad(evaluation(pmod={"versus_none": fine}), but="pmod"))
    assert row is not None and row["name"] == "pmod" and good


def test_without_times_it_speaks_of_flops_and_without_comparison_of_nothing() -> None:
    result = evaluation(timed=False)
    made = first.screen([result])
    assert made is not None and "fewer FLOPs" in str(made.sentence) and "faster" not in str(made.sentence)
    assert "time was not measured" in made.numbers[0][1]
    assert [button for button, _ in made.figures] == ["FLOPs"]
    for row in result.rows:
        row["versus_none"] = None
    made = first.screen([result])
    assert made is not None and made.numbers == []
    assert str(made.sentence) == "On pocket, no policy was compared with no reduction: none can be named."
    assert first.screen([]) is None


# -- what comes first --------------------------------------------------------------------------------------------------
def test_the_most_important_model_is_first() -> None:
    """Seeing before blind, others' models before the tiny shipped ones, timed before untimed, then questions."""
    blind = evaluation("llava-hf/big", n=9000)
    blind.data["reference"]["no_image"] = 0.995
    small, tiny = evaluation("llava-hf/llava", n=100, timed=False), evaluation("pocket", n=300)
    many, internvl = evaluation("pocket", n=5000, timed=False), evaluation("pocket-internvl", n=4000, timed=False)
    assert "pocket-internvl" in pocket.SHIPPED_NAMES
    models = first.by_model([blind, many, internvl, tiny, small])
    assert models == {
        "llava-hf/llava": [small],
        "pocket": [tiny, many],
        "pocket-internvl": [internvl],
        "llava-hf/big": [blind],
    }
    made = first.screen([blind, many, internvl, tiny, small])
    assert made is not None and str(made.sentence).startswith("On llava-hf/llava,")


def test_the_figure_has_a_line_and_a_diamond_for_every_model_with_times() -> None:
    found = [evaluation("pocket"), evaluation("pocket-joint", n=500), evaluation("pocket-video", timed=False)]
    made = first.screen(found)
    assert made is not None
    time, flops = (figure for _, figure in made.figures)
    assert [name for _, name in time.models] == ["pocket", "pocket-joint"] and len(flops.models) == 3
    assert time.caption.endswith("Not measured of pocket-video.") and "Not measured" not in flops.caption
    drawn = str(time.drawing)
    assert drawn.count('class="curve ') == 2 and "measured prefill, ms" in drawn
    titles = re.findall(r"<title>([^<]+)</title>", drawn)
    assert len(titles) == 2 * len(found[0].rows)
    none = next(row for row in found[0].rows if row["policy"] == "none")
    assert f"pocket, none: {100 * none['accuracy']:.1f}%, {none['prefill_ms']['median']:.1f} ms" in titles


# -- rows --------------------------------------------------------------------------------------------------------------
def losing(ids: list[str], settings: dict[str, Any], path: Path = Path("x.json")) -> Result:
    """An evaluation in which FastV loses these questions."""
    result = evaluation()
    result.data["settings"] = settings
    for row in result.rows:
        if row["name"] == "fastv":
            row["versus_none"] |= {"losses": len(ids), "lost": ids}
    return Result(path, result.data)


def test_a_row_opens_to_the_questions_it_loses_with_their_pictures() -> None:
    """Drawn again from the seed; a picture that several rows show is on the page once."""
    samples = list(pocket.samples(24, seed=3))
    ids = ["test-3-0-1", "test-3-0-2", "test-3-2-17"]
    result = losing(ids, {"data": "pocket", "limit": 24, "seed": 3})
    made = details.Details()
    detail = made.of(result)["fastv:keep=0.1,layer=2"]
    assert [(one.id, one.question, one.right) for one in detail.failures] == [
        (ids[i], samples[n]["question"], samples[n]["answer"]) for i, n in ((0, 1), (2, 17))
    ]  # one of a picture
    assert detail.summary.startswith("Worse than no reduction on 3 of 2,000 questions, 2 of them here; better on ")
    named = "picture-pocket-tasks-held-out-fixture-test-3-"
    assert list(made.pictures) == [f"{named}0", f"{named}2"]
    text = page.html([result])
    tree = Tree(text)
    assert len(tree.all("symbol")) == 2 and len(tree.all("use")) == 6  # three rows of FastV
    assert {attrs["href"] for attrs, _ in tree.all("use")} == {f"#{attrs['id']}" for attrs, _ in tree.all("symbol")}
    opens = [attrs for attrs, _ in tree.all("button") if attrs.get("class") == "open"]
    more = [attrs["id"] for attrs, _ in tree.all("tr") if attrs.get("class") == "more"]
    assert [attrs["aria-controls"] for attrs in opens] == more and len(more) == len(result.rows)
    assert all(attrs["aria-expanded"] == "false" and attrs["aria-label"] for attrs in opens)


@pytest.mark.parametrize(
    "settings",
    [
        {"data": "hf:somebody/else,split=test", "limit": 9, "seed": 0},
        {"data": "/etc", "limit": 9, "seed": 0},
        {"data": "pocket:task=video,frames=100000", "limit": 9, "seed": 0},
        {"data": "pocket", "limit": 10**9, "seed": 0},
        {"data": "pocket", "limit": 9, "seed": "0"},
        {},
    ],
)
def test_a_result_file_makes_the_page_open_nothing(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(details.sources, "open_data", lambda *args, **kwargs: pytest.fail("opened"))
    made = details.Details()
    detail = made.of(losing(["a-0", "b-1"], settings))["fastv:keep=0.1,layer=2"]
    assert [(one.id, one.question, one.picture) for one in detail.failures] == [("a-0", "", ""), ("b-1", "", "")]
    assert not made.pictures


def test_what_was_said_comes_from_the_rows_beside_the_result(tmp_path: Path) -> None:
    said = {"fastv:keep=0.1,layer=2": {"said": EVIL, "score": 0.0}}
    row = {"index": 0, "id": EVIL, "question": f"what? {EVIL}", "answers": ["one", "two"], "policies": said}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\nno json\n")
    result = losing([EVIL], {}, tmp_path / "results.json")
    failure = details.Details().of(result)["fastv:keep=0.1,layer=2"].failures[0]
    assert (failure.question, failure.right, failure.said) == (f"what? {EVIL}", "one, two", EVIL)
    text = page.html([result])
    Tree(text)
    assert "<script>alert" not in text and "said: &lt;script&gt;" in text
    other = losing([EVIL], {}, tmp_path / "x.json")  # the rows are of results.json
    assert details.Details().of(other)["fastv:keep=0.1,layer=2"].failures[0].said == ""


def test_a_video_is_shown_as_its_frames() -> None:
    result = losing(["test-0-0-1"], {"data": "pocket:task=video", "limit": 4, "seed": 0})
    made = details.Details()
    made.of(result)
    (picture,) = made.pictures.values()
    assert (picture.width, picture.height) == (4 * 96, 2 * 96) and picture.address.startswith("data:image/webp;base64,")


# -- groups ------------------------------------------------------------------------------------------------------------
def test_the_filter_has_the_groups_of_the_list() -> None:
    titles = {name: brief(title) for title, names in grouped().items() for name in names}
    result = evaluation()
    found = groups.of(result)
    assert found == {name: titles[name] for name in found} and "none" not in found
    order = list(dict.fromkeys(titles.values()))
    assert [order.index(title) for title in found.values()] == sorted(order.index(title) for title in found.values())
    tree = Tree(page.html([result]))
    buttons = [(attrs.get("data-group"), label) for attrs, label in tree.all("button") if "aria-pressed" in attrs]
    of_filter = [(group, label) for group, label in buttons if group is not None]
    assert of_filter == [(title, title) for title in dict.fromkeys(found.values())] and len(of_filter) > 3
    rows = [attrs for attrs, _ in tree.all("tr") if "data-group" in attrs]
    assert {attrs["data-name"]: attrs["data-group"] for attrs in rows} == found


def test_what_this_installation_does_not_know_is_from_elsewhere() -> None:
    result = evaluation()
    result.rows[1] |= {"policy": f"{EVIL}:keep=0.5", "name": EVIL}
    result.rows[2] |= {"policy": "m3:tokens=36+fastv:keep=0.5", "name": "chain"}
    found = groups.of(result)
    assert (found[EVIL], found["chain"]) == ("From elsewhere", "Several policies in one")


def test_titles_are_short() -> None:
    assert [brief(title) for title in list(grouped())[:4]] == [
        "Before the tower",
        "Look at nothing",
        "Look at the picture",
        "Look at the picture and the question",
    ]
