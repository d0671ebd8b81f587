"""VTW against the numbers of the official code (lzhxmu/VTW), and what it does beyond them."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests import official
from tests.policies import inside

META = official.meta("vtw")
cases = pytest.mark.parametrize("case", META["cases"], ids=lambda c: f"c{c['case']}")
POSITIONS = {"keep": "keep", "renumber": "reindex"}


@cases
def test_prefill_and_decoding(case: inside.Case) -> None:
    policy = vtr.VTW(case["K"], POSITIONS[case["pe_type"]])  # type: ignore[arg-type]
    ran = inside.agrees("vtw", case, policy)
    assert all(not kept for kept in ran.kept[case["K"] :])
    counts = policy.entering(len(ran.kept), case["vision"])
    assert counts == [len(kept) for kept in ran.kept]


def test_the_layer_fits_the_depth_and_the_budget() -> None:
    assert vtr.VTW().entering(32, 576) == [576] * 15 + [0] * 17
    assert vtr.VTW().entering(4, 576) == [576, 0, 0, 0]
    for share in (0.1, 0.25, 0.5, 0.9):
        made = vtr.VTW(**vtr.VTW.settings_at(share, 32, 24))
        assert abs(sum(made.entering(32, 576)) / 576 / 32 - share) <= 0.5 / 32
    assert vtr.policy("vtw:16") == vtr.VTW(16) and vtr.policy(vtr.VTW(3, "reindex").spec) == vtr.VTW(3, "reindex")


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="choose 0…4"):
        vtr.VTW(7).check(5)
    with pytest.raises(ValueError, match="'keep' or 'reindex'"):
        vtr.VTW(3, "renumber")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        vtr.VTW(0.5)  # type: ignore[arg-type]


def test_a_row_in_a_batch_is_the_row_alone() -> None:
    case = META["cases"][0]
    made, inputs = inside.prompt("vtw", case)
    pictures, last = list(made.pictures), len(case["entering_lengths"]) - 1
    with torch.no_grad():
        alone = [made(**inputs, policy=vtr.VTW(k)).logits for k in (1, last)]
        made.pictures = pictures * 2
        twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
        together = made(**twice, policy=[vtr.VTW(1), vtr.VTW(last)]).logits
    official.close(together, torch.cat(alone))
