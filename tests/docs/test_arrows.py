"""Who imports whom, drawn from the code: no circles, and no arrow that docs/architecture.md does not name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"vtr": "vtr", "integrations": "vtr.integrations", "eval": "vtr.eval"}
ROOMS = {
    "ground": "about checks files image keep limits markup settings shares",
    "base": "answers auto_policy base by_image chain inputs learned parts processing schedule score tokens watch",
    "engine": "engine accounting",
    "data": "chat data",
    "tools": "autopatch budget encode groups models picture showing",
    "pocket": "pocket.__init__ pocket.changes pocket.listing pocket.pretrained.__init__ "
    "pocket.pretrained.canvases pocket.pretrained.drawings pocket.pretrained.wheels pocket.scenes "
    "pocket.shots.__init__ pocket.shots.prompts pocket.video.films",
    "training": "pocket training",
    "clients": "integrations.chat integrations.kept_answers integrations.lmms_eval integrations.vlmevalkit",
    "vllm": "integrations.vllm",
    "integrations": "integrations",
    "commands": "auto cli commands",
    "vtr": "__init__ _checkout _moved",
}
"""Room → modules below ``vtr``, the longest name that fits counts; others are rooms of their own."""


def modules() -> dict[str, Path]:
    """Dotted name (``__init__`` for a package itself) → file."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """What a module imports of vtr, also inside functions; not what it imports for types alone."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in names:
            for some in (full, f"{full}.__init__", full.rpartition(".")[0], f"{full.rpartition('.')[0]}.__init__"):
                if some in MODULES and some != name:
                    yield some
                    break


ARROWS = {name: set(imports(name)) for name in MODULES}


def room(name: str) -> str:
    inside = name.removeprefix("vtr.")
    fits = {
        some: room for room, names in ROOMS.items() for some in names.split() if f"{inside}.".startswith(f"{some}.")
    }
    if fits:
        return fits[max(fits, key=len)]
    parts = inside.split(".")
    return ".".join(parts[:2]) if parts[0] == "eval" else parts[0]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups that reach each other, by what is left when all that lead nowhere are taken away again and again."""
    left = {name: set(to) for name, to in arrows.items()}
    for pruned in (left, {b: {a for a in left if b in left[a]} for b in left}):
        while ends := [name for name, to in pruned.items() if not to & pruned.keys()]:
            for name in ends:
                del pruned[name]
                left.pop(name, None)
    return [[name, *sorted(left[name] & left.keys())] for name in sorted(left)]


def test_no_circles() -> None:
    found = circles(ARROWS)
    assert not found, f"these import each other: {found}"


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"], ["c", "b"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def drawn() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for name, to in ARROWS.items():
        found[room(name)] |= {room(other) for other in to} - {room(name)}
    return {name: to for name, to in found.items() if to}


def declared() -> dict[str, set[str]]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.partition("<!-- vtr:arrows -->")[2].partition("<!-- /vtr:arrows -->")[0]
    lines = re.findall(r"(?m)^([\w.]+) +-> +(.+)$", block)
    return {name: set(to.split(", ")) for name, to in lines}


def test_arrows_are_those_of_the_architecture() -> None:
    """Both ways: an arrow of the code that the page lacks is forbidden, one of the page that the code lacks is gone."""
    lines = "\n".join(f"{name} -> {', '.join(sorted(to))}" for name, to in sorted(drawn().items()))
    assert drawn() == declared(), f"the code draws:\n{lines}"


def test_rooms_have_no_circles() -> None:
    assert not circles(drawn())
