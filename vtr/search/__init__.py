"""Find a keep-schedule for a model: :func:`gsearch` (the cheapest that loses nothing), :func:`psigmoid` (for a budget).

:func:`vtw` finds VTW's layer, :func:`fitprune` FitPrune's recipe.

Both take a patched model, its processor and some questions about pictures; see docs/search.md.
"""

from vtr.search.cost import Cost
from vtr.search.curve import Sigmoid, fit, plot
from vtr.search.data import Example, Split, examples, split
from vtr.search.found import Found
from vtr.search.greedy import LEVELS, gsearch
from vtr.search.metrics import OBJECTIVES
from vtr.search.prompts import Prepared
from vtr.search.ranking import Ranks, rank_agreement
from vtr.search.recipe import Recipe, fitprune
from vtr.search.sigmoid import psigmoid
from vtr.search.withdrawal import Withdrawal, vtw

__all__ = [
    "LEVELS",
    "OBJECTIVES",
    "Cost",
    "Example",
    "Found",
    "Prepared",
    "Ranks",
    "Recipe",
    "Sigmoid",
    "Split",
    "Withdrawal",
    "examples",
    "fit",
    "fitprune",
    "gsearch",
    "plot",
    "psigmoid",
    "rank_agreement",
    "split",
    "vtw",
]
