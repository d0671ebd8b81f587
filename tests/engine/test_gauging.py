"""How much attention a try's cuts leave: as the untouched model pays it, in a batch as alone, and at what price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import vtr
from tests import tiny
from tests.engine.test_choosing import counted
from tests.families import FAMILIES
from vtr.base import Began, Policy
from vtr.testing import dense

ROWS = [["ab", tiny.IMAGE, "cd", tiny.IMAGE, "x"], ["text only"], ["a", tiny.IMAGE, "another"]]
LONG = [["a system prompt of some length ", tiny.IMAGE, "x"], ["another one of about that length ", tiny.IMAGE, "why"]]
TWICE = "gsearch:schedule=[1.0,0.6,0.6,0.2,0.2]"
"""Ranked by all of the text: what the last token pays is worked out beside it."""


class Listener(Policy):
    """Tries all, accepts none but the last, and keeps what stayed."""

    def __init__(self, *choices: Any, gauges: bool = True) -> None:
        self.choices = [None if one is None else vtr.policy(one) for one in choices]
        self.heard, self._gauges = list[torch.Tensor | None](), gauges

    def options(self) -> Sequence[Policy | None]:
        return self.choices

    @property
    def gauges(self) -> bool:
        return self._gauges

    def accept(self, step: int, began: Sequence[Began]) -> torch.Tensor:
        self.heard.append(began[-1].stayed)
        return torch.zeros(len(began[-1].ids), dtype=torch.bool)


def heard(model: Any, batch: Any, *choices: Any) -> list[torch.Tensor]:
    listener = Listener(*choices, None)
    tiny.generate(model, batch, policy=listener, max_new_tokens=1)
    assert all(one is not None for one in listener.heard)
    return listener.heard  # type: ignore[return-value]


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    model = vtr.patch(tiny.llava_next())
    return model, tiny.batch(model, ROWS)


@pytest.mark.parametrize("spec", ["fastv:keep=0.4,layer=2", "random:keep=0.4,layer=1", TWICE, "pyramid:positions=keep"])
def test_it_is_what_the_untouched_model_pays(llava: tuple[Any, Any], spec: str) -> None:
    """From full attention matrices of a dense, masked run: the last row of each, mean over heads."""
    model, batch = llava
    for b, got in zip((0, 2), heard(model, batch, spec)[0], strict=True):
        one = tiny.single(batch, b, model)
        tiny.generate(model, one, policy=spec, max_new_tokens=1)
        row, depth = vtr.report(model).rows[0], model.config.text_config.num_hidden_layers
        kept = [row.kept(layer) for layer in range(depth)]
        vtr.unpatch(model)
        paid = dense.run(model, dense.row(model, one), dense.Given(kept)).paid
        vtr.patch(model)
        want, cuts = 1.0, 0
        for layer in range(1, depth):
            if len(kept[layer]) < len(kept[layer - 1]):
                slots, probs, _ = paid[layer - 1]
                last = dict(zip(slots, probs.mean(0)[-1].tolist(), strict=True))
                want *= sum(last[s] for s in kept[layer]) / sum(last[s] for s in kept[layer - 1])
                cuts += 1
        assert cuts and float(got) == pytest.approx(want, abs=1e-5) and 0 < want < 1


def test_a_row_alone_has_what_it_has_in_a_batch(llava: tuple[Any, Any]) -> None:
    model, batch = llava
    together = heard(model, batch, TWICE, "fastv:keep=0.2,layer=2", "random:keep=0.3,layer=1")
    for place, b in enumerate((0, 2)):  # the other has no picture
        alone = heard(model, tiny.single(batch, b, model), TWICE, "fastv:keep=0.2,layer=2", "random:keep=0.3,layer=1")
        for one, several in zip(alone, together, strict=True):
            assert float(one[0]) == pytest.approx(float(several[place]), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_a_second_try_behind_what_was_read_once(family: Any) -> None:
    """A next try finds the tokens in front of the picture in a cache: its share is that of a first try."""
    model = vtr.patch(family.make())
    depth = model.get_decoder().config.num_hidden_layers
    twice = vtr.GSearch([1.0, 0.6, *[0.3] * (depth - 2)])
    batch, shares = family.single(model, family.batch(model, LONG), 1), []
    try:
        for choices in ([twice], ["random:keep=0.5,layer=1", twice]):
            listener = Listener(*choices, None)
            family.generate(model, batch, policy=listener, max_new_tokens=2)
            shares.append(listener.heard[-1])
    except vtr.UnsupportedError as error:
        assert "packed rows" in str(error)
        return
    assert 0 < float(shares[0][0]) < 1
    assert float(shares[0][0]) == pytest.approx(float(shares[1][0]), abs=1e-5)


def test_what_is_not_cut_is_not_worked_out(llava: tuple[Any, Any]) -> None:
    """Rows that are ranked by the same attention pay nothing for it; others one product a cut."""
    model, batch = llava
    one = tiny.single(batch, 2, model)

    def selecting(choice: str, gauges: bool) -> int:
        tiny.generate(model, one, policy=Listener(choice, None, gauges=gauges), max_new_tokens=1)
        return int(vtr.report(model).selector_flops)

    config, total = model.config.text_config, one["input_ids"].shape[1]
    product = 2 * total * config.hidden_size
    assert selecting("fastv:keep=0.4,layer=2", True) == selecting("fastv:keep=0.4,layer=2", False) == product
    assert selecting("random:keep=0.4,layer=2", False) == 0
    assert selecting("random:keep=0.4,layer=2", True) == product
    assert selecting("random:keep=1.0,layer=2", True) == 0
    assert heard(model, one, "random:keep=1.0,layer=2")[0].tolist() == [1.0]


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_an_accepted_try_is_not_run_again(llava: tuple[Any, Any], how: dict[str, Any]) -> None:
    model, batch = llava
    one, runs = tiny.single(batch, 2, model), []
    for policy in (TWICE, vtr.AutoPolicy([TWICE, "none"], 0.0, signal="attention")):
        with counted(model) as seen:
            torch.manual_seed(0)
            ids = tiny.generate(model, one, policy=policy, max_new_tokens=4, **how)
        runs.append((seen, ids.tolist()))
    assert runs[0] == runs[1]


def test_nobody_gauges_unless_asked(llava: tuple[Any, Any]) -> None:
    model, batch = llava
    listener = Listener(TWICE, None, gauges=False)
    tiny.generate(model, batch, policy=listener, max_new_tokens=1)
    assert listener.heard == [None]


def test_a_cut_with_no_attention_before_it_is_refused(llava: tuple[Any, Any]) -> None:
    model, batch = llava
    with pytest.raises(vtr.UnsupportedError, match=r"layer 0.*signal='confidence'"):
        heard(model, tiny.single(batch, 2, model), "random:keep=0.4,layer=0")
    depth = model.config.text_config.num_hidden_layers
    for choice, why in (
        ("m3:tokens=1", "before the decoder"),
        ("divprune:keep=0.2", "before the decoder"),
        ("reroute", "drops no tokens"),
        ("m3:tokens=4+fastv:keep=0.5,layer=1", "before the decoder"),
    ):
        with pytest.raises(ValueError, match=f"cannot judge .*{why}.*fastv"):
            vtr.AutoPolicy([choice, "none"], signal="attention")
    first = vtr.AutoPolicy(["random:keep=0.4,layer=0", "none"], signal="attention")
    with pytest.raises(ValueError, match="layer 0, in front of which"):
        first.check(depth)


def test_auto_goes_by_it(llava: tuple[Any, Any]) -> None:
    """Rows go on where little attention was dropped; calibrated, by the line's sigmoid."""
    model, batch = llava
    shares = heard(model, batch, TWICE)[0].tolist()
    assert len(set(shares)) == 2
    between = sum(shares) / 2
    for made in (
        vtr.AutoPolicy([TWICE, "none"], between, signal="attention"),
        vtr.AutoPolicy(
            [TWICE, "none"], 0.5, signal="attention", calibration=[[1.0, -float(torch.tensor(between).logit())]]
        ),
    ):
        tiny.generate(model, batch, policy=made, max_new_tokens=1)
        got = [vtr.report(model).rows[b].policy is not None for b in (0, 2)]
        assert got == [share >= between for share in shares]
