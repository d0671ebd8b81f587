"""The page in a real headless Chromium: what it looks like, that it fits, that it sorts, that nothing complains."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vtr.eval.report import page, results
from vtr.eval.report.page import screens
from vtr.eval.report.page.data import read

from tests import result_files

CHROMIUM = screens.chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]


PROBE = """
const out = {};
out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
out.width = window.innerWidth;
const texts = [...document.querySelectorAll(".plot text")].filter((text) => text.getClientRects().length);
out.text = Math.min(...texts.map((text) => text.getBoundingClientRect().height));
const labels = [...document.querySelectorAll(".plot")].map(
  (plot) => [...plot.querySelectorAll(".label")].map((label) => label.getBBox()));
out.clash = labels.some((boxes) => boxes.some((a, i) => boxes.slice(i + 1).some((b) =>
  a.x < b.x + b.width && b.x < a.x + a.width && a.y + 2 < b.y + b.height - 2 && b.y + 2 < a.y + a.height - 2)));
const head = (i) => document.querySelector("table").tHead.rows[0].cells[i];
const rows = () => [...document.querySelector("table").tBodies[0].rows].filter((row) => row.className !== "more");
const column = (i) => rows().map((row) => row.cells[i].dataset.v);
out.before = head(1).getAttribute("aria-sort");
head(6).querySelector("button").click();
out.up = [head(6).getAttribute("aria-sort"), head(1).getAttribute("aria-sort"), column(6)];
head(6).querySelector("button").click();
out.down = [head(6).getAttribute("aria-sort"), column(6)];
head(3).querySelector("button").click();
out.missing = column(3);
head(0).querySelector("button").focus();
out.focus = document.activeElement === head(0).querySelector("button");
document.activeElement.click();
out.names = column(0);
const mark = document.querySelector(".plots .mark");
mark.dispatchEvent(new MouseEvent("click"));
out.says = mark.closest("figure").querySelector("figcaption").textContent === mark.querySelector("title").textContent;
document.querySelectorAll(".chip")[1].click();
out.lit = [...new Set([...document.querySelectorAll(".lit")].map((part) => part.dataset.name))];
parent.postMessage(JSON.stringify(out), "*");
"""
"""Runs at the page's end, tells the page around it what it found."""
FRAME = """<!doctype html><pre id="probe"></pre><script>
addEventListener("message", (event) => {{ document.getElementById("probe").textContent = event.data; }});
</script><iframe src="{}" width="{}" height="1200" style="border: 0"></iframe>"""
"""A window has a least width of 500, a frame has none."""


