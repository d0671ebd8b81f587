"""The page made of result files: its structure, its numbers, its errors."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from vtr.eval.report import page, results
from vtr.eval.report.page import cells, gallery, plots, svg, tables, words
from vtr.eval.report.page.data import Result, read

from tests import result_files
from vtr.cli import app

VOID = {"meta", "link", "img", "wbr", "br", "hr", "input"}


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["page", *map(str, args)], env={"COLUMNS": "120"})


class Tree(HTMLParser):
    """Checks that elements nest, and keeps (tag, attributes, text) of each in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.seen: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {[self.seen[i][0] for i in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.seen) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.seen[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.seen[i][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, " ".join("".join(text).split())) for name, attrs, text in self.seen if name == tag]


def rows_of(text: str) -> list[list[str]]:
    """The first table's cells."""
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    cells = re.compile(r"<t[dh][^>]*>(.*?)</t[dh]>", re.S)
    plain = [[re.sub("<[^>]+>", "", cell) for cell in cells.findall(row)] for row in body.split("</tr>")]
    return [[" ".join(cell.split()) for cell in row] for row in plain if row]


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
    assert len(plots_drawn) == 6 and all(attrs["aria-label"] for attrs in plots_drawn)


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


def test_several_leaderboards_are_tabs(tmp_path: Path) -> None:
    """One a result, of more questions first, each with its own findings; a name for each."""
    made = {"a": result_files.evaluation(), "b": result_files.evaluation(1), "c": result_files.evaluation(2, n=4000)}
    for name, body in made.items():
        (path,) = result_files.write(tmp_path / name, "eval")
        path.write_text(json.dumps({**json.loads(path.read_text()), **body}))
        path.rename(tmp_path / f"{name}.json")
    text = page.html([read(tmp_path / f"{name}.json") for name in made])
    tree = Tree(text)
    tabs = [(attrs, label) for attrs, label in tree.all("button") if attrs.get("role") == "tab"]
    counts = [re.findall(r"([\d,]+) questions", label)[0] for _, label in tabs]
    assert counts == ["4,000", "2,000", "2,000"]
    assert [label.endswith(f"({name})") for (_, label), name in zip(tabs, "cab", strict=True)] == [False, True, True]
    panels = [attrs["id"] for attrs, _ in tree.all("section") if attrs.get("role") == "tabpanel"]
    assert panels == [attrs["aria-controls"] for attrs, _ in tabs] and 'id="eval"' in text
    heads = [text for _, text in tree.all("h2") if text.startswith("Leaderboard")]
    assert heads == [f"Leaderboard: {label}" for _, label in tabs]
    assert text.count('class="facts"') == 3
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("kind", list(result_files.MADE))
def test_missing_kinds_are_left_out(kind: str, tmp_path: Path) -> None:
    text = page.html([read(path) for path in result_files.write(tmp_path, kind)])
    tree = Tree(text)
    assert len(tree.all("table")) == (2 if kind == "eval" else 1)
    assert ('class="finding"' in text) == (kind == "eval")
    assert [attrs["id"] for attrs, _ in tree.all("section")] == [kind, "again", "limits"]


def test_what_is_null_is_a_dash_or_left_out(tmp_path: Path) -> None:
    body = result_files.evaluation()
    for row in body["policies"]:
        row |= {"prefill_ms": None, "indispensable": None, "by_kind": {"color": 0.5}}
    body["data"] = {**body["data"], "kinds": ["color"], "bad": 0}
    results.save(tmp_path / "a.json", "eval", body, seed=0)
    text = page.html([read(tmp_path / "a.json")])
    tree = Tree(text)
    kinds = [attrs["class"] for attrs, _ in tree.all("svg")]
    assert kinds.count("plot") == 2 and "radar" not in kinds  # no times; one kind makes no radar
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


# -- words -------------------------------------------------------------------------------------------------------------
def row(name: str, low: float, ms: float) -> dict[str, Any]:
    versus = {"difference": low + 0.01, "low": low, "high": low + 0.02}
    costs = {"mean_keep": 0.5, "kv_mib": 1.0, "gflops": 1.0, "prefill_ms": {"median": ms}}
    return {"policy": f"{name}:keep=0.5", "name": name, "versus_none": versus, **costs}


def finding(*rows: dict[str, Any]) -> str:
    none = {**row("none", 0.0, 100.0), "policy": "none", "kv_mib": 4.0}
    data = {"kind": "eval", "policies": [none, *rows]}
    return " ".join(re.sub("<[^>]+>", "", s) for s in words.finding(Result(Path("x.json"), data)))


def test_the_headline_is_the_cheapest_that_is_as_good_as_none() -> None:
    text = finding(row("fastv", -0.021, 10.0), row("gsearch", -0.02, 20.0), row("pyramid", 0.0, 30.0))
    assert "whose interval stays within 2 points of no reduction is gsearch:keep=0.5: −1.0 points [−2.0, +0.0]" in text
    assert "prefill 5.0× faster, KV cache 4.0× smaller" in text and "baseline" not in text


def test_the_headline_does_not_hide_a_baseline_that_does_as_well() -> None:
    text = finding(row("fastv", 0.0, 20.0), row("uniform", -0.01, 10.0), row("random", -0.5, 1.0))
    assert "The cheapest plain baseline that does is uniform:keep=0.5" in text and "prefill 10.0× faster" in text
    text = finding(row("fastv", -0.5, 20.0), row("random", -0.5, 1.0))
    assert text == "No method’s interval stays within 2 points of no reduction."
    assert "No plain baseline" in finding(row("fastv", 0.0, 20.0), row("random", -0.5, 1.0))


def test_without_all_times_the_cheapest_is_by_flops() -> None:
    slow, untimed = row("fastv", 0.0, 20.0), {**row("gsearch", 0.0, 1.0), "prefill_ms": None, "gflops": 0.5}
    assert words.cheapest([slow, untimed]) is untimed
    assert words.cheapest([slow, {**untimed, "gflops": 2.0}]) is slow
    assert words.cheapest([row("fastv", -0.1, 1.0)]) is None


def test_limits_follow_from_what_was_measured(result_folder: Path, tmp_path: Path) -> None:
    found = [read(path) for path in sorted(result_folder.glob("*.json"))]
    text = " ".join(words.limits(found))
    for part in (
        "3.5 M parameters",
        "15 comparisons",
        "p\u00a0<\u00a00.0033",
        "3 samples could not be read",
        "CPU cores",
    ):
        assert part in text
    alone = " ".join(words.limits([read(path) for path in result_files.write(tmp_path, "scale")]))
    assert "pocket" not in alone and "comparisons" not in alone and "random weights" in alone


# -- plots -------------------------------------------------------------------------------------------------------------
def point(cost: float, accuracy: float) -> plots.Point:
    return plots.Point("fastv", f"fastv {cost:g}", cost, accuracy, accuracy - 0.01, accuracy + 0.01, "title")


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    points = [point(1, 0.5), point(2, 0.5), point(2, 0.7), point(3, 0.6), point(4, 0.9)]
    assert plots.front(points) == [points[0], points[2], points[4]]


def test_labels_do_not_lie_on_each_other_or_on_points() -> None:
    rng = np.random.default_rng(0)
    points = [point(float(c), float(a)) for c, a in rng.uniform(0.4, 1.0, (40, 2))]
    drawing = str(plots.pareto(points, "ms", plots.styles(["fastv"])))
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="start" class="label c0">([^<]+)', drawing)
    boxes = [(float(x), float(y) - 9, float(x) + svg.CHAR * len(t), float(y) + 3) for x, y, t in found]
    assert len(boxes) >= 3
    marks = [(float(x) + 4.5, float(y)) for x, y in re.findall(r'<path d="M([\d.]+),([\d.]+)a', drawing)]
    assert len(marks) == 40
    for i, box in enumerate(boxes):
        assert not any(svg.overlap(box, other) for other in boxes[i + 1 :])
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in marks)


