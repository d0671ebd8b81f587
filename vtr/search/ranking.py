"""The paper's assumption, measured: do layers rank vision tokens alike, deep layers' best among shallow layers' best?

The paper plots Kendall's tau between layers (Fig. 1a, 1b: about 0.68 to 0.85, lower at the first). If it holds, tokens
that a shallow layer ranks low are not missed later, and cutting from shallow to deep is safe.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vtr import chat
from vtr.base import Scores
from vtr.search.data import examples
from vtr.watch import Watch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOW = 0.5
"""Neighbouring layers whose rankings agree less than this are warned of.

Ours; the paper's figure, read by eye, stays above 0.65 behind the first pair of layers.
"""
TOP = 0.1
"""The share of tokens that counts as a layer's best."""


@dataclass(frozen=True)
class Ranks:
    """Agreement of the rankings by layers 0 … depth - 2 (the last layer's ranks nothing), mean over questions.

    Attributes:
        tau: Kendall's tau of every two layers. within: [shallow, deep] the share of the deep layer's best
            :data:`TOP` that is among the shallow layer's best 2 · :data:`TOP`.
    """

    tau: np.ndarray
    within: np.ndarray
    questions: int
    queries: str

    @property
    def neighbours(self) -> list[float]:
        """Tau of each layer with the next."""
        return [float(self.tau[i, i + 1]) for i in range(len(self.tau) - 1)]

    def warning(self, start: int) -> str | None:
        """Warn (and return the text) if layers from ``start`` - 1 on disagree, so that early cuts drop later needs."""
        low = [(i, t) for i, t in enumerate(self.neighbours) if i >= start - 1 and not t >= LOW]
        if not low:
            return None
        named = ", ".join(f"{i}–{i + 1} ({t:.2f})" for i, t in low)
        text = (
            f"rankings of neighbouring layers agree little (Kendall tau below {LOW}) at {named}: the assumption that "
            "deep layers need a part of what shallow ones rank high does not hold here, so a greedy search need not "
            "find the cheapest schedule"
        )
        warnings.warn(text, UserWarning, stacklevel=4)
        return text

    def to_json(self) -> dict[str, Any]:
        return {
            "tau": self.tau.round(4).tolist(), "within": self.within.round(4).tolist(), "questions": self.questions,
            "queries": self.queries,
        }  # fmt: skip

    def plot(self) -> Figure:
        """Tau of neighbouring layers, and of every two."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3.4), layout="constrained")
        bars, map_, inside = figure.subplots(1, 3)
        bars.bar(range(len(self.neighbours)), self.neighbours)
        bars.axhline(LOW, color="k", lw=0.8, ls="--")
        bars.set(xlabel="layers l and l + 1", ylabel="Kendall tau", title=f"rankings by {self.queries!r}")
        for axis, values, title in (
            (map_, self.tau, "tau of every two layers"),
            (inside, self.within, "best 10 % within"),
        ):
            image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis")
            axis.set(xlabel="deep layer" if values is self.within else "layer", title=title)
            axis.set_ylabel("the best 20 % of layer" if values is self.within else "layer")
            figure.colorbar(image, ax=axis)
        return figure


@torch.inference_mode()
def rank_agreement(model: Any, processor: Any, data: Any, queries: Scores = "text") -> Ranks:
    """Compare how layers of the unreduced (patched) model rank the vision tokens of some questions.

    Args:
        data: as for :func:`vtr.search.examples`. queries: whose attention ranks, as in :class:`vtr.GSearch`.

    Raises:
        ValueError: less than three layers or no vision tokens.
    """
    depth = len(model.get_decoder().layers)
    if depth < 3:
        raise ValueError(f"{depth} layers have no two rankings to compare")
    asked, tau, within = examples(data), np.zeros((depth - 1, depth - 1)), np.zeros((depth - 1, depth - 1))
    for one in asked:
        watch = Watch(queries)
        inputs = chat.encode(processor, [one.question], [one.image]).to(model.device, model.dtype)
        model(**inputs, policy=watch, use_cache=False, logits_to_keep=1)
        if not watch.seen:
            raise ValueError(f"{one.question!r} has no vision tokens to rank")
        seen = [watch.seen[layer].numpy() for layer in range(depth - 1)]
        tau += taus(seen)
        for i in range(depth - 1):
            within[i] += [_share(seen[i], deep) for deep in seen]
    return Ranks(tau / len(asked), within / len(asked), len(asked), queries)


def taus(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Kendall's tau of every two rankings [n] of the same tokens: [rankings, rankings]."""
    from scipy.stats import kendalltau

    tau = np.zeros((len(scores), len(scores)))
    for i, one in enumerate(scores):
        for j in range(i, len(scores)):
            tau[i, j] = tau[j, i] = float(kendalltau(one, scores[j]).statistic)
    return tau


def _share(shallow: np.ndarray, deep: np.ndarray) -> float:
    best = max(1, int(len(deep) * TOP))
    return len({*np.argsort(deep)[-best:]} & {*np.argsort(shallow)[-2 * best :]}) / best
