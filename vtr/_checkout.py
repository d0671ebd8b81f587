"""A checkout on the path that is not installed: its families and its measurements stand beside ``vtr``, not in it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def look_beside(path: list[str]) -> None:
    """Find ``vtr.integrations`` and ``vtr.eval`` beside this folder, unless they are installed.

    Args:
        path: the ``__path__`` of ``vtr``.

    Raises:
        ModuleNotFoundError: they are neither installed nor there.
    """
    if find_spec("vtr.integrations") is not None:
        return
    root = Path(__file__).parents[1]
    if not (root / "integrations" / "__init__.py").is_file():
        raise ModuleNotFoundError(
            "vtr is not installed, and its model families do not stand beside it: run pip install -e . in the clone",
            name="vtr.integrations",
        )
    path.append(str(root))


look_beside(sys.modules["vtr"].__path__)  # type: ignore[arg-type]
