"""PruneSID against the numbers of the official code (ZhengyaoFang/PruneSID), whose random components are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official
from tests.policies.encoder import each_tile, layout_of
from tests.seen import GivenTower, seen
from vtr.policies.picture import prunesid

META = official.meta("prunesid")
cases = pytest.mark.parametrize("case", META["cases"], ids=lambda c: c["case"])


def given(case: dict[str, Any]) -> dict[str, Tensor]:
    prefix = case["case"] + "."
    return {k.removeprefix(prefix): v for k, v in official.tensors("prunesid", case["file"]).items()
            if k.startswith(prefix)}  # fmt: skip


def tower_of(numbers: dict[str, Tensor], tile: int) -> GivenTower:
    states, attention = (numbers[name][tile : tile + 1] for name in ("hidden_states", "attention_sum"))
    return GivenTower(
        {None: states[:, 1:]}, {None: states[:, 0]}, from_cls={None: attention[:, None]}, projector=lambda x: x
    )


@cases
def test_output(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tokens, the CLS token in front of them, and in which order."""
    numbers, policy = given(case), vtr.PruneSID(case["T"], "official")
    for tile in range(case["B"]):
        basis = numbers["basis_abs"][tile : tile + 1]
        assert torch.equal(basis.argmax(2)[0], numbers["group"][tile])
        monkeypatch.setattr(prunesid, "loadings", lambda states, there, groups, basis=basis: (basis[..., :groups], 0))
        image = seen(numbers["hidden_states"][tile : tile + 1, 1:], tower=tower_of(numbers, tile))
        made = policy.compress(image)
        assert isinstance(made, vtr.Pooled)
        assert [some[0] + 1 if some else 0 for some in made.sources] == numbers["indices_plus_one"][tile].tolist()
        official.close(made.features, numbers["output"][tile])
        assert len(made.features) == policy.kept_of(image.layout)


def one_by_one(order: Tensor, repeats: Tensor) -> Tensor:
    """bool [n]: each in its turn, if it is still there, takes out those behind it that repeat it."""
    alive = torch.ones(len(order), dtype=torch.bool)
    for place, i in enumerate(order.tolist()):
        for j in order[place + 1 :].tolist() if alive[i] else ():
            alive[j] &= ~repeats[i, j]
    return alive


@cases
def test_steps(case: dict[str, Any]) -> None:
    numbers, count = given(case), case["T"]
    for tile in range(case["B"]):
        unit = torch.nn.functional.normalize(numbers["hidden_states"][tile, 1:], dim=-1)
        cosines, group = unit @ unit.T, numbers["group"][tile]
        there = torch.ones(1, case["N"], dtype=torch.bool)
        bound = prunesid.threshold(unit[None], there, torch.tensor([count]))
        official.close(bound, numbers["threshold"][tile : tile + 1], 1e-5)
        order = numbers["attention_sum"][tile].argsort(descending=True, stable=True)
        alive, flops = prunesid.survivors(unit, order, group, bound[0])
        assert flops == 2 * unit.shape[1] * int(group.bincount().square().sum())
        assert torch.equal(alive, one_by_one(order, (cosines > bound) & (group[:, None] == group)))
        sizes = group.bincount(minlength=case["groups"])
        left = group[alive].bincount(minlength=case["groups"])
        assert sizes.tolist() == numbers["group_sizes"][tile].tolist()
        assert left.tolist() == numbers["survivors"][tile].tolist()
        quotas = prunesid.quotas_of(sizes, left, count, count - 1)
        assert quotas.tolist() == numbers["quota"][tile].tolist()


@cases
def test_exact_components(case: dict[str, Any]) -> None:
    """As many tokens come into the groups of the random approximation as an exact decomposition puts there."""
    numbers = given(case)
    there = torch.ones(case["B"], case["N"], dtype=torch.bool)
    group = prunesid.loadings(numbers["hidden_states"][:, 1:], there, case["groups"])[0].argmax(2)
    same = float((group == numbers["group"]).float().mean())
    assert same == pytest.approx(case["same_groups_with_exact_svd"], abs=1.5 / group.numel())


def test_a_group_without_members() -> None:
    units = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=-1)
    alive, _ = prunesid.survivors(units, torch.tensor([1, 0, 2]), torch.tensor([2, 2, 0]), torch.tensor(0.5))
    assert alive.tolist() == [False, True, True]


@pytest.mark.parametrize("n", [1, 4, 9, 36])
def test_any_number_of_any_number(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    for spread in (0.0, 1.0):  # all alike, or not
        states = 1 + spread * torch.randn(2, n, 8, generator=generator)
        heads = torch.rand(2, 3, n, generator=generator)

        def tower(i: int, states: Tensor = states, heads: Tensor = heads) -> GivenTower:
            part = slice(i, i + 1)
            return GivenTower({None: states[part]}, {None: states[part, 0]}, {None: heads[part]}, projector=lambda x: x)

        for keep in range(n + 2):
            assert each_tile(vtr.PruneSID(keep), states, tower).sum(1).tolist() == [min(keep, n)] * 2
            made = vtr.PruneSID(keep, "official").compress(seen(states[:1], tower=tower(0)))
            assert isinstance(made, vtr.Pooled) and len(made.features) == min(keep, n)


def test_padding_plays_no_part() -> None:
    """What unpadding took away changes nothing in a tile of which something is left."""
    layout = layout_of({"side": 6, "image_size_wh": [100, 60], "grid_wh": [2, 2]})
    generator = torch.Generator().manual_seed(0)
    states, heads = torch.randn(5, 36, 8, generator=generator), torch.rand(5, 3, 36, generator=generator)
    kept = []
    for noise in (0.0, 5.0):
        gone = torch.ones(5, 36, 1)
        for tile in range(5):
            here = (layout.tile == tile) & (layout.newline == 0)
            gone[tile, layout.y[here] * 6 + layout.x[here]] = 0
        some = states + noise * gone
        tower = GivenTower({None: some}, from_cls={None: heads})
        kept.append(vtr.PruneSID(9).compress(seen(states, layout, tower)))
    assert isinstance(kept[0], Tensor) and torch.equal(*kept)
    assert len(kept[0].unique()) == len(kept[0]) == vtr.PruneSID(9).kept_of(layout)


def test_crops_in_the_published_order_are_refused() -> None:
    layout = layout_of({"side": 6, "image_size_wh": [100, 60], "grid_wh": [2, 2]})
    with pytest.raises(vtr.UnsupportedError, match="placement='true'"):
        vtr.PruneSID(9, "official").compress(seen(torch.zeros(5, 36, 8), layout, GivenTower()))
