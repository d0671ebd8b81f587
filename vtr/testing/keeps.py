"""The oracle of a setting called ``keep``: a count, a ratio, none, all, and more than there are."""

from __future__ import annotations

import dataclasses

import torch

from vtr.accounting import report
from vtr.base import CHOOSING
from vtr.testing import tiny
from vtr.testing.bench import Bench, Fault, Skip
from vtr.testing.purity import fresh

TRIED: tuple[int | float, ...] = (0, 1, 7, 1000, 0.0, 1.0)
MEND = (
    "vtr.keep_count(self.keep, tokens.total) says how many any keep leaves, and vtr.top(scores, k) takes no more than "
    "there are (vtr.ScorePolicy does both); or let __post_init__ refuse what cannot be, in words"
)


def keep(bench: Bench) -> None:
    """An int leaves at most that many (of a row, an image or a tile); 1.0, and a count nobody reaches, leave all."""
    if "keep" not in {field.name for field in dataclasses.fields(bench.policy)}:
        raise Skip("it has no setting called keep")
    if any(map(bench.policy.asks, CHOOSING)):
        raise Skip("a policy that chooses others has no forward of its own")
    inputs = tiny.single(bench.batch, 0, bench.stock)
    for value in TRIED:
        try:
            policy = dataclasses.replace(fresh(bench.policy), keep=value)  # type: ignore[call-arg]
            policy.check(len(bench.stock.get_decoder().layers))
        except (TypeError, ValueError):
            continue  # it says itself that it takes no such keep
        try:
            with bench.asked(), torch.no_grad():
                bench.model(**inputs, policy=policy)
        except Fault as fault:
            raise Fault(f"with keep={value!r} {str(fault).splitlines()[0]}", MEND) from fault
        row = report(bench.model).rows[0]
        left = row.vision_tokens[-1]
        if repr(value) in ("1000", "1.0") and left < row.total:
            raise Fault(f"keep={value!r} leaves {left} of {row.total} vision tokens", f"all stay then: {MEND}")
        if isinstance(value, int) and bench.family == "llava" and left > value:  # one image of one tile
            raise Fault(f"keep={value} leaves {left} vision tokens", f"a count is at most that many: {MEND}")
