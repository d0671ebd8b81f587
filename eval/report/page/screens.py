"""The docs' pictures of the result page: ``python -m vtr.eval.report.page.screens`` takes them anew, with Chromium.

The page's first sentence is written into each PNG's metadata (``vtr``), so that a test notices a picture that is older
than the results.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from vtr.eval.report.page import html
from vtr.eval.report.page.data import files, read
from vtr.eval.report.page.first import screen

RESULTS, FOLDER = Path("eval/results"), Path("docs/pictures")
PICTURES = {"page.png": (1400, 1000), "page-narrow.png": (420, 1230)}
"""File → width and height of the window, in pixels."""
FRAME = (
    "<!doctype html><style>body {{ margin: 0 }} iframe {{ border: 0 }}</style>"
    '<iframe src="{}" width="{}" height="{}"></iframe>'
)
"""A window has a least width of 500, a frame has none."""


def chromium() -> str | None:
    """Path of a Chromium or Chrome."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def sentence(paths: Sequence[Path]) -> str:
    """What the page of these results says first, as text.

    Raises:
        ValueError: there is no evaluation among them.
    """
    made = screen([one for one in map(read, files(paths)) if one.kind == "eval"])
    if made is None:
        raise ValueError(f"no result of kind eval in {', '.join(map(str, paths))}: the page has no first screen")
    return re.sub("<[^>]+>", "", str(made.sentence))


def take(page: Path, out: Path, width: int, height: int, browser: str) -> None:
    """One picture of a page's top, in few colours.

    Raises:
        RuntimeError: the browser took none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        frame, shot = page.with_name("frame.html"), Path(scratch) / "shot.png"
        frame.write_text(FRAME.format(page.name, width, height))
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                   "--disable-background-networking", f"--user-data-dir={scratch}/profile",
                   f"--window-size={width},{height}", f"--screenshot={shot}", frame.as_uri()]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        if not shot.is_file():
            raise RuntimeError(f"{browser} took no picture: {done.stderr.strip()[-300:]}")
        with Image.open(shot) as picture:
            few = picture.convert("RGB").crop((0, 0, width, height)).quantize(64, dither=Image.Dither.NONE)
    info = PngInfo()
    info.add_itxt("vtr", sentence([RESULTS]))
    few.save(out, pnginfo=info, optimize=True)


def main(out: Annotated[Path, typer.Option(help="the folder for the pictures")] = FOLDER) -> None:
    """Take the pictures of the page of eval/results that the docs show."""
    browser = chromium()
    if browser is None:
        raise typer.BadParameter("no Chromium on PATH: apt-get install chromium")
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "index.html"
        page.write_text(html([read(path) for path in files([RESULTS])]), encoding="utf-8")
        for name, (width, height) in PICTURES.items():
            take(page, out / name, width, height, browser)
            print(out / name)


if __name__ == "__main__":
    typer.run(main)
