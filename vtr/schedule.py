"""How many vision tokens enter each decoder layer: a list of keeps, one per layer. A schedule is data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from vtr.base import Keep, check_keep, keep_count


class Schedule(Sequence[Keep]):
    """What enters each decoder layer: ratios in (0, 1] of the row's vision tokens, or counts (ints).

    ``Schedule([1.0, 1.0, 0.5, 36])``: layers 0 and 1 see all tokens, layer 2 half of them, layer 3 thirty-six.

    Raises:
        TypeError: not a sequence of ints and floats.
        ValueError: empty, a ratio outside (0, 1], a count below 1, or keeps of one kind that grow with depth
            (a token that is gone does not come back).
    """

    def __init__(self, keeps: Sequence[Keep]) -> None:
        if isinstance(keeps, (str, bytes)) or not isinstance(keeps, Sequence):
            raise TypeError(f"a schedule is a list with one keep per decoder layer, got {keeps!r}")
        if not keeps:
            raise ValueError("a schedule needs one keep per decoder layer, got none")
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

    def __getitem__(self, layer):  # type: ignore[no-untyped-def]
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

    def to_json(self) -> list[Keep]:
        """The keeps as a JSON list (ratios stay floats, counts ints)."""
        return list(self._keeps)

    def save(self, path: str | Path) -> None:
        """Write the schedule as a JSON list."""
        Path(path).write_text(json.dumps(self.to_json()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a JSON list of keeps.
        """
        try:
            return cls(json.loads(Path(path).read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{path} is not a schedule: it needs a JSON list with one keep per decoder layer"
            ) from error


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
