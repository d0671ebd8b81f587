"""Where vision tokens may leave: the divergence of each layer is that of the policy itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vtr
from tests.search.search_models import questions, short
from vtr.search import Prepared
from vtr.search.withdrawal import vtw


def test_the_first_layer_below_the_threshold(tmp_path: Path) -> None:
    model, processor = short(4)
    data = Prepared(model, processor, questions(4), "kl", 8, 3)
    found = vtw(model, processor, data, threshold=1e9, progress=False)
    assert found.layer == 1 and len(found.divergence) == 4
    for layer in (1, 3):
        want = 0.0
        for batch in data.batches:
            with torch.inference_mode():
                out = model(
                    **batch.inputs, policy=vtr.VTW(layer), vtr_queries_end=batch.length, use_cache=False
                ).logits  # fmt: skip
            first = batch.length - 1
            logits = [out[row, first : first + count].float() for row, count in enumerate(batch.counts)]
            want -= sum(batch.values(data.objective, logits))
        assert found.divergence[layer] == pytest.approx(want / 4, rel=1e-3, abs=1e-6)
    middle = sorted(found.divergence[1:])[0] * 1.001 + 1e-9
    best = vtw(model, processor, data, threshold=middle, progress=False)
    assert best.divergence[best.layer] == min(found.divergence[1:])
    best.save_pretrained(tmp_path)
    assert vtr.VTW.from_pretrained(tmp_path) == vtr.VTW(best.layer)
    with pytest.raises(ValueError, match="give a larger threshold"):
        vtw(model, processor, data, threshold=1e-12, progress=False)
    with pytest.raises(ValueError, match="choose 0…3"):
        vtw(model, processor, data, first=4, progress=False)
