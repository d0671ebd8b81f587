"""A ratio above 0 leaves at least one token: of a picture, or of a row; an int or 0.0 means what it says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from vtr.integrations.internvl import tiles_layout
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout
from vtr.integrations.qwen_vl import frames_layout
from vtr.integrations.vllm.layouts import count_of

import vtr
from tests import learned, tiny
from tests.seen import GivenTower
from tests.tiny import IMAGE
from vtr.base import Tokens
from vtr.budget import at_share
from vtr.engine.compression import compressed
from vtr.image import framed
from vtr.keep import keep_count
from vtr.policies import ClsTop
from vtr.settings import policy_class

SMALLEST = 5e-324
ratios = st.one_of(st.floats(0, 1, exclude_min=True), st.floats(0, 0.3, exclude_min=True), st.just(1e-12))


def layouts() -> st.SearchStrategy[Any]:
    """Pictures of 1 to 30 patches a tile: one tile, video frames, crops and thumbnail, AnyRes with newline tokens."""
    grids = st.tuples(st.integers(1, 6), st.integers(1, 5))
    tile = grids.map(lambda g: tile_layout(*g))
    frames = st.builds(lambda g, n: tiles_layout(n, g, (0, 0)), grids, st.integers(1, 4))
    crops = st.builds(lambda g, r, c: tiles_layout(1 + r * c, g, (r, c)), grids, st.integers(1, 2), st.integers(1, 3))
    anyres = st.builds(
        lambda side, h, w: anyres_layout((h, w), ((4 * side, 8 * side), (8 * side, 4 * side)), 4 * side, side),
        st.integers(1, 5), st.integers(3, 60), st.integers(3, 60),
    )  # fmt: skip
    return st.one_of(tile, frames, crops, anyres)


def image(layout: Any, seed: int = 0) -> vtr.Image:
    made, n = torch.Generator().manual_seed(seed), layout.grid[0] * layout.grid[1]
    scores = torch.rand(layout.tiles, n, generator=made)
    states = torch.randn(layout.tiles, n, 3, generator=made)
    key = torch.randn(layout.tiles, 1 + n, 1, 4, generator=made)
    tower = GivenTower(
        any_layer(states), {}, any_layer(scores[:, None]), any_layer(scores), any_layer(key), any_layer(key[:, 0]),
        lambda states: states,
    )  # fmt: skip
    return vtr.Image(
        torch.randn(len(layout), 3, generator=made), layout, 0, 1, torch.randn(layout.tiles, n, 3, generator=made),
        torch.zeros(3), lambda: scores, tower, torch.randn(2, 3, generator=made),
    )  # fmt: skip


def any_layer(numbers: torch.Tensor) -> dict[Any, torch.Tensor]:
    return defaultdict(lambda: numbers)


PER_IMAGE: dict[str, Callable[[Any], vtr.Policy]] = {
    "cls": ClsTop,
    "random": lambda keep: vtr.Random(keep, before_decoder=True),
    "uniform": lambda keep: vtr.UniformGrid(keep, before_decoder=True),
    "fastervlm": lambda keep: vtr.FasterVLM(keep),
    "vispruner": lambda keep: vtr.VisPruner(keep),
    "hiprune": lambda keep: vtr.HiPrune(keep),
    "hiprune total": lambda keep: vtr.HiPrune(keep, budget="total"),
    "holov": lambda keep: vtr.HoloV(keep),
    "hired": lambda keep: vtr.HiRED(keep),
    "prunesid": lambda keep: vtr.PruneSID(keep),
    "divprune": lambda keep: vtr.DivPrune(keep),
    "mmr": lambda keep: vtr.MMR(keep),
    "scope": lambda keep: vtr.Scope(keep),
    "cdpruner": lambda keep: vtr.CDPruner(keep, relevance="embeddings"),
    "mmtok": lambda keep: vtr.MMTok(keep),
    "visionzip": lambda keep: vtr.VisionZip(keep),
    "prumerge": lambda keep: vtr.PruMerge(keep),
    "prumerge-plus": lambda keep: vtr.PruMergePlus(keep),
    "tome": lambda keep: vtr.ToMe(keep),
    "vscan": lambda keep: vtr.VScan(keep),
    "trim": lambda keep: vtr.Trim(keep, relevance="embeddings"),
    "deft": lambda keep: vtr.DeFT(keep),
    "globalcom2": lambda keep: vtr.GlobalCom2(keep),
    "globalcom2 exact": lambda keep: vtr.GlobalCom2(keep, budget="exact"),
}
PER_ROW: dict[str, Callable[[float], vtr.Policy]] = {
    "fastv": lambda keep: vtr.FastV(keep, layer=1),
    "pyramid": lambda keep: vtr.Pyramid([keep], layers=[1]),
    "gsearch": lambda keep: vtr.GSearch([1.0, keep, keep, keep, keep]),
    "random": lambda keep: vtr.Random(keep),
    "uniform": lambda keep: vtr.UniformGrid(keep),
    "reroute": lambda keep: vtr.Reroute([keep], layers=[1]),
    "avtp": lambda keep: vtr.AVTP([keep], layers=[1]),
    "pmod": lambda keep: vtr.PMoD(ratios=[None, *[keep] * 4]),
    "dynamic-llava": lambda keep: vtr.DynamicLLaVA(keep, layer=1),
    "dart": lambda keep: vtr.DART(keep, layer=1),
    "scm": lambda keep: vtr.SCM(keep, group="all"),
    "sparsevlm": lambda keep: vtr.SparseVLM(keeps=[keep], layers=[1]),
    "sparsevlm-plus": lambda keep: vtr.SparseVLMPlus(keeps=[keep], layers=[1]),
}
PER_VIDEO: dict[str, Callable[[float], vtr.Policy]] = {
    "evs": lambda keep: vtr.EVS(keep),
    "vidcom2": lambda keep: vtr.VidCom2(keep),
    "dycoke": lambda keep: vtr.DyCoke(keep),
}
RATIO = {"keep", "keeps", "retention", "schedule", "ratios", "low"}


def test_every_registered_policy_with_a_ratio_is_here() -> None:
    shipped = [name for name in vtr.list_policies() if policy_class(name).__module__.startswith("vtr.policies")]
    with_ratio = {name for name in shipped if RATIO & {field.name for field in fields(policy_class(name))}}
    assert with_ratio == {name.split()[0] for name in (*PER_IMAGE, *PER_ROW, *PER_VIDEO)}


@given(st.integers(0, 30), st.one_of(ratios, st.just(SMALLEST)), st.sampled_from([1e-9, 0.0]))
def test_a_ratio_leaves_one_of_whatever_there_is(total: int, keep: float, slack: float) -> None:
    assert keep_count(keep, total, slack) == max(int(total * keep + slack), min(1, total))
    assert keep_count(0.0, total, slack) == keep_count(0, total, slack) == 0


@pytest.mark.parametrize("name", PER_IMAGE)
@given(layout=layouts(), keep=ratios, seed=st.integers(0, 3))
@example(layout=tile_layout(2, 2), keep=0.2, seed=0)
@example(layout=tiles_layout(3, (1, 1), (1, 2)), keep=SMALLEST, seed=0)
def test_every_picture_keeps_a_token_and_kept_of_says_so(name: str, layout: Any, keep: float, seed: int) -> None:
    policy = PER_IMAGE[name](keep)
    kept, pooled = compressed(policy, image(layout, seed))
    stands = kept if pooled is None else torch.tensor([some[0] for some in pooled.sources])
    patches = int((layout.newline[stands] == 0).sum())
    assert 1 <= len(kept) <= len(layout)
    assert name in ("random", "uniform") or patches >= 1  # newline tokens alone show nothing
    if name != "globalcom2" or layout.crops == (0, 0):
        assert policy.kept_of(layout) == len(kept)
        if policy.wants in ((), ("cls",)):  # vLLM hands out no more of its tower
            assert len(kept) == count_of(policy.spec, layout)


@pytest.mark.parametrize("name", PER_VIDEO)
@given(frames=st.integers(1, 6), side=st.integers(1, 4), keep=ratios, seed=st.integers(0, 3))
@example(frames=3, side=1, keep=SMALLEST, seed=0)
def test_every_video_keeps_a_patch_of_its_first_frame(
    name: str, frames: int, side: int, keep: float, seed: int
) -> None:
    layout = framed(frames_layout(frames, side, side), 0)
    kept, pooled = compressed(PER_VIDEO[name](keep), image(layout, seed))
    assert pooled is None and int(kept[0]) < side * side
    per_frame = (kept // side**2).bincount(minlength=frames)
    assert name == "evs" or int(per_frame.min()) >= 1
    if name == "evs":
        assert len(kept) == PER_VIDEO[name](keep).kept_of(layout) >= side**2


@pytest.mark.parametrize("name", ["cls", "random", "uniform"])
@pytest.mark.parametrize("keep", [0, 0.0])
def test_nothing_means_nothing(name: str, keep: Any) -> None:
    layout = tile_layout(2, 3)
    policy = PER_IMAGE[name](keep)
    assert len(compressed(policy, image(layout))[0]) == policy.kept_of(layout) == 0


@pytest.mark.parametrize("name", PER_ROW)
@given(total=st.integers(1, 30), keep=ratios)
@example(total=4, keep=0.2)
@example(total=1, keep=SMALLEST)
def test_every_row_keeps_a_token_at_every_layer(name: str, total: int, keep: float) -> None:
    policy = PER_ROW[name](keep)
    counts = policy.entering(5, total)
    slack = 0.0 if name in ("pmod", "dynamic-llava", "reroute", "avtp") else 1e-9
    exact = float(torch.tensor(keep)) if name == "avtp" else keep  # float32, as in its official code
    least = max(1, int(total * exact + slack))
    if isinstance(policy, vtr.SparseVLM) and least < total:
        least += policy.made_of(total - least)
    assert min(counts) == least and max(counts) <= total


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), keep=ratios)
def test_dynamic_llava_keeps_a_token_of_each_picture(sizes: list[int], keep: float) -> None:
    policy = vtr.DynamicLLaVA(keep, width=8, heads=2, inner=8, blocks=1)
    policy.start(4, 5)
    n = sum(sizes)
    hidden = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    tokens = Tokens(2, 5, n, n, lambda name: hidden, None, lambda: hidden[:, 0], tuple(sizes), n)
    kept = policy.prune(2, tokens)
    assert kept is not None
    kept = kept.indices() if isinstance(kept, vtr.Best) else kept
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[kept]
    assert owner.bincount(minlength=len(sizes)).tolist() == [max(int(m * keep), min(m, 1)) for m in sizes]


ROWS = [["ab", IMAGE, "what"], ["a", IMAGE, "bc", IMAGE, "whichone"], ["abc"]]
TINY = 1e-12
TOGETHER = [
    *(PER_ROW[name](TINY) for name in ("fastv", "pyramid", "gsearch", "random", "uniform")),
    *(make(TINY) for make in PER_IMAGE.values()),
    vtr.Matryoshka(1) + vtr.FastV(0.2),
    vtr.Pool(1) + vtr.GSearch([1.0, 0.2, 0.1, 0.1, TINY]),
    vtr.Random(TINY, before_decoder=True) + vtr.Pyramid([0.2], layers=[2], positions="keep"),
    vtr.Random(TINY, before_decoder=True) + learned.dynamic(keep=0.2),
    vtr.Random(TINY, before_decoder=True) + learned.pmod(ratios=[None, 0.1, 0.1, TINY, TINY]),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return vtr.patch(tiny.llava_next())


@pytest.mark.parametrize("policy", TOGETHER)
def test_on_a_model_no_row_is_left_without(model: Any, policy: vtr.Policy) -> None:
    tiny.generate(model, tiny.batch(model, ROWS), policy=policy, max_new_tokens=2)
    for row, pictures in zip(vtr.report(model).rows, (1, 2, 0), strict=True):
        least = pictures if policy.asks("compress") else min(pictures, 1)
        assert row.vision_tokens[0] >= least and min(row.vision_tokens) >= min(pictures, 1)


def test_budgets_and_stretched_schedules_are_never_rounded_to_nothing() -> None:
    assert at_share("cls", 1e-5, 5, 6).keep > 0  # type: ignore[attr-defined]
    assert at_share("globalcom2", 1e-5, 5, 6).retention > 0  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="resampled"):
        stretched = vtr.Schedule([1.0, 1e-6]).resample(4)
    assert stretched[3] == 1e-6 and min(stretched) > 0
