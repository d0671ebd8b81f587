"""``vtr eval --task video``: fewer frames as a baseline, gray films, kinds of questions, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from vtr.eval.accuracy.answers import gray_of
from vtr.eval.accuracy.contenders import contender
from vtr.eval.accuracy.frames import Frames
from vtr.eval.accuracy.run import Settings
from vtr.eval.accuracy.summary import by_kind
from vtr.eval.studies import films as study

import vtr
from vtr.cli import app
from vtr.commands.eval import of_task
from vtr.data.videos import Video


@pytest.fixture
def video() -> Video:
    frames = [Image.new("RGB", (4, 3), (i, 0, 0)) for i in range(8)]
    return Video(frames, [0.5 * i for i in range(8)], list(range(0, 16, 2)), 16)


@pytest.mark.parametrize(("keep", "at"), [(1.0, range(8)), (0.5, (0, 2, 4, 6)), (0.25, (0, 4)), (0.01, (0,))])
def test_fewer_frames(video: Video, keep: float, at: Any) -> None:
    fewer = Frames(keep)(video)
    assert [frame.getpixel((0, 0))[0] for frame in fewer.frames] == list(at)  # type: ignore[index]
    assert fewer.indices == [2 * i for i in at] and fewer.times == [0.5 * i for i in at] and fewer.total == 16


def test_frames_as_a_contender() -> None:
    assert {contender(spec).spec for spec in ("frames", "frames:0.5", "frames:keep=0.5")} == {"frames:keep=0.5"}
    one = contender("frames:keep=0.25+fastv:keep=0.5,layer=2")
    assert (
        one.spec.startswith("frames:keep=0.25+fastv:keep=0.5") and one.policy is not None and one.frames == Frames(0.25)
    )


@pytest.mark.parametrize(
    ("spec", "told"),
    [("frames:keep=0", "share of the frames"), ("frames:every=2", "no setting 'every'"), ("frame", "frames")],
)
def test_frames_refused(spec: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        contender(spec)


def test_contenders_of_pictures_and_of_films() -> None:
    with pytest.raises(ValueError, match="pictures have no frames"):
        Settings(policies=("frames:0.5",)).check()
    with pytest.raises(ValueError, match=r"frames:keep=0\.5"):
        Settings(policies=("downsample:scale=0.5",), data="pocket:task=video").check()


def test_a_gray_film(video: Video) -> None:
    gray = gray_of(video)
    assert isinstance(gray, Video) and len(gray.frames) == 8 and gray.indices == video.indices
    assert np.unique(np.asarray(gray.frames[3])).tolist() == [128] and gray.frames[0].size == (4, 3)


def test_tasks_stand_for_data_model_and_metric() -> None:
    assert of_task(None, None, "a.jsonl", None, "auto") == ("a.jsonl", None, "auto")
    assert of_task("video", 16, "pocket", None, "auto") == ("pocket:task=video,frames=16", "pocket-video", "auto")
    listing = "pocket:split=val,task=listing", "pocket-joint", "listing"
    assert of_task("listing", None, "pocket:split=val", None, "auto") == listing
    assert of_task("video", None, "pocket", "my/model", "exact") == ("pocket:task=video", "my/model", "exact")
    for wrong, told in (
        (("films", None, "pocket"), "task='films'"),
        (("video", None, "a.jsonl"), "leave out one"),
        ((None, 16, "pocket"), "--task video"),
        (("listing", 16, "pocket"), "--task video"),
    ):
        with pytest.raises(ValueError, match=told):
            of_task(*wrong, None, "auto")


def test_table_by_kind() -> None:
    def row(policy: str, gflops: float, **kinds: float) -> dict[str, Any]:
        return {"policy": policy, "gflops": gflops, "by_kind": kinds, "kind_intervals": {"moved": (0.5, 0.75)}}

    body = {
        "data": {"kinds": ["moved", "still"]},
        "policies": [row("none", 4.0, moved=0.625, still=1.0), row("a", 1.0, moved=0.5)],
    }
    columns, lines = by_kind(body)
    assert columns == ["policy", "FLOPs", "moved", "still"]
    assert lines == [["none", "100%", "62.5% (50–75)", "100.0%"], ["a", "25%", "50.0% (50–75)", "–"]]
    assert by_kind({**body, "data": {"kinds": ["all"]}}) == ([], [])


def test_video_command(tmp_path: Path) -> None:
    """The model answers, policies and fewer frames run beside it, a run goes on where it stopped."""
    command = ["eval", "-p", "none;frames:0.5;uniform:keep=0.5,layer=0", "--task", "video", "--processes", "1"]
    command += ["--out", str(tmp_path)]
    shown = CliRunner().invoke(app, [*command, "--limit", "16"])
    assert shown.exit_code == 0, shown.output
    body = json.loads((tmp_path / "results.json").read_text())
    none, fewer, uniform = body["policies"]
    assert body["model"] == "pocket-video" and body["data"]["name"] == "pocket:task=video"
    assert none["vision_tokens"][0] == 288 and fewer["vision_tokens"][0] == uniform["vision_tokens"][0] == 144
    assert set(none["kind_intervals"]) == set(none["by_kind"]) == set(body["data"]["kinds"])
    assert "frames:keep=0.5" in (tmp_path / "table.md").read_text() and "moved" in shown.output
    again = CliRunner().invoke(app, [*command, "--limit", "16", "--resume"])
    assert again.exit_code == 0 and json.loads((tmp_path / "results.json").read_text())["policies"] == body["policies"]


def test_a_single_frame_and_the_time_kinds(video: Video) -> None:
    assert [study.single(video, place).indices for place in study.SINGLE.values()] == [[0], [8], [14]]
    assert study.timed({"by_kind": {"moved": 0.5, "first": 0.7, "still": 1.0, "all": 0.9}}) == pytest.approx(0.6)


def test_the_study_compares_equal_budgets() -> None:
    model = vtr.pocket.load("video")[0]
    found = study.specs(model)
    assert len(found) == len(set(found)) == 3 * (len(study.DIRECT) + len(study.RANKED)) + 1
    assert {spec.partition(":")[0] for spec in found} == set(study.SHOWN)
