"""EVS, VidCom² and DyCoke's merging against what their official codes keep of random films: index for index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout
from vtr.integrations.qwen_vl import frames_layout

import vtr
from tests.official import close, meta, tensors
from tests.seen import seen
from vtr.image import Image, Layout, Pooled, framed
from vtr.policies.picture import vidcom2

CASES: dict[str, Any] = meta("video")["cases"]
TENSORS = tensors("video", "video")


def of_case(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): t for key, t in TENSORS.items() if key.startswith(f"{name}.")}


def film(name: str) -> Image:
    """A case's film as one image whose tiles are its frames."""
    case, x = CASES[name], of_case(name)["x"]
    return Image(x.flatten(0, 1), framed(frames_layout(case["frames"], case["h"], case["w"]), 0), 0, 1)


def frames(name: str) -> list[Image]:
    """A case's film as an image for every frame."""
    case, x = CASES[name], of_case(name)["x"]
    tile = tile_layout(case["h"], case["w"])
    return [Image(x[i], framed(tile, i), i, len(x)) for i in range(len(x))]


def both(policy: vtr.Policy, name: str) -> list[int]:
    """What stays of a film, whichever way a family shows it."""
    kept = policy.compress(film(name))
    n = CASES[name]["h"] * CASES[name]["w"]
    apart = [i * n + k for i, one in enumerate(policy.compress_row(frames(name))) for k in one.tolist()]
    assert kept.tolist() == apart
    return apart


@pytest.mark.parametrize("name", CASES)
def test_evs(name: str) -> None:
    assert CASES[name]["evs_q"]
    for rate in CASES[name]["evs_q"]:
        policy = vtr.EVS(round(1 - rate, 12))
        kept = both(policy, name)
        assert kept == of_case(name)[f"evs_{rate}"].tolist()
        assert policy.kept_of(film(name).layout) == len(kept) == CASES[name][f"evs_count_{rate}"]


@pytest.mark.parametrize("name", CASES)
def test_vidcom2(name: str) -> None:
    want = of_case(name)
    of_video, of_frame = vidcom2.likeness(want["x"].float())
    close(of_video, want["vidcom2_video_score"])
    close(of_frame, want["vidcom2_frame_score"])
    for keep in CASES[name]["vidcom2_ratio"]:
        close(vidcom2.shares(of_video, keep), want[f"vidcom2_{keep}_scales"])
        assert both(vtr.VidCom2(keep), name) == want[f"vidcom2_{keep}"].tolist()


LINES = [(name, keep) for name, case in CASES.items() for keep in case["vidcom2_ratio"]]


@pytest.mark.parametrize("name,keep", [(n, k) for n, k in LINES if f"vidcom2_{k}_grid_newline" in of_case(n)])
def test_vidcom2_with_a_newline_behind_every_line(name: str, keep: float) -> None:
    """All newline tokens stay; the official code puts them behind the frame's last patch, here each keeps its place."""
    case, want = CASES[name], of_case(name)
    count, h, w = case["frames"], case["h"], case["w"]
    at = torch.arange(count * h * (w + 1))
    y, x = at // (w + 1) % h, at % (w + 1)
    layout = Layout(at // (h * (w + 1)), y, x, (x == w).long(), (h, w), first_frame=0)
    features = torch.zeros(len(at), want["x"].shape[-1])
    features[layout.newline == 0] = want["x"].flatten(0, 1)
    kept = vtr.VidCom2(keep).compress(Image(features, layout, 0, 1))
    assert kept.tolist() == sorted(want[f"vidcom2_{keep}_grid_newline"].tolist())


@pytest.mark.parametrize("name,k", [(name, k) for name, case in CASES.items() for k in case["dycoke_k"]])
def test_dycoke_as_published(name: str, k: float) -> None:
    answer = vtr.DyCoke(round(1 - k, 12), placement="official").compress(film(name))
    assert isinstance(answer, Pooled)
    assert [source for (source,) in answer.sources] == of_case(name)[f"dycoke_{k}"].tolist()
    close(answer.features, film(name).features[of_case(name)[f"dycoke_{k}"]])


def test_dycoke_loses_no_frame() -> None:
    x = torch.randn(7, 9, 8, generator=torch.Generator().manual_seed(0))
    image = Image(x.flatten(0, 1), framed(frames_layout(7, 3, 3), 0), 0, 1)
    kept = vtr.DyCoke(0.34).compress(image)
    assert kept.tolist() == sorted(kept.tolist())
    assert (kept // 9).bincount(minlength=7).tolist() == [9, 3, 3, 3, 9, 3, 3]
    with pytest.raises(vtr.UnsupportedError, match="at least 5"):
        vtr.DyCoke(placement="official").compress(Image(x[:4].flatten(0, 1), framed(frames_layout(4, 3, 3), 0), 0, 1))


@pytest.mark.parametrize("policy", [vtr.EVS(0.5), vtr.VidCom2(0.5), vtr.DyCoke(0.5)], ids=lambda p: p.name)
def test_which_images_are_frames(policy: Any) -> None:
    """A still film of two frames, a picture between two films: each film has its own budget, pictures stay whole."""
    tile = tile_layout(4, 4)
    x = torch.randn(5, 16, 8, generator=torch.Generator().manual_seed(1))
    layouts = [framed(tile, 0), framed(tile, 1), tile, framed(tile, 0), framed(tile, 1)]
    images = [Image(x[i], layout, i, 5) for i, layout in enumerate(layouts)]
    answers = policy.compress_row(images)
    assert answers[2] is None
    for first in (0, 3):
        alone = policy.compress_row(images[first : first + 2])
        assert [a.tolist() for a in answers[first : first + 2]] == [a.tolist() for a in alone]
        assert sum(map(len, alone)) < 32
    together = type(policy)(policy.keep, frames="images").compress_row(images)
    assert all(answer is not None for answer in together) and sum(map(len, together)) < 80
    listed = type(policy)(policy.keep, frames=[4, 2]).compress_row(images)
    assert [answer is None for answer in listed] == [True, True, False, True, False]


def test_pictures_alone_are_warned_of() -> None:
    images = [Image(torch.randn(16, 8), tile_layout(4, 4), i, 2) for i in range(2)]
    with pytest.warns(UserWarning, match="frames=images"):
        assert vtr.EVS().compress_row(images) == [None, None]
    assert vtr.EVS().compress(images[0]) is None


def test_what_does_not_fit_is_refused() -> None:
    images = [seen(torch.randn(1, n * n, 8), tile_layout(n, n), None) for n in (3, 4)]
    with pytest.raises(ValueError, match="one size"):
        vtr.EVS(frames="images").compress_row(images)
    with pytest.raises(ValueError, match="2 images"):
        vtr.EVS(frames=[0, 2]).compress_row(images)
    for wrong in ("pictures", [], [1, 1], [-1], [True]):
        with pytest.raises(ValueError, match="frames="):
            vtr.EVS(frames=wrong)  # type: ignore[arg-type]
    for keep in (0, 3, 0.0):
        with pytest.raises(ValueError, match="ratio"):
            vtr.EVS(keep)
    with pytest.raises(ValueError, match="depends on the others"):
        vtr.EVS().kept_of(framed(tile_layout(4, 4), 2))
