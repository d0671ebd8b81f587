"""Ten methods before the decoder, one inside it and none in one batch: each row is what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests import tiny
from tests.tiny import IMAGE
from vtr.testing import tiny as models

TEN = [
    "visionzip:0.4", "vispruner:9", "prumerge", "tome:0.3", "hiprune:12", "divprune:0.25", "scope:7",
    "cdpruner:0.3,relevance=embeddings", "mmtok:8", "hired:0.3", "fastv:keep=0.5,layer=1", None,
]  # fmt: skip
WORDS = ["what", "ab", "whichone", "cde", "who", "where", "f", "count", "color", "letters", "abc", "zz"]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_each_row_is_what_it_is_alone(family: str, padding: str) -> None:
    model: Any = vtr.patch(getattr(models, family)())
    rows = [["a", IMAGE, word] if i % 3 else [IMAGE, "b", IMAGE, word] for i, word in enumerate(WORDS)]
    inputs = tiny.batch(model, rows, padding)
    with torch.no_grad():
        together = model(**inputs, policy=TEN).logits
    found = vtr.report(model).rows
    kept = [row.vision_tokens for row in found]
    assert all(row.vision_tokens[-1] < row.total for row, policy in zip(found, TEN, strict=True) if policy)
    for b, policy in enumerate(TEN):
        with torch.no_grad():
            alone = model(**tiny.single(inputs, b, model), policy=policy).logits[0]
        assert vtr.report(model).rows[0].vision_tokens == kept[b]
        torch.testing.assert_close(together[b, tiny.real(inputs, b)], alone, atol=1e-5, rtol=0)
