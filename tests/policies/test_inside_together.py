"""All methods inside the decoder, p-MoD, Dynamic-LLaVA, M3 and none in one batch: each row is what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests import learned, tiny
from tests.tiny import IMAGE
from vtr.testing import tiny as models

ALL: list[Any] = [
    "sparsevlm:keeps=[0.6,0.3],layers=[1,3]", "sparsevlm-plus:keeps=[0.6,0.3],layers=[1,3]", "dart:keep=0.4",
    "fitprune:0.6", "vtw:3", "deft:keep=0.3", "tops:target=0.3,layers=[2,3]", "mustdrop:64,layers=[1,2]",
    "avtp:keeps=[0.7],layers=[2]", "reroute:keeps=[0.5,0.3],layers=[1,3]", "occamtoken", "zipvl:recent=3,drawn=5",
    "ee-mllm:all", "scm:0.5", "m3:9", learned.pmod(), learned.dynamic(), None,
]  # fmt: skip
WORDS = [
    "what", "ab", "whichone", "cde", "who", "where", "f", "count", "color", "letters", "abc", "zz", "how", "a", "yes",
    "is", "there", "one",
]  # fmt: skip


@pytest.mark.parametrize("padding", ["left", "right"])
def test_each_row_is_what_it_is_alone(padding: str) -> None:
    model: Any = vtr.patch(models.llava())
    rows = [["a", IMAGE, word] if i % 3 else [IMAGE, "b", IMAGE, word] for i, word in enumerate(WORDS)]
    inputs = tiny.batch(model, rows, padding)
    with torch.no_grad():
        together = model(**inputs, policy=ALL).logits
    found = vtr.report(model).rows
    for b, policy in enumerate(ALL):
        with torch.no_grad():
            alone = model(**tiny.single(inputs, b, model), policy=policy).logits[0]
        (row,) = vtr.report(model).rows
        assert (row.vision_tokens, row.asked, row.seen) == (found[b].vision_tokens, found[b].asked, found[b].seen)
        torch.testing.assert_close(together[b, tiny.real(inputs, b)], alone, atol=2e-5, rtol=0)


def test_they_decode_alike_with_and_without_a_cache() -> None:
    model: Any = vtr.patch(models.llava())
    inputs = tiny.batch(model, [["a", IMAGE, word] for word in WORDS])
    said = [
        tiny.generate(model, inputs, policy=ALL, max_new_tokens=4, **way)
        for way in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert said[0].tolist() == said[1].tolist() == said[2].tolist()