def test_scales_and_their_ticks() -> None:
    linear = svg.Scale(0.0, 10.0, 100.0, 0.0)
    assert linear(2.5) == 75.0 and linear.ticks() == [0, 2, 4, 6, 8, 10]
    log = svg.Scale(1.0, 1000.0, 0.0, 300.0, log=True)
    assert log(10.0) == pytest.approx(100.0) and log.ticks() == [1, 10, 100, 1000]
    assert svg.Scale(0.895, 0.99, 0, 1).ticks() == [0.9, 0.92, 0.94, 0.96, 0.98]
    assert svg.Scale(40.0, 44.0, 0, 1, log=True).ticks() == [40, 41, 42, 43, 44]  # no round power in it
    with pytest.raises(ValueError, match="choose one of circle"):
        svg.outline(0, 0, "star", 1)


def test_baselines_are_hollow_and_methods_differ() -> None:
    look = plots.styles(["none", "random", "uniform", *(f"m{i}" for i in range(17))])
    assert (look["none"].css, look["random"].css, look["uniform"].css) == ("none", "base", "base")
    assert len(set(look.values())) == len(look) == 20


def test_numbers_are_written_as_one_reads_them() -> None:
    shown = [cells.number(v) for v in (None, 0, 0.0123, 1.5, 43.0, 99.96, 123.4, 12345.6)]
    assert shown == ["–", "0", "0.0123", "1.50", "43.0", "100", "123", "12,346"]
    assert [cells.chance(p).text for p in (None, 0.0, 0.03, 0.5)] == ["–", "< 0.001", "0.030", "0.50"]


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
