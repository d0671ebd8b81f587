"""The page made of result files: its structure, its numbers, its errors."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from vtr.eval.report import page, results
from vtr.eval.report.page import gallery, tables, words
from vtr.eval.report.page.data import read

from tests import result_files
from tests.page_html import Tree, rows_of
from vtr.cli import app


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["page", *map(str, args)], env={"COLUMNS": "120"})


def test_everything_is_on_the_page_and_nothing_is_fetched(site: Path) -> None:
    text = site.read_text()
    tree = Tree(text)
    headings = [text for _, text in tree.all("h2")]
    assert headings == [
        "Leaderboard", "Accuracy against cost", "Accuracy by kind of question", "Cost of every policy",
        "Mixed requests in one batch", "How cost grows", "Behind a server", "The engine against its limit",
        "What a GPU is asked for", "A decoded token, five ways", "Against other implementations", "Measure again",
        "Limits of these numbers",
    ]  # fmt: skip
    assert len(tree.all("h1")) == 1 and len(tree.all("table")) == 10
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "url(" not in text and "@import" not in text
    for link, _ in tree.all("a"):
        assert f'id="{(link["href"] or "")[1:]}"' in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-labelledby="([^"]+)"', text)) <= set(ids)
    for command in result_files.COMMANDS.values():
        assert command in text
    plots_drawn = [attrs for attrs, _ in tree.all("svg") if attrs["class"] == "plot"]
    assert len(plots_drawn) == 8 and all(attrs["aria-label"] for attrs in plots_drawn)


def test_headers_are_headers_and_every_column_sorts(site: Path) -> None:
    text = site.read_text()
    heads = [(attrs, label) for attrs, label in Tree(text).all("th") if attrs.get("scope") == "col"]
    assert len(heads) == text.count('<button type="button" data-first=')
    assert [label for _, label in heads[:10]] == [
        "policy", "accuracy", "indispensable", "vs. none", "McNemar p", "mean keep", "GFLOPs", "prefill ms", "KV MiB",
        "selector ms",
    ]  # fmt: skip
    assert [attrs.get("aria-sort") for attrs, _ in heads[:3]] == [None, "descending", None]


def test_the_leaderboard_shows_the_files_numbers(result_folder: Path, site: Path) -> None:
    data = {row["policy"]: row for row in json.loads((result_folder / "eval.json").read_text())["policies"]}
    shown = rows_of(site.read_text())
    assert len(shown) == len(data)
    assert [row[0] for row in shown] == sorted(data, key=lambda spec: -data[spec]["accuracy"])
    row, cells = data["fastv:keep=0.1,layer=2"], next(c for c in shown if c[0] == "fastv:keep=0.1,layer=2")
    assert cells[1] == f"{100 * row['accuracy']:.1f}% {100 * row['low']:.1f}–{100 * row['high']:.1f}"
    assert cells[2] == f"{100 * row['indispensable']:.1f}%"
    assert cells[3].startswith(f"{100 * row['versus_none']['difference']:+.1f} [".replace("-", "−"))
    assert cells[5] == "28.0%" and cells[8] == f"{row['kv_mib']:.2f}"
    assert next(c for c in shown if c[0] == "none")[3:5] == ["–", "–"]


def test_markdown_and_csv(result_folder: Path, tmp_path: Path) -> None:
    result = run(result_folder, "--out", tmp_path, "--markdown", "--csv")
    assert result.exit_code == 0, result.output
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["index.html", "table.csv", "table.md"]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| policy | accuracy | indispensable | vs. none | McNemar p |")
    assert lines[1].startswith("|---|--:|") and lines[2].startswith("| `none` | 99.1% 98.7–99.5 |")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    with (tmp_path / "table.csv").open() as file:
        rows = {row["policy"]: row for row in csv.DictReader(file)}
    data = json.loads((result_folder / "eval.json").read_text())
    for row in data["policies"]:
        mine = rows[row["policy"]]
        assert float(mine["accuracy"]) == row["accuracy"] and float(mine["gain"]) == row["gain"]
        assert float(mine["prefill_ms_median"]) == row["prefill_ms"]["median"]
        assert float(mine["versus_none_p_mcnemar"]) == row["versus_none"]["p_mcnemar"]
        assert float(mine["letter"]) == row["by_kind"]["letter"]


def test_models_are_tabs_and_within_them_what_they_were_asked(tmp_path: Path) -> None:
    """A tab controls a panel that is labelled by it; the heading of every leaderboard tells it from all others."""
    made = {"a": result_files.evaluation(), "b": result_files.evaluation(1), "c": result_files.evaluation(2, n=4000)}
    made["d"] = {**result_files.evaluation(3), "model": "another"}
    for name, body in made.items():
        results.save(tmp_path / f"{name}.json", "eval", body, seed=0)
    text = page.html([read(tmp_path / f"{name}.json") for name in made])
    tree = Tree(text)
    lists = [attrs["aria-label"] for attrs, _ in tree.all("div") if attrs.get("role") == "tablist"]
    assert lists == ["Models", "What pocket (fixture) was asked"]
    tabs = [(attrs, label) for attrs, label in tree.all("button") if attrs.get("role") == "tab"]
    assert [label for _, label in tabs[:2]] == ["pocket (fixture)", "another"]
    assert [label.partition(") ")[2] for _, label in tabs[2:]] == [f"{n}, 15 policies, timed" for n in "cab"]
    assert [re.findall(r"([\d,]+) questions", label)[0] for _, label in tabs[2:]] == ["4,000", "2,000", "2,000"]
    panels = [attrs for _, attrs, _ in tree.seen if attrs.get("role") == "tabpanel"]
    assert {attrs["id"]: attrs["aria-labelledby"] for attrs in panels} == {
        attrs["aria-controls"]: attrs["id"] for attrs, _ in tabs
    }
    heads = [text.removeprefix("Leaderboard: ") for _, text in tree.all("h2") if text.startswith("Leaderboard")]
    assert len(set(heads)) == 4 and [head.endswith(("(a)", "(b)")) for head in heads] == [False, True, True, False]
    assert text.count('class="facts"') == 4
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("kind", list(result_files.MADE))
def test_missing_kinds_are_left_out(kind: str, tmp_path: Path) -> None:
    text = page.html([read(path) for path in result_files.write(tmp_path, kind)])
    tree = Tree(text)
    assert len(tree.all("table")) == (2 if kind == "eval" else 1)
    assert ('class="finding"' in text) == (kind == "eval")
    first = "eval-1" if kind == "eval" else kind
    assert [attrs["id"] for attrs, _ in tree.all("section")] == [first, "again", "limits"]
    assert ('class="first"' in text) == (kind == "eval") and f'href="#{kind}"' in text and f' id="{kind}"' in text


def test_what_is_null_is_a_dash_or_left_out(tmp_path: Path) -> None:
    body = result_files.evaluation()
    for row in body["policies"]:
        row |= {"prefill_ms": None, "indispensable": None, "by_kind": {"color": 0.5}}
    body["data"] = {**body["data"], "kinds": ["color"], "bad": 0}
    results.save(tmp_path / "a.json", "eval", body, seed=0)
    text = page.html([read(tmp_path / "a.json")])
    tree = Tree(text)
    kinds = [attrs["class"] for attrs, _ in tree.all("svg")]
    assert kinds.count("plot") == 3 and "radar" not in kinds  # no times; one kind makes no radar
    assert {(row[2], row[7]) for row in rows_of(text)} == {("–", "–")}
    assert "could not be read" not in text
    bench = result_files.policies()
    results.save(tmp_path / "b.json", "policies", bench, seed=0)
    assert next(row for row in rows_of(page.html([read(tmp_path / "b.json")])) if row[0] == "pool:grid=6")[-1] == "–"


def test_what_writers_add_is_shown(tmp_path: Path) -> None:
    bench = result_files.policies()
    for i, one in enumerate(bench["rows"]):
        one["attention"] = ("sdpa", "flash_attention_2")[i % 2]
    results.save(tmp_path / "a.json", "policies", bench, seed=0)
    made = tables.tables_of(read(tmp_path / "a.json"))[0]
    assert made.columns[1].label == "attention" and made.rows[1].cells[1].text == "flash_attention_2"
    assert made.caption.startswith("random weights, 10 layers × 512, family llava, vision tokens 744; ")
    peers = result_files.peers()
    peers["rows"][0]["batch"] = 8
    results.save(tmp_path / "b.json", "peers", peers, seed=0)
    assert [row.cells[1].detail for row in tables.tables_of(read(tmp_path / "b.json"))[0].rows] == ["batch 8", "", ""]
    body = result_files.evaluation()
    body["data"] |= {"only_indispensable": True, "shown": 1771}
    results.save(tmp_path / "c.json", "eval", body, seed=0)
    made = tables.tables_of(read(tmp_path / "c.json"))[0]
    assert "of which these are the 1,771 that need the image, 3 more could not be read" in made.caption
    assert "(1,771 or more)" in " ".join(words.limits([read(tmp_path / "c.json")]))


def test_a_servers_rates_are_shown(result_folder: Path) -> None:
    data = json.loads((result_folder / "serve.json").read_text())
    text = page.html([read(result_folder / "serve.json")])
    shown = rows_of(text)
    assert [row[:3] for row in shown] == [
        [str(row["concurrency"]), str(row["tokens"]), row["contender"]] for row in data["rows"]
    ]
    gain = data["rows"][4]["gain"]
    assert shown[4][4] == f"{gain['median']:.2f} {gain['low']:.2f}–{gain['high']:.2f}" and shown[4][8] == "48"
    assert shown[0][4].startswith("1.00") and shown[0][8] == "–"
    assert "vLLM 0.32.0, 640 blocks of 128 tokens" in text and "mixed: none, m3:tokens=9" in text
    assert "same cores" in text


def test_two_evals_keep_apart_and_policies_keep_their_colours(result_folder: Path, tmp_path: Path) -> None:
    other = result_files.evaluation(seed=1)
    other |= {"model": "another", "policies": [row for row in other["policies"] if row["name"] in ("none", "pmod")]}
    results.save(tmp_path / "other.json", "eval", other, seed=1)
    text = page.html([read(result_folder / "eval.json"), read(tmp_path / "other.json")])
    headings = [text for _, text in Tree(text).all("h2")]
    assert headings.count("Leaderboard: another, 2,000 questions of pocket tasks, held out (fixture)") == 1
    assert sum(heading.startswith("Leaderboard: ") for heading in headings) == 2
    colours = set(re.findall(r'class="mark (\w+)" data-name="pmod"', text))
    assert len(colours) == 1


EVIL = "<script>alert(1)</script>\"'&|`"


def test_nothing_in_a_file_becomes_markup(tmp_path: Path) -> None:
    body = result_files.evaluation()
    body["model"] = body["data"]["name"] = EVIL
    for i, row in enumerate(body["policies"][1:4]):
        row |= {"policy": f"{EVIL}{i}", "name": f"{EVIL}{i}"}
    for row in body["policies"]:
        row["by_kind"] = {EVIL: 0.5, "b": 0.5, "c": 0.5}
    body["data"]["kinds"] = [EVIL, "b", "c"]
    results.save(tmp_path / "a.json", "eval", body, seed=0)
    peers = result_files.peers()
    peers["rows"][0] |= {"error": EVIL, "peer": EVIL, "method": EVIL}
    results.save(tmp_path / "b.json", "peers", peers, seed=0)
    result = run(tmp_path, "--out", tmp_path / "site", "--title", EVIL, "--markdown")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "site" / "index.html").read_text()
    tree = Tree(text)
    assert len(tree.all("script")) == 1 and "alert(1)</script>" not in text
    assert tree.all("h1")[0][1] == EVIL
    table = (tmp_path / "site" / "table.md").read_text()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line.startswith("|")}) == 1
    assert "\\<script" in table.splitlines()[-1]


def broken(tmp_path: Path, what: str) -> list[Path]:
    path = tmp_path / "broken.json"
    if what == "not json":
        path.write_text("no")
    elif what == "a picture":
        path.write_bytes(b"\x89PNG\xff\xfe")
    elif what == "a list":
        path.write_text("[]")
    elif what == "unknown kind":
        result_files.write(tmp_path, "eval")[0].rename(path)
        path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "quality"}))
    elif what == "no rows":
        results.save(path, "peers", {"rows": []}, seed=0)
    elif what == "rows lack a key":
        results.save(path, "peers", {"rows": [{"peer": "x"}]}, seed=0)
    elif what == "a policy without name":
        results.save(path, "eval", {**result_files.evaluation(), "policies": [{"policy": "none"}]}, seed=0)
    elif what == "a time of zero":
        body = result_files.scale()
        body["series"][0]["ms"][0]["low"] = 0.0
        results.save(path, "scale", body, seed=0)
    elif what == "wrong type":
        results.save(path, "eval", {**result_files.evaluation(), "data": "pocket"}, seed=0)
    elif what == "empty folder":
        path.mkdir()
    return [path]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "No such file"),
        ("not json", "is not a result file: not JSON"),
        ("a picture", "is not a result file: not JSON"),
        ("a list", "is not a result file of vtr: it lacks kind"),
        ("unknown kind", "'quality', which the page does not show: it shows eval, policies"),
        ("no rows", "its 'rows' is no list with rows"),
        ("rows lack a key", "is of kind peers but lacks 'prefill_ms'"),
        ("a policy without name", "is of kind eval but lacks 'name'"),
        ("a time of zero", "is of kind scale but cannot be read"),
        ("wrong type", "is of kind eval but cannot be read"),
        ("empty folder", "holds no result files"),
    ],
)
def test_errors_name_the_file_in_one_line(what: str, message: str, tmp_path: Path) -> None:
    result = run(*broken(tmp_path, what), "--out", tmp_path / "site")
    assert result.exit_code == 1
    assert message in result.output and "broken.json" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "site").exists()


def test_no_results_and_no_leaderboard(tmp_path: Path) -> None:
    result = run("--out", tmp_path)
    assert result.exit_code == 1 and "no result files: name what" in result.output
    result = run(*result_files.write(tmp_path, "scale"), "--csv", "--out", tmp_path / "site")
    assert result.exit_code == 1 and "no leaderboard without a result of kind eval" in result.output
    assert not (tmp_path / "site").exists()


# -- gallery -----------------------------------------------------------------------------------------------------------
def test_the_gallery_runs_the_pocket_model(result_folder: Path) -> None:
    text = page.html([read(result_folder / "eval.json")], pictures=1, policies=["fastv:keep=0.05,layer=2"])
    images = [attrs for attrs, _ in Tree(text).all("img")]
    assert len(images) == 3  # the picture, kept crops, kept thumbnail
    assert all((attrs["src"] or "").startswith("data:image/webp;base64,") and attrs["alt"] for attrs in images)
    assert "37 of 744 tokens, answers “orange”, right" in text
    with pytest.raises(ValueError, match="layer"):
        gallery.show(1, ["fastv:keep=0.5,layer=99"])


def test_the_gallerys_policies_are_the_results_own() -> None:
    rows = result_files.evaluation()["policies"]
    chosen = gallery.choose(rows, 10)
    assert chosen[:2] == ["fastv:keep=0.05,layer=2", result_files.STAIRS] and len(chosen) == 4
    assert gallery.choose([], 10) == list(gallery.POLICIES)
    assert len(list(gallery.pictures(5))) == 5
