"""What the engine asks of a pretended GPU: launches do not grow with the batch, and nobody is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from vtr.eval.cost import midsize
from vtr.eval.cost.counts import Counts
from vtr.eval.cost.launches import Case, Field
from vtr.eval.cost.midsize import Size
from vtr.eval.cost.pretend import pretended

TINY = Size(8, 16, 32, 1, side=12, text_tokens=20, vocab_size=64)
"""Counts do not depend on widths, and on lengths only where these make buckets."""
CEILINGS = {
    "fastv": 1.6, "random": 1.6, "gsearch": 2.2, "pyramid": 2.4, "m3": 1.5, "globalcom2": 1.5, "pmod": 2.5,
    "dynamic-llava": 2.0, "seven policies": 3.0,
}  # fmt: skip
"""Policy → launches of a prefill of eight rows ÷ those of the unpatched model."""
DECODED = {"pyramid": 1.04, "m3": 1.02, "globalcom2": 1.02, "dynamic-llava": 1.08, "seven policies": 1.55}
"""Policy → launches of a decoded token of eight equal rows ÷ those of the unpatched model; the others: as many."""
GROWTH = 1.25
"""Launches of 32 rows ÷ those of 8."""


class Asked(NamedTuple):
    """Of one ``generate``: the text model's prefill, its part between first and last layer, all that follows."""

    prefill: Counts
    layers: Counts
    decoding: Counts


@contextmanager
def watched(text: Any, counts: Counts) -> Iterator[list[Counts]]:
    """What has been asked for when the prefill begins, enters its first layer, has left its last, and has ended."""
    seen: list[Counts] = []

    def look(*_: Any) -> None:
        if len(seen) < 4:
            seen.append(counts.snapshot())

    hooks = [
        text.register_forward_pre_hook(look, prepend=True),
        text.layers[0].register_forward_pre_hook(look, prepend=True),
        text.layers[-1].register_forward_hook(look),
        text.register_forward_hook(look),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def between(before: Counts, after: Counts) -> Counts:
    return Counts(after.launches - before.launches, after.waits - before.waits, after.copies - before.copies)


@cache
def field(layers: int) -> Field:
    return Field(replace(TINY, layers=layers), torch.bfloat16)


@cache
def asked(
    name: str, rows: str, batch: int = 8, beams: int = 1, layers: int = TINY.layers, tokens: int = 2
) -> Asked:  # fmt: skip
    """Count a prompt and the decoded tokens that follow its first one."""
    here, case = field(layers), Case(name, batch, rows == "ragged")
    inputs = midsize.prompts(here.stock, here.size, case.requests(here.size.text_tokens))
    model, more = (here.unpatched, {}) if name == "unpatched" else (here.patched, {"policy": here.policy(case)})
    with pretended() as counts:
        there = {key: t.to("cuda") for key, t in inputs.items()}
        with watched(model.get_decoder(), counts) as seen:
            model.generate(
                **there,
                **more,
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=beams,
                suppress_tokens=[midsize.IMAGE_ID],
            )
    begun, entered, left, ended = seen
    return Asked(between(begun, ended), between(entered, left), between(ended, counts))


def of_vtr(counts: Counts) -> dict[str, int]:
    """Waits at vtr's own lines."""
    return {f"{place.line} {place.what}": n for place, n in counts.waits.items() if place.line.startswith("vtr/")}


ROWS = ("equal", "ragged")
EVERY = pytest.mark.parametrize("name", CEILINGS)
EITHER = pytest.mark.parametrize("rows", ROWS)


@EVERY
@EITHER
def test_launches_of_a_prefill(name: str, rows: str) -> None:
    most = CEILINGS[name] * asked("unpatched", rows).prefill.launches.total()
    assert asked(name, rows).prefill.launches.total() <= most


@EVERY
def test_launches_of_a_decoded_token(name: str) -> None:
    most = 1 + DECODED.get(name, 1.0) * asked("unpatched", "equal").decoding.launches.total()  # a mask, once a call
    assert asked(name, "equal").decoding.launches.total() <= most


@pytest.mark.parametrize(
    ("name", "rows"), [*((name, "equal") for name in CEILINGS), ("gsearch", "ragged"), ("seven policies", "ragged")]
)
def test_launches_do_not_grow_with_the_batch(name: str, rows: str) -> None:
    few, many = (asked(name, rows, batch, tokens=1).prefill.launches.total() for batch in (8, 32))
    assert many <= GROWTH * few


@EVERY
@EITHER
def test_no_layer_of_a_prefill_waits(name: str, rows: str) -> None:
    assert not asked(name, rows).layers.waits


@EVERY
@EITHER
def test_no_decoded_token_waits(name: str, rows: str) -> None:
    assert not of_vtr(asked(name, rows).decoding)


@EVERY
@EITHER
def test_no_decoded_token_of_beams_waits(name: str, rows: str) -> None:
    """The beams themselves are chosen on the host by transformers. Of rows under different policies the host has to
    know which go on: one read for all layers, after each of the two tokens."""
    waits = of_vtr(asked(name, rows, batch=2, beams=2, layers=4).decoding)
    assert sum(waits.values()) == (2 if name == "seven policies" else 0), waits


@EITHER
def test_without_a_policy_nothing_more_is_asked_for(rows: str) -> None:
    unpatched, patched = asked("unpatched", rows), asked("no policy", rows)
    for one, other in zip(unpatched, patched, strict=True):
        assert one.totals() == other.totals()


INDICES = ("dart:0.4", "fitprune:0.6", "reroute:keeps=[0.5,0.3],layers=[1,3]", "ee-mllm:all", "scm:0.5,group=all",
           "sparsevlm:keeps=[0.6,0.3],layers=[1,3]", "zipvl")  # fmt: skip
"""Policies all of whose rows answer with indices, merge, or reduce attention."""


@pytest.mark.parametrize("spec", INDICES)
def test_answers_that_are_no_scores_run_on_a_device(spec: str) -> None:
    """Nothing of them is only possible on the CPU, and no decoded token waits."""
    here = Field(replace(TINY, layers=4, side=6), torch.bfloat16, 0, [spec])
    found = here.count(Case(spec, 3, False))
    assert found.prefill.launches.total() > found.token.launches.total() > 0
    assert not of_vtr(found.token)
