"""CLS scores of the vision tower: what projections really do, towers of other kinds, what they cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import shorter, tiny
from tests.engine.test_captures import Spy
from tests.engine.test_compress import MIXES, ROWS, G, M, close
from tests.engine.test_oracles import counted
from tests.loads import forward


# -------------------------------------------------------------------------------------------------------- accounting
@pytest.mark.parametrize("policies", [[G(0.5)] * 5, MIXES[1]])
def test_flops_of_scores_are_those_torch_counts(policies: list[Any]) -> None:
    for family in ("llava", "llava_next", "internvl"):
        model = vtr.patch(getattr(tiny, family)("eager"))
        inputs = tiny.batch(model, ROWS)
        got = counted(lambda model=model, inputs=inputs: model(**inputs, policy=policies))
        report = vtr.report(model)
        assert report.flops + report.selector_flops == got
        assert report.selector_flops > 0


# ------------------------------------------------------------------------------------------------------- projections
class Adapted(torch.nn.Linear):
    """A projection that is more than its weights, as adapters and quantized layers are."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_scores_see_what_projections_really_do(family: str) -> None:
    """The keys' projection is folded into the query where it is nothing but its weights, and asked otherwise."""
    stock = getattr(tiny, family)()
    last = shorter.last_layer(stock)[1]
    plain = torch.nn.init.normal_(last.k_proj.bias) if last.k_proj.bias is not None else None
    assert (plain is None) == (family == "internvl")
    inputs, found = tiny.batch(stock, ROWS[:1]), []
    for kind in (torch.nn.Linear, Adapted):
        last.k_proj.__class__ = kind
        model, spy = vtr.patch(copy.deepcopy(stock)), Spy()
        forward(model, inputs, policy=spy)
        with torch.no_grad():
            want = shorter.encoded(stock, shorter.pixels(stock, inputs)[0])[1]
        found.append(spy.seen[0][1])
        close(found[-1], want.roll(1, 0) if len(want) > 1 else want)
        assert vtr.report(model).selector_flops > 0
    close(found[1], 3 * found[0])


def test_scores_of_a_tower_that_norms_its_queries_and_keys() -> None:
    from transformers import InternVLForConditionalGeneration

    config = tiny.internvl().config
    config.vision_config.use_qk_norm = True
    torch.manual_seed(0)
    stock = InternVLForConditionalGeneration(config).eval()
    inputs, spy = tiny.batch(stock, ROWS[:1]), Spy()
    torch.nn.init.normal_(shorter.last_layer(stock)[1].k_norm.weight)
    forward(vtr.patch(copy.deepcopy(stock)), inputs, policy=spy)
    with torch.no_grad():
        want = shorter.encoded(stock, shorter.pixels(stock, inputs)[0])[1]
    close(spy.seen[0][1], want.roll(1, 0))


def test_a_tower_that_cannot_be_read_is_refused_by_name() -> None:
    model = vtr.patch(tiny.llava())
    inputs, last = tiny.batch(model, ROWS[:1]), model.model.vision_tower.encoder.layers[-1]
    last.self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    del last.self_attn.k_proj
    with pytest.raises(vtr.UnsupportedError, match="layers of CLIPVisionModel are not built of a norm and q_proj"):
        forward(model, inputs, policy=G(0.5))
    forward(model, inputs, policy=M(9))
