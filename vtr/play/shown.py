"""What is shown of answers: numbers, the picture layer by layer, the staircase."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vtr import visualize
from vtr.markup import table
from vtr.picture import ranked_pixels, seen
from vtr.play.ask import Said
from vtr.play.knobs import NONE
from vtr.visualize.look import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT, RANKING = "kept tokens", "attention ranking"
VIEWS = (KEPT, RANKING)
"""What the pictures show."""
COLUMNS = 4
"""Frames of a video in a line."""
STAIRS, NAME = 5.2, 40
"""Inches across of the staircase, and letters of a policy in it: to be read on a telephone, too."""


def numbers(said: Said, whole: Said | None = None) -> str:
    """A table of what a policy kept and cost, as HTML; nothing before it is done.

    Args:
        whole: the same without reduction, where that has been asked: each number's share of it stands beside.
    """
    if said.report is None:
        return ""
    values = _values(said)
    if whole is None or whole is said:
        return table((), [(name, _short(value)) for name, value in values.items()])
    base = _values(whole)
    return table((), [(name, _short(value), _share(value, base[name])) for name, value in values.items()])


def _values(said: Said) -> dict[str, float | None]:
    report = said.report
    assert report is not None
    entering = report.rows[0].vision_tokens
    return {
        "vision tokens, mean a layer": sum(entering) / len(entering),
        "prefill, ms": said.prefill_ms,
        "choosing, ms of it": report.selector_ms,
        "a decoded token, ms": said.decode_ms,
        "decoder, GFLOPs": report.flops / 1e9,
        "keys and values, KiB": report.kv_bytes / 1024,
    }


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float | None, base: float | None) -> str:
    return "" if not base or value is None else f"{value / base:.0%}"


def whole_of(said: Sequence[Said]) -> Said | None:
    """The one without reduction, if it was asked."""
    return next((one for one in said if one.spec.strip().lower() in ("", NONE) and one.report is not None), None)


def tokens(said: Said) -> str:
    """How many tokens enter each layer, in words: "of 744 vision tokens enter the layers: 744 in 0–1, 37 in 2–9"."""
    if said.report is None:
        return ""
    parts = []
    for count, layers in groupby(enumerate(said.report.rows[0].vision_tokens), key=lambda pair: pair[1]):
        mine = [layer for layer, _ in layers]
        parts.append(f"{count} in {mine[0]}" + (f"–{mine[-1]}" if len(mine) > 1 else ""))
    return f"of {said.total} vision tokens enter the layers: " + ", ".join(parts)


# -- pictures ----------------------------------------------------------------------------------------------------------
def picture(said: Said, layer: int, tiles: str, view: str = KEPT) -> tuple[Image.Image | None, str]:
    """What enters a layer, or how the layer before it ranked, over the picture; and a line below.

    Args:
        layer: one that the model does not have is its last. tiles: "thumbnail" or "crops"; where the picture has none
            of these, what it has. view: of :data:`VIEWS`.

    Returns:
        None for the picture where there is nothing to show.
    """
    if said.report is None or not said.shots:
        return None, ""
    counts = said.report.rows[0].vision_tokens
    layer = min(layer, len(counts) - 1)
    line = f"into layer {layer}: {counts[layer]} of {said.total}"
    if len(said.shots) > 1 or said.times is not None:
        return _drawn(visualize.film(said.shots, said.times, layer, COLUMNS)), line
    shot = said.shots[0]
    tiles = tiles if tiles in shot.tiles else shot.tiles[-1]
    if view == KEPT:
        return _of_pixels(shot.pixels(layer, tiles)), line
    if said.ranks is None or layer == 0:
        why = "nothing ranks what enters layer 0" if said.ranks is not None else said.ranked_by or "not ranked"
        return _of_pixels(shot.pixels(layer, tiles)), f"{line}; {why}"
    pixels = ranked_pixels(seen(shot.picture, shot.layout), shot.layout, said.ranks[layer - 1], tiles)
    by = {"text": "all words", "last": "the last word"}.get(said.ranked_by, said.ranked_by)
    return _of_pixels(pixels), f"attention of {by} in layer {layer - 1}, unreduced: bright is most"


def _of_pixels(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _drawn(figure: Figure, dpi: float | str = "figure") -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer)


def staircase(said: Sequence[Said]) -> Image.Image | None:
    """The tokens that enter each layer under each policy; None before one is done."""
    named = [(f"{i} · {shortened(one.spec, NAME)}", one.report) for i, one in enumerate(said, 1)]
    rows = {name: report.rows[0] for name, report in named if report is not None}
    if not rows:
        return None
    figure = visualize.staircase(rows)
    figure.set_size_inches(STAIRS, figure.get_figheight())
    return _drawn(figure, dpi=150)
