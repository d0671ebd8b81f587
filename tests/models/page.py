"""docs/models.md and the count in the README, made of the outcomes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from tests.models.oracles import GROUPS
from vtr.engine.adapters import families

ROOT = Path(__file__).parents[2]
PAGE, README, FAMILIES = ROOT / "docs" / "models.md", ROOT / "README.md", ROOT / "docs" / "families.md"
OPEN, CLOSE = "<!-- vtr:models -->\n", "<!-- /vtr:models -->"
COUNT = re.compile(r"\d+ families, \d+ model classes")
HEADS = {
    "before": "before the decoder", "inside": "inside it", "route": "around layers", "attend": "attention",
    "forget": "forgetting",
}  # fmt: skip
PATHS = {"packed": "packed", "padded": "padded", "refused": "refused", "not built": "not tried"}
Data = dict[str, Any]


def version() -> str:
    return transformers.__version__


def counts(data: Data) -> str:
    """How many classes take which path, in a sentence."""
    found = Counter(one["path"] for one in data["classes"].values())
    words = {
        "packed": "take every kind of policy (packed)",
        "padded": "policies that act before the decoder (padded)",
        "refused": "are refused",
        "not built": "could not be built tiny, so nobody knows",
    }
    said = ", ".join(f"{found[path]} {word}" for path, word in words.items() if found[path])
    return f"Of {len(data['classes'])} model classes of transformers {data['transformers']}, {said}."


def count(data: Data) -> str:
    """What the README says: families that an adapter was written for, and the classes that can be reduced."""
    classes = sum(one["path"] in ("packed", "padded") for one in data["classes"].values())
    return f"{len(families())} families, {classes} model classes"


def write(data: Data) -> None:
    """Put table and counts into the pages."""
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), data), encoding="utf-8")
    for page in (README, FAMILIES):
        page.write_text(COUNT.sub(count(data), page.read_text(encoding="utf-8")), encoding="utf-8")


def with_table(page: str, data: Data) -> str:
    """The page with the table of these outcomes in it."""
    head, rest = page.split(OPEN)
    return head + OPEN + table(data) + CLOSE + rest.split(CLOSE)[1]


class Notes:
    """Footnotes: each text once, numbered as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"


def table(data: Data) -> str:
    """The counts, a line a class, and the footnotes below."""
    notes = Notes()
    head = ["class", "path", *HEADS.values(), "pictures", "decoder", "positions", "mask"]
    lines = [counts(data), "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(line(name, one, notes))} |" for name, one in sorted(data["classes"].items())]
    lines += ["", *(f"<sup>{number}</sup> {text}  " for number, text in enumerate(notes.texts, 1))]
    return "\n".join(lines) + "\n"


def line(name: str, one: Data, notes: Notes) -> list[str]:
    """The cells of one class."""
    path = PATHS[one["path"]] + (notes(sentence(one["why"])) if one.get("why") else "")
    if "decoder" not in one:
        return [f"`{short(name)}`", path, *["–"] * (len(HEADS) + 4)]
    kinds = [kind for kind in one["layers"] if kind != "full"]
    decoder = f"{one['decoder']}{' (' + ', '.join(kinds) + ')' if kinds else ''}"
    positions = "3 axes" if one["positions"].startswith("several") else "1 axis"
    unpainted = notes(sentence(one["not_painted"])) if "not_painted" in one else ""
    groups = [cell(name_of(group), one, notes) for group in GROUPS] if not unpainted else [f"–{unpainted}"] * len(HEADS)
    seen = pictures(one.get("pictures"), one["path"], notes)
    return [f"`{short(name)}`", path, *groups, seen, decoder, positions, one["mask"]]


def short(name: str) -> str:
    """A class's name without what nearly all names end in."""
    return name.removesuffix("ForConditionalGeneration")


def name_of(group: str) -> Iterable[str]:
    return GROUPS[group]


def cell(policies: Iterable[str], one: Data, notes: Notes) -> str:
    """✓ where all policies of a group pass; – where they are refused; ✗ where one does not do what it should."""
    said = {name: one["policies"][name] for name in policies if name in one["policies"]}
    if one["path"] == "padded" and said and all(text.startswith("refused") for text in said.values()):
        return "–"
    odd = {name: text for name, text in said.items() if text != "passes"}
    marks = "".join(notes(f"`{name}`: {sentence(text.removeprefix('refused: '))}") for name, text in odd.items())
    if any(text.startswith(("fails", "raises")) for text in odd.values()):
        return f"✗{marks}"
    if len(odd) == len(said):
        return f"–{marks}"
    return "✓" + marks + (notes(unsteady(one["unsteady"])) if one.get("unsteady") else "")


def unsteady(what: Iterable[str]) -> str:
    words = {"batch": "a row says something else beside others", "cache": "it says something else without a cache"}
    return f"not asked for, because unpatched {' and '.join(words[name] for name in what)}"


def pictures(found: Data | None, path: str, notes: Notes) -> str:
    """The form of the pixels that was tried, and what did not pass; what the path refuses is said once, there."""
    if found is None:
        return "not tried"
    fine = ("passes", "refused") if path == "padded" else ("passes",)
    odd = {name: text for name, text in found["policies"].items() if text not in fine}
    marks = "".join(notes(f"`{name}`: {sentence(text.removeprefix('refused: '))}") for name, text in odd.items())
    sign = "✗" if any(text.startswith(("fails", "raises")) for text in odd.values()) else "✓"
    return f"{sign}{marks} {found['form']}, {found['tokens']} tokens"


def sentence(text: str) -> str:
    """A reason as a cell or a footnote can hold it: without what breaks tables, and without the way out."""
    first = re.split(r"\. (?=Use |To |Known|It sees|vtr\.)", text)[0]
    return first.replace("|", "\\|").replace("\n", " ")
