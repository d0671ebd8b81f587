"""Runs a module from a clone that is not installed, where only torch, transformers, numpy and what these need exist.

python tests/eval/bare.py MODULE ARGUMENTS…, with the clone on PYTHONPATH.
"""

from __future__ import annotations

import re
import runpy
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from typing import Any

ROOTS = ("torch", "transformers", "numpy")
NEVER = {"typer", "rich", "matplotlib", "PIL", "accelerate", "sklearn", "bayes_opt", "scipy"}
"""Also not where transformers names them for its own command line, and what torch takes if it is there."""


def needed(roots: tuple[str, ...]) -> set[str]:
    """The distributions that ``roots`` require, without extras, and they themselves."""
    seen, todo = set[str](), list(roots)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        try:
            wants = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in seen:
            seen.add(name)
            todo += [re.split(r"[ ;<>=!~\[(]", want)[0] for want in wants if "extra ==" not in want]
    return seen


def hidden() -> set[str]:
    """Top-level modules of all other distributions."""
    kept = needed(ROOTS)
    named = {top: {re.sub(r"[-_.]+", "-", d).lower() for d in found} for top, found in packages_distributions().items()}
    return NEVER | {top for top, found in named.items() if not found & kept and top != "vtr"}


class Gate:
    """A finder that does not find what is hidden."""

    def __init__(self, finder: Any, hide: set[str]) -> None:
        self.finder, self.hide = finder, hide

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.hide else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


if __name__ == "__main__":
    hide = hidden()
    installed = [
        finder for finder in sys.meta_path if "__editable__" in f"{finder!r}{getattr(finder, '__module__', '')}"
    ]
    sys.meta_path[:] = [Gate(finder, hide) for finder in sys.meta_path if finder not in installed]
    sys.path[:] = [entry for entry in sys.path if not entry.endswith(("tests/eval", "__path_hook__"))]
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
