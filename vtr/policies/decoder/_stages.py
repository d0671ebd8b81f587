"""What policies share that act on entering a few decoder layers: the published ones, as deep in the model at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vtr.base import Policy
from vtr.checks import check_depth, check_layer


def spread(layers: Sequence[int], of: int, num_hidden_layers: int) -> list[int]:
    """``layers`` of a decoder with ``of`` layers, as deep in one with ``num_hidden_layers``; ascending, from 1 on."""
    found: list[int] = []
    for layer in layers:
        at = (2 * layer * num_hidden_layers + of) // (2 * of)
        found.append(max(at, found[-1] + 1 if found else 1))
    return found


class Staged(Policy):
    """A policy with a setting ``layers``: the decoder layers on entering which it acts; None for the published ones.

    :meth:`needs` is asked without saying how many layers there are, so the depths of the models this policy has been
    put on are noted when it is checked. (One more only means attention that nobody looks at.)
    """

    published: ClassVar[tuple[tuple[int, ...], int]]
    """The published layers, and how many the published model has."""
    layers: Sequence[int] | None

    def check_layers(self, count: int | None = None) -> None:
        """Raise unless ``layers`` is None or ascending decoder layers from 1 on, ``count`` of them if given."""
        if self.layers is None:
            return
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence) or not self.layers:
            raise TypeError(
                f"layers must be a list of decoder layers, e.g. {[*self.published[0]]}, got {self.layers!r}"
            )
        self.layers = list(self.layers)
        for layer in self.layers:
            check_layer(layer, 1, "the layer before it must have run: choose at least 1")
        if sorted(set(self.layers)) != self.layers:
            raise ValueError(f"layers={self.layers} must ascend")
        if count is not None and len(self.layers) != count:
            raise ValueError(f"layers={self.layers}: there are {count} stages, name a layer for each")

    def cuts(self, num_hidden_layers: int) -> list[int]:
        """The decoder layers on entering which it acts, in a model of so many."""
        return list(self.layers) if self.layers is not None else spread(*self.published, num_hidden_layers)

    def acts(self, layer: int) -> bool:
        """Whether it acts on entering ``layer``, of any model it has been checked with."""
        return any(layer in self.cuts(depth) for depth in getattr(self, "_depths", ()))

    def check(self, num_hidden_layers: int) -> None:
        cuts = self.cuts(num_hidden_layers)
        if self.layers is None and cuts[-1] >= num_hidden_layers:
            raise ValueError(
                f"{len(cuts)} stages do not fit into {num_hidden_layers} decoder layers: name fewer layers"
            )
        for layer in cuts:
            check_depth(layer, num_hidden_layers, 1)
        self._depths: frozenset[int] = getattr(self, "_depths", frozenset()) | {num_hidden_layers}
