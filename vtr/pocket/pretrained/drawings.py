"""Drawings of 151 things in ten styles, from openly licensed packages of emoji: what the pretrained model learns.

The packages are fetched with npm by name and version, checked by sha256, and read as the archives they are. They are
needed to train the model, not to use it: the drawings of the held-out style are shipped (``held-out.webp``).
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .wheels import PackageError, check

_HERE = Path(__file__).parent
SHEET = _HERE / "held-out.webp"
"""The drawings of the held-out style, one beside the other in the order of :func:`drawn_names`."""
SIDE = 128
"""Pixels along a side of a drawing."""
ACROSS = 24
"""Drawings in a line of the sheet."""
SMALL = 80
"""Pixels along a side of a drawing on the sheet."""


@dataclass(frozen=True)
class Style:
    """One package of drawings.

    Attributes:
        use: "train", "val" (early stopping) or "test" (what the figures are of).
    """

    name: str
    version: str
    sha256: str
    licence: str
    use: str = "train"

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.name}@{self.version}"

    @property
    def archive(self) -> str:
        return f"iconify-json-{self.name}-{self.version}.tgz"


BY = "CC-BY-4.0"
STYLES = (
    Style("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", BY),
    Style("openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5", "CC-BY-SA-4.0"),
    Style("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT"),
    Style("fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b", "MIT"),
    Style("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", BY),
    Style("emojione-v1", "1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3", "CC-BY-SA-4.0"),
    Style("fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", "Apache-2.0"),
    Style("streamline-emojis", "1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc", BY),
    Style("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0", "val"),
    Style("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0", "test"),
)


@dataclass(frozen=True)
class Thing:
    """Something that can be drawn. ``ids``: what packages call it, letters and digits only."""

    name: str
    kind: str
    ids: frozenset[str]


@dataclass(frozen=True)
class Drawing:
    """A drawing of a thing, [SIDE, SIDE, 4] uint8 (RGBA)."""

    thing: Thing
    style: str
    pixels: np.ndarray


@cache
def things() -> tuple[Thing, ...]:
    """All of them, in the order of ``names.txt``: one line a kind, ``name`` or ``name=id+id``."""
    found = []
    for line in (_HERE / "names.txt").read_text(encoding="utf-8").splitlines():
        kind, _, rest = line.partition(": ")
        for word in rest.split():
            name, _, ids = word.partition("=")
            found.append(Thing(name.replace("_", " "), kind, frozenset((ids or _plain(name)).split("+"))))
    return tuple(found)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# -- packages ----------------------------------------------------------------------------------------------------------
def fetch(style: Style, where: Path) -> Path:
    """The style's archive in the folder ``where``, downloaded with npm unless it is there.

    Raises:
        PackageError: it cannot be downloaded, or is another file than the pinned one.
    """
    path = where / style.archive
    if not path.is_file():
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=where) as fresh:
            try:
                done = subprocess.run(
                    ["npm", "pack", "--silent", style.package], cwd=fresh, capture_output=True, text=True, check=False
                )
            except FileNotFoundError as error:
                raise PackageError(
                    f"npm is missing: install it, or put {style.archive} (`npm pack {style.package}`) into {where}"
                ) from error
            got = Path(fresh) / style.archive
            if done.returncode or not got.is_file():
                raise PackageError(f"cannot download {style.package}: {done.stderr.strip()[-200:]}")
            shutil.move(got, path)
    check(style.sha256, path, f"delete {path}")
    return path


def read(style: Style, where: Path) -> list[Drawing]:
    """All drawings of things in one style; a thing has none, one or several.

    Raises:
        PackageError: as :func:`fetch`, or resvg-py (which draws SVG) is not installed.
    """
    with tarfile.open(fetch(style, where)) as archive:
        member = archive.extractfile("package/icons.json")
        if member is None:
            raise PackageError(f"{style.archive} does not hold package/icons.json")
        pack = json.load(member)
    owners = {one: thing for thing in things() for one in thing.ids}
    found = []
    for name, icon in sorted(pack["icons"].items()):
        if (thing := owners.get(_plain(name))) is not None:
            found.append(Drawing(thing, style.name, draw(icon, pack)))
    return found


def draw(icon: dict[str, Any], pack: dict[str, Any]) -> np.ndarray:
    """One icon of an iconify pack as RGBA, [SIDE, SIDE, 4] uint8."""
    try:
        import resvg_py
    except ImportError as error:
        raise PackageError("drawing SVG needs resvg-py: pip install 'vtr[pretrained]'") from error
    wide, high = (icon.get(one, pack.get(one, 16)) for one in ("width", "height"))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}">{icon["body"]}</svg>'
    made = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    return square(Image.open(io.BytesIO(bytes(made))))


def square(picture: Image.Image) -> np.ndarray:
    """A cut-out picture as RGBA in the middle of a square, [SIDE, SIDE, 4] uint8, without its empty margin."""
    picture = picture.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox() or None)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if (scale := SIDE / max(picture.size)) > 1:
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
        )
    whole = Image.new("RGBA", (SIDE, SIDE))
    whole.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return np.asarray(whole)


# -- photographs -------------------------------------------------------------------------------------------------------
def photographs(folder: Path) -> list[Drawing]:
    """Cut-out photographs of things among Tux Paint's stamps (Debian: tuxpaint-stamps-default, GPL-2; not shipped).

    One is taken where its sentence ends with the name of a thing ("A wild boar.").
    """
    names = {thing.name: thing for thing in things()}
    found = []
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        if {"cartoon", "symbols"} & set(path.parts) or not text.is_file() or "_mirror" in path.name:
            continue
        said = re.sub(r"[^a-z ]", "", text.read_text(encoding="utf-8", errors="replace").split("\n")[0].lower()).split()
        words = said[1:] if said[:1] in (["a"], ["an"], ["the"]) else said
        for count in (2, 1):
            thing = names.get(" ".join(words[-count:]))
            if thing is not None and len(words) <= count + 2:
                found.append(Drawing(thing, "photographs", square(Image.open(path))))
                break
    return found


# -- the held-out style ------------------------------------------------------------------------------------------------
def write_sheet(drawings: Iterable[Drawing], path: Path = SHEET) -> None:
    """One drawing a thing (the first), as a picture of :data:`ACROSS` in a line."""
    first: dict[str, Drawing] = {}
    for one in drawings:
        first.setdefault(one.thing.name, one)
    rows = -(-len(things()) // ACROSS)
    sheet = Image.new("RGBA", (ACROSS * SMALL, rows * SMALL))
    for n, thing in enumerate(things()):
        drawn = Image.fromarray(first[thing.name].pixels).resize((SMALL, SMALL), Image.Resampling.LANCZOS)
        sheet.paste(drawn, (n % ACROSS * SMALL, n // ACROSS * SMALL))
    sheet.save(path, quality=80, method=6)


@cache
def held_out() -> tuple[Drawing, ...]:
    """The shipped drawings of the style that the model never saw, one a thing."""
    sheet = Image.open(SHEET).convert("RGBA")
    found = []
    for n, thing in enumerate(things()):
        left, top = n % ACROSS * SMALL, n // ACROSS * SMALL
        small = sheet.crop((left, top, left + SMALL, top + SMALL))
        found.append(Drawing(thing, "noto", np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))))
    return tuple(found)
