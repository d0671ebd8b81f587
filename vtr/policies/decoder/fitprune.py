"""FitPrune (Ye et al., AAAI 2025, arXiv 2409.10197): after every layer some tokens go, as a recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from vtr.base import Attention, Best, Policy, Tokens
from vtr.checks import check_number, check_on_continue
from vtr.keep import Keep, check_keep, keep_count
from vtr.limits import MOST_LAYERS
from vtr.settings import register_policy
from vtr.shares import ratio

TOKENS, REDUCTION = 576, 0.6
"""What the published recipe was made for: LLaVA-1.5-7B's tokens, and the share of the FLOPs that it saves."""
DELETED = (
    14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0,
)  # fmt: skip
"""Tokens that go after each of its 32 layers."""


@register_policy("fitprune")
@dataclass
class FitPrune(Policy):
    """After every decoder layer as many vision tokens go as a recipe says: those that text and picture look at least.

    A token's score is the attention that it gets from the vision tokens times that which it gets from the text behind
    the last image, both of the layer before, the strongest head of each query, summed over queries. Original positions
    stay. Where no text stands behind the last image, the vision tokens alone decide.

    The published recipe for a reduction of 60 % is shipped; other reductions, depths and numbers of tokens are read off
    its curve (ours; the official tables are for 32 layers and 576 tokens). :func:`vtr.search.fitprune`
    (``vtr search fitprune``) makes a recipe for a model. The attention among vision tokens makes this the dearest of
    rankings.

    Args:
        reduction: about the share of the vision tokens' work that is saved, in [0, 1].
        scheme: the recipe itself, for each decoder layer how many tokens go behind it: counts (ints), or shares of the
            row's tokens (floats). None: of ``reduction``, which plays no part otherwise.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    reduction: float = REDUCTION
    scheme: Sequence[Keep] | None = None
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """The reduction whose curve has this mean."""
        reduction = REDUCTION * (1 - share) / (1 - _mean(_published(num_hidden_layers)))
        if reduction > 1:
            raise ValueError(f"the published recipe cannot be stretched to a mean of {share:.3g}")
        return {"reduction": ratio(reduction)}

    def __post_init__(self) -> None:
        if not 0 <= check_number(self.reduction, "reduction") <= 1:
            raise ValueError(f"reduction={self.reduction!r}: the share of work that is saved lies in [0, 1]")
        self.reduction = float(self.reduction)
        if self.scheme is not None:
            if isinstance(self.scheme, str) or not isinstance(self.scheme, Sequence):
                raise TypeError(f"scheme={self.scheme!r}: give a list with one number per decoder layer")
            if not 1 <= len(self.scheme) <= MOST_LAYERS:
                raise ValueError(f"a scheme of {len(self.scheme)} numbers: give one per decoder layer")
            self.scheme = [check_keep(gone, f"scheme[{i}]") for i, gone in enumerate(self.scheme)]
        check_on_continue(self.on_continue)

    def check(self, num_hidden_layers: int) -> None:
        if self.scheme is not None and len(self.scheme) != num_hidden_layers:
            raise ValueError(
                f"the scheme has {len(self.scheme)} numbers, but the model has {num_hidden_layers} decoder layers: "
                "give one per layer, or a reduction alone"
            )

    def left(self, layer: int, num_hidden_layers: int, total: int) -> int:
        """How many of ``total`` tokens enter a layer."""
        if self.scheme is None:
            keep = curve(self.reduction, num_hidden_layers)[layer]
            return max(int(keep * total + 0.5), min(total, 1))
        gone = self.scheme[:layer]
        share = 1.0 - sum(one for one in gone if isinstance(one, float))
        return max(keep_count(max(share, 0.0), total) - sum(one for one in gone if isinstance(one, int)), 0)

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        return [self.left(layer, num_hidden_layers, total) for layer in range(num_hidden_layers)]

    def needs(self, layer: int) -> tuple[Attention, Attention] | None:
        if not layer or (self.scheme is not None and not self.scheme[layer - 1]):
            return None
        return Attention("vision", heads="max", over="sum"), Attention("behind", heads="max", over="sum")

    def prune(self, layer: int, tokens: Tokens) -> Best | None:
        keep = self.left(layer, tokens.num_hidden_layers, tokens.total)
        if keep >= len(tokens) or tokens.scores is None:
            return None
        own, cross = tokens.scores
        return Best(torch.where(cross.amax() > 0, own * cross, own), keep)


@lru_cache(maxsize=64)
def curve(reduction: float, num_hidden_layers: int) -> tuple[float, ...]:
    """The share of tokens that enters each layer: the published curve, raised to the power that saves so much.

    What is saved grows with the reduction from nothing at 0 to what the published recipe saves at its own.
    """
    published = _published(num_hidden_layers)
    if reduction == REDUCTION or len(published) == 1:
        return published
    wanted, low, high = 1 - (1 - _mean(published)) * reduction / REDUCTION, 0.0, 256.0
    for _ in range(60):
        power = (low + high) / 2
        low, high = (power, high) if _mean([keep**power for keep in published]) > wanted else (low, power)
    return tuple(keep**high for keep in published)


@lru_cache(maxsize=16)
def _published(num_hidden_layers: int) -> tuple[float, ...]:
    """The share of tokens that enters each layer under the published recipe, stretched to this depth."""
    keeps = [1 - sum(DELETED[:layer]) / TOKENS for layer in range(len(DELETED))]
    found = []
    for layer in range(num_hidden_layers):
        place = layer * (len(keeps) - 1) / max(num_hidden_layers - 1, 1)
        low = min(int(place), len(keeps) - 2)
        found.append(keeps[low] + (keeps[low + 1] - keeps[low]) * (place - low))
    return tuple(found)


def _mean(keeps: Sequence[float]) -> float:
    return sum(keeps) / len(keeps)
