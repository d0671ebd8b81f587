"""The page in a real headless Chromium: what it looks like, that it fits, that it sorts, that nothing complains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")


PROBE = """<script>
const out = {};
out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
out.width = window.innerWidth;
out.text = Math.min(...[...document.querySelectorAll(".plot text")].map((text) => text.getBoundingClientRect().height));
const labels = [...document.querySelectorAll(".plot")].map(
  (plot) => [...plot.querySelectorAll(".label")].map((label) => label.getBBox()));
out.clash = labels.some((boxes) => boxes.some((a, i) => boxes.slice(i + 1).some((b) =>
  a.x < b.x + b.width && b.x < a.x + a.width && a.y + 2 < b.y + b.height - 2 && b.y + 2 < a.y + a.height - 2)));
const head = (i) => document.querySelector("table").tHead.rows[0].cells[i];
const column = (i) => [...document.querySelector("table").tBodies[0].rows].map((row) => row.cells[i].dataset.v);
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
</script></body>"""
"""Runs at the page's end, tells the page around it what it found."""
FRAME = """<!doctype html><pre id="probe"></pre><script>
addEventListener("message", (event) => {{ document.getElementById("probe").textContent = event.data; }});
</script><iframe src="{}" width="{}" height="1200" style="border: 0"></iframe>"""
"""A window has a least width of 500, a frame has none."""


def browse(html: Path, profile: Path, width: int, *args: str, dark: bool = False) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={profile}", f"--window-size={width},1200",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", *args, html.as_uri(),
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


@pytest.mark.parametrize("width", [1280, 820, 390])
def test_it_fits_and_sorts(site: Path, result_folder: Path, tmp_path: Path, width: int) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(site.read_text().replace("</body>", PROBE))
    (tmp_path / "frame.html").write_text(FRAME.format(probed.name, width))
    done = browse(tmp_path / "frame.html", tmp_path / "profile", 1400, "--dump-dom", "--virtual-time-budget=5000")
    found = re.search(r'<pre id="probe">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-500:]
    out = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
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
