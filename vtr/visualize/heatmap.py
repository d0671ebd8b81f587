"""How the text's attention ranks vision tokens, layer by layer, as numbers and as a heat map on the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vtr.base import SCORES, Policy, Scores
from vtr.picture import image_spans, points, ranked_pixels, seen, views
from vtr.visualize.look import SIDE, frame
from vtr.visualize.shots import span_of
from vtr.watch import Watch

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


def rankings(model: Any, inputs: Any, row: int = 0, queries: Scores = "text") -> np.ndarray:
    """How the text ranks the vision tokens in every layer, without reduction: float [num_hidden_layers - 1, n].

    1 is the token that got most attention, 0 the one that got least; line l is of layer l, which ranks a cut on
    entering layer l + 1. No layer's whole attention matrix is made.

    Args:
        row: which prompt of the batch. queries: whose attention: "text", "last", "text-max", "last-max".

    Raises:
        ValueError: unknown queries; no image in the row, or no text behind it.
    """
    if queries not in SCORES:
        raise ValueError(f"queries={queries!r}: choose one of {', '.join(map(repr, SCORES))}")
    watch = Watch(queries)
    policies: list[Policy | None] = [None] * inputs["input_ids"].shape[0]
    policies[row] = watch
    with torch.inference_mode():
        model(**inputs, policy=policies)
    if not watch.seen:
        raise ValueError(f"row {row} has no vision tokens to rank: choose a row with an image")
    scores = torch.stack([watch.seen[layer] for layer in sorted(watch.seen)]).numpy()
    ranks: np.ndarray = scores.argsort(1, kind="stable").argsort(1, kind="stable")
    return ranks / max(scores.shape[1] - 1, 1)


def ranking(
    model: Any,
    inputs: Any,
    picture: Image.Image,
    layers: Sequence[int] | None = None,
    row: int = 0,
    image: int = 0,
    queries: Scores = "text",
) -> Figure:
    """Heat map of the attention ranking: bright patches get most of the text's attention in a layer, dark ones least.

    Args:
        model: patched. inputs: of a prompt. picture: as given to the processor. layers: which layers' attention; by
            default four spread over the decoder. row, image: which. queries: see :func:`rankings`.

    Raises:
        ValueError: no such layer, row or image; unknown queries.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    first_slot, layout = span_of(model, inputs, row, image)
    ranks = rankings(model, inputs, row, queries)
    depth = len(ranks)
    chosen = list(layers) if layers is not None else sorted({round(f * (depth - 1)) for f in (0, 0.33, 0.67, 1)})
    if bad := [layer for layer in chosen if not 0 <= layer < depth]:
        raise ValueError(f"layers={bad}: the attention of layers 0…{depth - 1} ranks what enters the next one")
    spans = [(first, lay) for b, first, lay in image_spans(model, inputs) if b == row]
    vision = [slot for first, lay in spans for slot in range(first, first + len(lay))]
    mine = slice(vision.index(first_slot), vision.index(first_slot) + len(layout))
    kinds = views(layout)
    shown = seen(picture, layout)
    width = SIDE * (len(chosen) + 1) + 0.6
    size = points(width)
    figure = Figure(figsize=(width, SIDE * len(kinds) + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots(len(kinds), len(chosen) + 1, squeeze=False)
    for line, kind in enumerate(kinds):
        axes[line][0].imshow(np.asarray(shown.convert("RGB")))
        axes[line][0].set_ylabel(kind, fontsize=size)
        for column, layer in enumerate(chosen, 1):
            axes[line][column].imshow(ranked_pixels(shown, layout, ranks[layer][mine], kind))
            if line == 0:
                axes[line][column].set_title(f"attention of layer {layer}", fontsize=size)
    for axis in axes.flat:
        frame(axis, "0.4")
    bar = figure.colorbar(ScalarMappable(cmap="inferno"), ax=axes, shrink=0.7, pad=0.01, ticks=[0, 0.5, 1])
    bar.set_label(f"rank by attention from the text (queries={queries!r})", fontsize=size)
    bar.ax.set_yticklabels(["last", "middle", "first"], fontsize=size)
    return figure
