"""Matryoshka and GlobalCom² without a model: nested scales, where pooled tokens come from, budgets, bad settings."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vtr.integrations.internvl import tiles_layout
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout
from vtr.integrations.llava_onevision import anyres_max_layout, frames_layout

import vtr
from vtr.image import Image, Layout, arrange, scales
from vtr.policies.blind.matryoshka import made_of, pool
from vtr.policies.picture.globalcom2 import crops_of
from vtr.shares import apportion

M, G = vtr.Matryoshka, vtr.GlobalCom2


# ----------------------------------------------------------------------------------------------------------- scales
@pytest.mark.parametrize(
    ("grid", "known"),
    [
        ((24, 24), {576: 1, 144: 2, 36: 4, 9: 8, 1: 24}),
        ((16, 16), {256: 1, 64: 2, 16: 4, 4: 8, 1: 16}),
        ((27, 27), {729: 1, 81: 3, 9: 9, 1: 27}),
        ((14, 14), {196: 1, 49: 2, 1: 14}),
        ((12, 12), {144: 1, 36: 2, 9: 4, 1: 12}),
        ((7, 7), {49: 1, 1: 7}),
        ((1, 1), {1: 1}),
        ((12, 24), {288: 1, 72: 2, 18: 4, 2: 12}),
    ],
)
def test_nested_scales(grid: tuple[int, int], known: dict[int, int]) -> None:
    assert scales(grid) == known
    assert all(big % small == 0 for small, big in itertools.pairwise(known.values()))


sizes = st.tuples(st.integers(4, 900), st.integers(4, 900))
pins = ((48, 96), (96, 48), (96, 96), (144, 48), (48, 144))


def drawn_layout(kind: str, size: tuple[int, int]) -> Layout:
    rows, columns = 1 + size[0] % 3, 1 + size[1] % 4
    made = {
        "next": lambda: anyres_layout(size, pins, 48, 12),
        "onevision": lambda: anyres_max_layout(size, pins, 48, 12, 2),
        "internvl": lambda: tiles_layout(1 + rows * columns, (8, 8), (rows, columns)),
        "tile": lambda: tile_layout(12, 12),
        "frames": lambda: frames_layout(rows, 14),
    }
    return made[kind]()


kinds = st.sampled_from(["next", "onevision", "internvl", "tile", "frames"])


@settings(deadline=None, max_examples=80, derandomize=True)
@given(kinds, sizes, st.randoms(use_true_random=False))
def test_pooled_tokens_are_the_means_of_their_sources(kind: str, size: tuple[int, int], random: Any) -> None:
    """Where nothing was cut off or scaled, a pooled token is the mean of the tokens it names, a newline a newline."""
    layout = drawn_layout(kind, size)
    known = scales(layout.grid)
    tokens = random.choice([*known])
    tiles = torch.randn(layout.tiles, layout.grid[0] * layout.grid[1], 3, generator=torch.Generator().manual_seed(0))
    newline = torch.tensor([7.0, 8.0, 9.0])
    image = Image(arrange(layout, tiles, newline), layout, 0, 1, tiles, newline)
    made = vtr.Matryoshka(tokens).compress(image)
    if made is None:
        assert known[tokens] == 1
        return
    small, k = made.layout, known[tokens]
    assert small is not None and len(small) == len(made.features) == len(made.sources) <= len(layout)
    plain = layout.scaled is None and small.scaled is None
    for i, some in enumerate(made.sources):
        if small.newline[i]:
            assert torch.equal(made.features[i], newline) and all(layout.newline[j] for j in some)
        elif plain and len(some) == k * k:
            torch.testing.assert_close(made.features[i], image.features[some].mean(0))
        elif plain:
            assert len(some) < k * k and layout.crops != (0, 0)
    named = [j for some in made.sources for j in some]
    assert len(named) == len(set(named))
    if kind in ("tile", "frames", "internvl"):
        assert sorted(named) == list(range(len(layout)))


def test_the_kinds_of_layout_differ_in_what_they_leave() -> None:
    """Of a wide picture: a coarse scale may keep a row of padding, which then has no sources."""
    layout = anyres_layout((30, 140), ((48, 144),), 48, 12)
    small = layout.shrunk(4)  # type: ignore[misc]
    assert small.grid == (3, 3) and small.window is not None and layout.window is not None
    assert layout.window[2] < 12 and small.window[2] <= 3
    assert pool(torch.arange(144.0).view(1, 144, 1), (12, 12), 12).item() == 71.5
    assert len(made_of(layout, small, 4)) == len(small)


# ----------------------------------------------------------------------------------------------------------- budgets
@given(
    st.lists(st.tuples(st.floats(0.01, 50), st.integers(0, 60)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_apportioned_counts_add_up(crops: list[tuple[float, int]], part: float) -> None:
    shares, room = [s for s, _ in crops], [n for _, n in crops]
    total = int(sum(room) * part)
    counts = apportion(shares, room, total)
    assert sum(counts) == total and all(0 <= c <= n for c, n in zip(counts, room, strict=True))
    free = [j for j, n in enumerate(room) if 0 < counts[j] < n]
    for a in free:  # among crops that are not full, counts follow shares to within one token
        for b in free:
            assert counts[a] / shares[a] - counts[b] / shares[b] <= 1 / shares[a] + 1 / shares[b] + 1e-9


@settings(deadline=None, max_examples=60, derandomize=True)
@given(kinds, sizes, st.integers(1, 40).map(lambda n: n / 40), st.integers(0, 99))
def test_an_exact_budget_is_known_before_the_picture(
    kind: str, size: tuple[int, int], retention: float, seed: int
) -> None:
    layout, made = drawn_layout(kind, size), torch.Generator().manual_seed(seed)
    n = layout.grid[0] * layout.grid[1]
    features, scores = torch.zeros(len(layout), 2), 5 * torch.randn(layout.tiles, n, generator=made)
    image = Image(features, layout, 0, 1, None, torch.zeros(2), lambda: scores)
    policy = vtr.GlobalCom2(retention, budget="exact")
    kept = policy.compress(image)
    assert isinstance(kept, Tensor) and len(kept) == len(set(kept.tolist())) == policy.kept_of(layout)
    newline = layout.newline.bool()
    assert set(newline.nonzero().flatten().tolist()) <= set(kept.tolist())
    patches = int((~newline).sum())
    assert len(kept) - int(newline.sum()) <= patches * retention + 1e-6
    paper = vtr.GlobalCom2(retention).compress(image)
    assert isinstance(paper, Tensor)
    if layout.crops != (0, 0):
        sizes = [len(tokens) for tokens in crops_of(layout).tokens]
        assert sum(sizes) == patches - n
        with pytest.raises(ValueError, match="budget='exact'"):
            vtr.GlobalCom2(retention).kept_of(layout)


def test_one_temperature_gives_every_crop_its_share() -> None:
    layout, scores = anyres_layout((96, 96), pins, 48, 12), torch.zeros(5, 144)
    scores[0].view(12, 12)[:6, :6] = 3.0  # the thumbnail looks at its upper left corner
    image = Image(torch.zeros(len(layout), 1), layout, 0, 1, None, torch.zeros(1), lambda: scores)

    def per_crop(policy: vtr.GlobalCom2) -> list[int]:
        kept = policy.compress(image)
        assert isinstance(kept, Tensor)
        tile = layout.tile[kept[layout.newline[kept] == 0]]
        return tile.bincount(minlength=5).tolist()

    assert per_crop(G(0.25, temperature=float("inf"))) == [36, 36, 36, 36, 36]
    # R · (1 + 1 − 1/4) · 144 is 63, but the paper's weights add up to a little less than 1
    assert per_crop(G(0.25)) == [36, 62, 27, 27, 27]
    assert per_crop(G(0.25, budget="exact")) == [36, 63, 27, 27, 27]


# ------------------------------------------------------------------------------------------------- settings as data
BAD: dict[str, tuple[type[Exception], str, Any]] = {
    "tokens is text": (TypeError, "tokens must be a count per tile", lambda: M("many")),  # type: ignore[arg-type]
    "tokens is a ratio": (TypeError, "tokens must be a count per tile", lambda: M(0.5)),  # type: ignore[arg-type]
    "tokens is a bool": (TypeError, r"\(an int\), got True", lambda: M(True)),
    "no tokens": (TypeError, "one per image", lambda: M([])),
    "tokens below 1": (ValueError, "at least 1", lambda: M([36, 0])),
    "retention is a count": (TypeError, "retention must be a float", lambda: vtr.policy("globalcom2:retention=1")),
    "retention is nothing": (ValueError, "above 0 and at most at 1", lambda: G(0.0)),
    "retention above one": (ValueError, "above 0 and at most at 1", lambda: G(1.5)),
    "an unknown placement": (ValueError, "choose 'true' or 'official'", lambda: G(placement="paper")),  # type: ignore[arg-type]
    "an unknown budget": (ValueError, "choose 'paper' or 'exact'", lambda: G(budget="true")),  # type: ignore[arg-type]
    "a cold softmax": (ValueError, "must be above 0", lambda: G(temperature=0.0)),
    "temperature is text": (TypeError, "must be a number", lambda: G(temperature="hot")),  # type: ignore[arg-type]
    "both compress": (ValueError, "GlobalCom2 and Matryoshka both compress", lambda: G() + M()),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name: str) -> None:
    error, message, make = BAD[name]
    with pytest.raises(error, match=message):
        make()


def test_specs_and_files(tmp_path: Path) -> None:
    for spec in (
        "m3:tokens=36",
        "m3:tokens=[144,36]",
        'globalcom2:retention=0.5,placement="official"',
        "m3:tokens=9+fastv:keep=0.5",
    ):
        made = vtr.policy(spec)
        assert vtr.policy(made.spec) == made and made.spec == spec
        made.save_pretrained(tmp_path)
        assert vtr.Policy.from_pretrained(tmp_path) == made
    made = G(0.5, temperature=float("inf"))
    assert vtr.policy(made.spec) == made
    assert (G(0.5) + vtr.FastV()).wants == ("cls",) and (vtr.FastV() + M(9)).wants == ("tiles",)
    assert vtr.FastV().wants == ()
