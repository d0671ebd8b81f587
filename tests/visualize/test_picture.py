"""The picture of what is kept: which token shows a patch, and what it looks like."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vtr
from vtr.commands.run import answer_with, draw, prepare
from vtr.picture import DIM, _cells, _painted, image_spans


@pytest.fixture(scope="module")
def asked() -> Any:
    return prepare(None, None, 1, None, "cpu")


def shown(asked: Any, spec: str) -> tuple[Any, list[list[int]]]:
    """(layout, what each token of the first decoder layer was made of) of the sample picture under a policy."""
    with torch.inference_mode():
        asked.model(**asked.inputs, policy=spec)
    _, first, layout = image_spans(asked.model, asked.inputs)[0]
    return layout, [[s - first for s in some] for some in vtr.report(asked.model).rows[0].sources(0)]


@pytest.mark.parametrize("tokens", [36, 9, 1])
def test_pooled_cells(asked: Any, tokens: int) -> None:
    """Square blocks of one token each, on the thumbnail and on every crop."""
    layout, made_of = shown(asked, f"m3:tokens={tokens}")
    assert layout.crops == (2, 2) and layout.grid == (12, 12)
    side = round(tokens**0.5)
    for kind, across in (("thumbnail", side), ("crops", 2 * side)):
        cells, k = _cells(layout, made_of, kind), 12 // side
        assert cells.shape == (across * k, across * k) and cells.min() >= 0
        blocks = cells.reshape(across, k, across, k)
        assert (blocks == blocks[:, :1, :, :1]).all() and len(np.unique(cells)) == across**2


def test_kept_tokens(asked: Any) -> None:
    layout, made_of = shown(asked, "globalcom2:retention=0.25")
    assert (_cells(layout, made_of, "thumbnail") >= 0).sum() == 36
    crops = _cells(layout, made_of, "crops")
    newlines = int(layout.newline.sum())
    assert crops.shape == (24, 24) and (crops >= 0).sum() == len(made_of) - 36 - newlines


def test_colors() -> None:
    """A pooled cell has its mean color, a kept patch its own pixels, a dropped one is faded."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(130, 255, (8, 12, 3), dtype=np.uint8)
    cells = np.array([[0, 0, -1], [0, 0, 1]])
    out = _painted(Image.fromarray(pixels), cells, np.array([True, False]))
    whole = pixels / 255
    np.testing.assert_allclose(out[1, 1], whole[:, :8].reshape(-1, 3).mean(0))
    np.testing.assert_allclose(out[4:, 8:], whole[4:, 8:])
    np.testing.assert_allclose(out[:4, 8:], whole[:4, 8:] * (1 - DIM))


@pytest.mark.parametrize("spec", ["m3:tokens=9+fastv:keep=0.5", "globalcom2:retention=0.1", "none"])
def test_a_figure_of_every_layer_that_changes(asked: Any, spec: str) -> None:
    figure = draw(asked, answer_with(asked, spec, 2, 1))
    titles = [axis.get_title() for axis in figure.axes if "layer" in axis.get_title()]
    assert len(titles) == (2 if "fastv" in spec else 1) and titles[0].startswith("into layer 0")
    lines = [len(axis.lines) for axis in figure.axes]
    assert sum(lines) == 2 * len(titles), "one line across and one down where crops meet"
