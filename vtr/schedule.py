"""How many vision tokens enter each decoder layer: a list of keeps, one per layer. A schedule is data."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import overload

from vtr.files import read_json
from vtr.keep import Keep, check_keep, keep_count
from vtr.limits import MOST_LAYERS, short
from vtr.markup import stairs
from vtr.markup import table as html_table

PRESETS = Path(__file__).parent / "presets"
SCHEDULE_NAME = "schedule.json"
LONGEST = 2**16
"""Bytes of a schedule's file: some thousands of layers."""


class Schedule(Sequence[Keep]):
    """What enters each decoder layer: ratios in (0, 1] of the row's vision tokens, or counts (ints).

    ``Schedule([1.0, 1.0, 0.5, 36])``: layers 0 and 1 see all tokens, layer 2 half of them, layer 3 thirty-six.

    Raises:
        TypeError: not a sequence of ints and floats.
        ValueError: empty, more than 1024 entries, a ratio outside (0, 1], a count below 1, or keeps of one kind that
            grow with depth (a token that is gone does not come back).
    """

    def __init__(self, keeps: Sequence[Keep]) -> None:
        if isinstance(keeps, (str, bytes)) or not isinstance(keeps, Sequence):
            raise TypeError(f"a schedule is a list with one keep per decoder layer, got {short(repr(keeps))}")
        if not keeps:
            raise ValueError("a schedule needs one keep per decoder layer, got none")
        if len(keeps) > MOST_LAYERS:
            raise ValueError(f"a schedule of {len(keeps)} entries: decoders have at most {MOST_LAYERS} layers")
        last: dict[type, Keep] = {}
        for layer, keep in enumerate(keeps):
            check_keep(keep, f"schedule[{layer}]")
            if keep == 0:
                raise ValueError(f"schedule[{layer}]={keep!r}: a ratio lies in (0, 1], a count is at least 1")
            before = last.get(type(keep))
            if before is not None and keep > before:
                raise ValueError(
                    f"schedule[{layer}]={keep!r} is more than {before!r} in a layer before it: "
                    "dropped tokens do not come back, so a schedule never grows"
                )
            last[type(keep)] = keep
        self._keeps = tuple(keeps)

    @overload
    def __getitem__(self, layer: int) -> Keep: ...
    @overload
    def __getitem__(self, layer: slice) -> tuple[Keep, ...]: ...
    def __getitem__(self, layer: int | slice) -> Keep | tuple[Keep, ...]:
        return self._keeps[layer]

    def __len__(self) -> int:
        return len(self._keeps)

    def __iter__(self) -> Iterator[Keep]:
        return iter(self._keeps)

    def __eq__(self, other: object) -> bool:
        # 1 (a token) and 1.0 (all of them) compare equal in Python, not here
        return isinstance(other, Schedule) and [*map(repr, self)] == [*map(repr, other)]

    def __hash__(self) -> int:
        return hash(tuple(map(repr, self)))

    def __repr__(self) -> str:
        return f"Schedule({list(self._keeps)})"

    def table(self) -> str:
        """One line of plain text: how many layers, and their keeps, equal ones of neighbors together."""
        runs = [(keep, len(list(same))) for keep, same in groupby(self._keeps, key=repr)]
        return f"{len(self)} layers: " + ", ".join(f"{keep} × {n}" if n > 1 else keep for keep, n in runs)

    def _repr_html_(self) -> str:
        """A bar a layer (counts beside ratios: as shares of the largest count), and the keeps, for notebooks."""
        most = max((keep for keep in self._keeps if isinstance(keep, int)), default=1)
        shares = [keep / most if isinstance(keep, int) else keep for keep in self._keeps]
        return html_table((), [(stairs(shares, 1), self.table())], "schedule")

    def counts(self, total: int) -> list[int]:
        """Tokens that enter each layer, of ``total`` vision tokens."""
        counts, here = [], total
        for keep in self._keeps:
            here = min(here, keep_count(keep, total))
            counts.append(here)
        return counts

    def mean_keep(self, total: int) -> float:
        """Mean over layers of the share of ``total`` tokens that enters."""
        return sum(self.counts(total)) / (len(self) * total) if total else 1.0

    def resample(self, layers: int) -> Schedule:
        """This schedule for a decoder of another depth: keeps at the same relative depth, ratios interpolated.

        A schedule of as many layers is returned as it is. Else a warning says that it was made for another depth (what
        a model needs layer by layer differs; in G-Search's Table 4 a borrowed schedule costs up to 1.7 points).

        Raises:
            ValueError: less than 1 layer, more than 1024, or counts and ratios mixed (they cannot be interpolated).
        """
        if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
            raise ValueError(f"layers={short(repr(layers))}: a decoder has at least 1 layer, and at most {MOST_LAYERS}")
        if layers == len(self):
            return self
        kinds = {type(keep) for keep in self._keeps if keep != 1.0 or isinstance(keep, int)}
        if len(kinds) > 1:
            raise ValueError("a schedule that mixes ratios and counts cannot be resampled: write it anew")
        warnings.warn(
            f"a schedule of {len(self)} layers is resampled to {layers}: it was not made for this depth, so check the "
            "accuracy, or search one for this model (vtr search gsearch)",
            UserWarning,
            stacklevel=3,
        )
        step = (len(self) - 1) / max(layers - 1, 1)
        return Schedule([self._between(layer * step) for layer in range(layers)])

    def _between(self, place: float) -> Keep:
        """The keep at a place between two layers; between a ratio and a count it is the nearer layer's."""
        low = min(int(place), len(self) - 1)
        a, b = self._keeps[low], self._keeps[min(low + 1, len(self) - 1)]
        if isinstance(a, float) and isinstance(b, float):
            between = a + (b - a) * (place - low)
            return round(between, 4) or between  # a ratio above 0 stays one
        if isinstance(a, int) and isinstance(b, int):
            return round(a + (b - a) * (place - low))
        return a if place - low < 0.5 else b

    def to_json(self) -> list[Keep]:
        """The keeps as a JSON list (ratios stay floats, counts ints)."""
        return list(self._keeps)

    def save(self, path: str | Path) -> None:
        """Write the schedule as a JSON list."""
        Path(path).write_text(json.dumps(self.to_json()) + "\n")

    @classmethod
    def named(cls, name: str | Path) -> Schedule:
        """A preset by its name, or what a file (or the ``schedule.json`` of a folder) holds.

        Raises:
            FileNotFoundError: neither. ValueError: a file that is no schedule.
        """
        if str(name).lower() in (known := presets()):
            return known[str(name).lower()].schedule
        path = Path(name)
        try:
            path = path / SCHEDULE_NAME if path.is_dir() else path
            there = path.is_file()
        except OSError:  # too long for a path
            there = False
        if not there:
            raise FileNotFoundError(f"{str(name)[:80]} is neither a file nor one of the presets: {', '.join(known)}")
        return cls.load(path)

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a JSON list of keeps.
        """
        keeps = read_json(path, "a schedule", LONGEST)
        try:
            return cls(keeps)
        except TypeError as error:
            raise ValueError(
                f"{path} is not a schedule: it needs a JSON list with one keep per decoder layer"
            ) from error


@dataclass(frozen=True)
class Preset:
    """A schedule that comes with the package.

    Attributes:
        model: which model it was made for. source: who made it, and how it came here (read off a figure, searched).
    """

    name: str
    schedule: Schedule
    model: str
    source: str


@lru_cache(maxsize=1)
def presets() -> dict[str, Preset]:
    """The presets by name, for ``vtr.GSearch("llava-1.5-7b")``; they lie in ``vtr/presets`` with their provenance."""
    found = {}
    for path in sorted(PRESETS.glob("*.json")):
        for name, one in json.loads(path.read_text(encoding="utf-8")).items():
            found[name] = Preset(name, Schedule(one["schedule"]), one["model"], one["source"])
    return found


def progressive(
    num_hidden_layers: int, high: float = 0.85, low: float = 0.15, factor: float = 0.5, period: int | None = None,
    shape: str = "cosine",
) -> list[float | None]:  # fmt: skip
    """p-MoD's progressive ratio decay (PRD): the share of vision tokens that passes each decoder layer.

    r(l) = 0.5 · cos(π l / period) + factor ("cosine"), or 0.5 - l / period + factor ("linear"). A layer whose r(l) is
    above ``high`` is dense (None); the others let max(r(l), ``low``) pass.

    Args:
        period: the layer at which the cosine is over; None: the last one. The official code has 31 in it, the last
            layer of its 32.
    """
    span = (num_hidden_layers - 1 if period is None else period) or 1
    ratios: list[float | None] = []
    for layer in range(num_hidden_layers):
        fall = 0.5 * math.cos(math.pi * layer / span) if shape == "cosine" else 0.5 - layer / span
        ratios.append(max(fall + factor, low) if fall + factor <= high else None)
    return ratios
