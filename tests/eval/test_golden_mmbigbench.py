"""MM-BigBench's figures against what the official code makes of the paper's own tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from vtr.eval.accuracy import instructions

from tests.official import GOLDEN

GIVEN: dict[str, Any] = json.loads((GOLDEN / "mmbigbench" / "official.json").read_text())
SCORES = np.array(GIVEN["scores"], dtype=np.float64)
ROUNDED = 0.005 + 1e-9
"""The tables have two decimals."""
FIGURES: dict[str, Callable[[], np.ndarray]] = {
    "best": lambda: instructions.best_performance(SCORES)[0],
    "mrg_models": lambda: instructions.mean_relative_gain(SCORES),
    "mrg_instructions": lambda: instructions.mean_relative_gain(SCORES, over="instructions"),
    "stability_models": lambda: instructions.stability(SCORES),
    "stability_instructions": lambda: instructions.stability(SCORES, over="policies"),
    "hit_ratio_top3": lambda: 100 * instructions.adaptability(SCORES, k=3),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_published_tables_come_out(figure: str) -> None:
    got, want = FIGURES[figure](), np.array(GIVEN[figure])
    assert got.shape == want.shape
    assert np.count_nonzero(np.abs(got - want) > ROUNDED) == 0
