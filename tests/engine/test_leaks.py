"""A thousand generates with policies of all kinds: nothing grows, and unpatch takes everything out again."""

from __future__ import annotations

import gc
import random
import threading
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtr
from tests import tiny
from tests.loads import snapshot
from tests.tiny import IMAGE

TIMES = 1000
ROWS = [[IMAGE, "ab"], ["a", IMAGE, "b", IMAGE, "cde"], ["abcd"]]


def drawn(draw: random.Random) -> vtr.Policy | None:
    """A policy of any kind, with settings of its own each time."""
    keep: Any = draw.choice([draw.random(), draw.randrange(1, 30)])
    stairs = [1.0, *sorted((draw.uniform(0.05, 1) for _ in range(2)), reverse=True)]
    return draw.choice(
        [
            None,
            vtr.FastV(keep, layer=draw.randrange(1, 3)),
            vtr.GSearch(stairs),
            vtr.Random(keep, layer=draw.randrange(3), seed=draw.randrange(10**6)),
            vtr.UniformGrid(keep, layer=draw.randrange(3)),
            vtr.Pyramid([0.5, 0.2], [1, 2], draw.choice(["keep", "reindex"])),
        ]
    )


ONE = "llava_next"
"""Of the families, which are alike here, the one that every run tries."""


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name != ONE)) for name in tiny.FAMILIES]
)
def test_a_thousand_generates_leave_nothing(family: str) -> None:
    model = getattr(tiny, family)(layers=3)
    batches = [tiny.batch(model, ROWS, seed=seed) for seed in range(3)]
    tiny.generate(model, batches[0], max_new_tokens=1)  # transformers adds lazy hooks of its own on the first call
    stock = snapshot(model)
    vtr.patch(model)
    draw, sizes, objects, patched = random.Random(7), [], [], None
    for i in range(TIMES // len(tiny.FAMILIES)):
        policies = [drawn(draw) for _ in ROWS]
        tiny.generate(model, draw.choice(batches), policy=policies, max_new_tokens=draw.randrange(1, 4))
        if i in (49, TIMES // len(tiny.FAMILIES) - 1):
            tiny.generate(model, batches[0], policy="fastv:keep=0.5,layer=1", max_new_tokens=1)  # what the report holds
            patched = patched or snapshot(model)
            gc.collect()
            there = gc.get_objects()
            objects.append(len(there))
            tensors = sum(issubclass(type(o), torch.Tensor) for o in there)
            del there
            sizes.append((tensors, len(ALL_ATTENTION_FUNCTIONS.valid_keys()), threading.active_count()))
    assert sizes[0] == sizes[1]
    assert snapshot(model) == patched
    assert objects[1] - objects[0] < TIMES // len(tiny.FAMILIES), (
        f"{objects} Python objects: some stay of every generate"
    )
    vtr.unpatch(model)
    assert snapshot(model) == stock