def browse(shown: Path, profile: Path, width: int, *args: str, dark: bool = False) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={profile}", f"--window-size={width},1200",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", *args, shown.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_a_screenshot_shows_a_page(site: Path, tmp_path: Path, width: int, dark: bool) -> None:
    shot = tmp_path / "shot.png"
    browse(site, tmp_path / "profile", width, f"--screenshot={shot}", dark=dark)
    picture = np.asarray(Image.open(shot).convert("L"), dtype=float)
    assert picture.shape[1] >= width
    background, ink = (25, 200) if dark else (240, 60)
    assert abs(float(np.median(picture)) - background) < 15
    drawn = picture > ink if dark else picture < ink
    assert 0.01 < drawn.mean() < 0.3  # text, not a blank or a filled page
    assert drawn.any(axis=1).mean() > 0.2  # all the way down, and on both halves
    assert drawn[:, : width // 2].any() and drawn[:, width // 2 : width].any()


def probe(text: str, script: str, tmp_path: Path, width: int) -> dict[str, Any]:
    """What a script at the page's end tells, in a window of this width."""
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", f"<script>{{\n{script}\n}}</script></body>"))
    (tmp_path / "frame.html").write_text(FRAME.format(probed.name, width))
    done = browse(tmp_path / "frame.html", tmp_path / "profile", 1400, "--dump-dom", "--virtual-time-budget=5000")
    found = re.search(r'<pre id="probe">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-500:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [1280, 820, 390])
def test_it_fits_and_sorts(site: Path, result_folder: Path, tmp_path: Path, width: int) -> None:
    out = probe(site.read_text(), PROBE, tmp_path, width)
    assert out["width"] == width and out["overflow"] == 0 and not out["clash"]
    assert out["text"] >= 10  # pixels
    rows = json.loads((result_folder / "eval.json").read_text())["policies"]
    cheap = sorted(row["gflops"] for row in rows)
    assert out["before"] == "descending"
    assert out["up"][:2] == ["ascending", None] and [float(v) for v in out["up"][2]] == cheap
    assert out["down"][0] == "descending" and [float(v) for v in out["down"][1]] == cheap[::-1]
    best = sorted((row["versus_none"]["difference"] for row in rows if row["policy"] != "none"), reverse=True)
    assert [float(v) for v in out["missing"][:-1]] == best and out["missing"][-1] == ""
    assert out["focus"] and out["names"][0] == "downsample:factor=2"
    assert out["says"] and out["lit"] == ["fastv"]


TOUR = """
const out = {}, all = (selector, within = document) => [...within.querySelectorAll(selector)];
const seen = (part) => part.getClientRects().length > 0;
const overflow = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
const key = (part, name) => part.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const state = (tabs) => tabs.map((tab) => [tab.getAttribute("aria-selected"), tab.tabIndex,
  seen(document.getElementById(tab.getAttribute("aria-controls")))]);
const [models, tasks] = all('[role="tablist"]').map((list) => all('[role="tab"]', list));
out.start = [state(models), state(tasks)];
tasks[1].click();
out.tasks = state(tasks);
models[0].focus();
key(models[0], "ArrowRight");
out.right = [state(models), document.activeElement === models[1]];
key(models[1], "Home");
out.home = state(models);
key(models[0], "ArrowLeft");
out.left = state(models);
models[0].click();
tasks[0].click();
const part = document.getElementById(tasks[0].getAttribute("aria-controls"));
const named = () => all("tr[data-name]", part.querySelector("table")).filter(seen).map((row) => row.dataset.name);
const [button, ...others] = all(".open", part), more = document.getElementById(button.getAttribute("aria-controls"));
out.closed = [seen(more), button.getAttribute("aria-expanded")];
others[0].click();
const opened = document.getElementById(others[0].getAttribute("aria-controls"));
const under = () => opened.previousElementSibling === others[0].closest("tr");
const drawn = all(".failures svg", opened).filter((one) => one.getBoundingClientRect().height > 40);
out.opened = [seen(opened), others[0].ariaExpanded, under(), all(".failures li", opened).length, drawn.length];
out.inside = opened.querySelector(".detail").getBoundingClientRect().right <= document.documentElement.clientWidth;
part.querySelector("th:nth-child(7) button").click();
out.kept = under();
const bar = part.querySelector(".filter"), filters = all("button", bar);
const trained = filters.find((one) => one.textContent.startsWith("With weights"));
trained.click();
out.filtered = [named(), bar.querySelector(".count").textContent, seen(opened), trained.getAttribute("aria-pressed")];
out.marks = all(".plots .mark:not(.out)", part).map((mark) => mark.dataset.name);
filters[0].click();
out.again = [named().length, seen(opened)];
const costs = all(".models .filter button"), shown = () => all(".models figure").map(seen);
out.figures = [shown(), (costs[1].click(), shown())];
out.overflow = overflow();
out.width = window.innerWidth;
parent.postMessage(JSON.stringify(out), "*");
"""


@pytest.mark.parametrize("width", [1400, 420])
def test_a_tour(tmp_path: Path, width: int) -> None:
    """Tabs by mouse and keys, a row that opens and keeps its details, a filter, the other figure."""
    made = {"a": result_files.evaluation(n=4000), "b": result_files.evaluation(1), "c": result_files.evaluation(2)}
    made["c"]["model"] = "another"
    made["a"]["settings"] = {"data": "pocket", "limit": 40, "seed": 0}
    for row in made["a"]["policies"]:
        row["versus_none"] |= {"losses": 2, "lost": ["test-0-0-1", "test-0-3-25"]}
    for name, body in made.items():
        results.save(tmp_path / f"{name}.json", "eval", body, seed=0)
    text = page.html([read(tmp_path / f"{name}.json") for name in made])
    out = probe(text, TOUR, tmp_path, width)
    on, off = ["true", 0, True], ["false", -1, False]
    assert out["start"] == [[on, off], [on, off]] and out["tasks"] == [off, on]
    assert out["right"] == [[off, on], True] and out["home"] == [on, off] and out["left"] == [off, on]
    assert out["closed"] == [False, "false"] and out["opened"] == [True, "true", True, 2, 2]
    assert out["inside"] and out["kept"]
    trained = ["none", "dynamic-llava", "pmod"]
    assert sorted(out["filtered"][0]) == sorted(trained) and out["filtered"][1:] == ["2 policies", False, "true"]
    assert set(out["marks"]) == set(trained)
    assert out["again"] == [len(result_files.POLICIES), True]
    assert out["figures"] == [[True, False], [False, True]]
    assert out["overflow"] == 0 and out["width"] == width
