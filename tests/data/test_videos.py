"""Videos from folders, animated pictures, films and lists; how they are put to processors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import vtr
from vtr.chat import encode_videos, video_parts
from vtr.cli import app
from vtr.data.videos import Video, read_video, spread
from vtr.picture import frame_spans


def picture(shade: int, side: int = 96) -> Image.Image:
    """A gray picture with a white square that moves with the shade."""
    pixels = np.full((side, side, 3), shade, np.uint8)
    pixels[shade // 4 : shade // 4 + 20, 10:40] = 255
    return Image.fromarray(pixels)


SHADES = [40, 60, 80, 100, 120, 140, 160, 180]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same eight frames, 250 ms each, in every way they can be given."""
    folder = tmp_path_factory.mktemp("videos")
    pictures = [picture(shade) for shade in SHADES]
    (folder / "frames").mkdir()
    for i, one in enumerate(pictures):
        one.save(folder / "frames" / f"{i:03d}.png")
    (folder / "frames" / "notes.txt").write_text("no frame")
    more = {"save_all": True, "append_images": pictures[1:], "duration": 250}
    pictures[0].save(folder / "film.gif", **more)
    pictures[0].save(folder / "film.webp", lossless=True, **more)
    av = pytest.importorskip("av")
    with av.open(str(folder / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        for one in pictures:
            film.mux(stream.encode(av.VideoFrame.from_image(one)))
        film.mux(stream.encode())
    return {name: folder / name for name in ("frames", "film.gif", "film.webp", "film.mp4")}


@pytest.mark.parametrize("name", ["frames", "film.gif", "film.webp", "film.mp4"])
@pytest.mark.parametrize("count", [1, 3, 4, 8, 20])
def test_frames_are_evenly_spread(videos: dict[str, Path], name: str, count: int) -> None:
    video, at = read_video(videos[name], count), spread(8, count)
    assert at == {1: [0], 3: [0, 2, 5], 4: [0, 2, 4, 6]}.get(count, list(range(8)))
    assert (video.indices, video.total) == (at, 8)
    for i, frame in zip(at, video.frames, strict=True):
        assert frame.size == (96, 96) and frame.mode == "RGB"
        assert abs(int(np.asarray(frame)[90, 90, 0]) - SHADES[i]) < 8  # a film is not exact
    if name == "frames":
        assert video.times is None and video.fps is None
    else:
        assert video.times == pytest.approx([i / 4 for i in at])
        assert count == 1 or video.fps == pytest.approx(4.0)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.gif"):
        read_video(tmp_path / "gone.gif")
    with pytest.raises(ValueError, match="has no frames"):
        read_video(tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        read_video(tmp_path, 0)
    for name in ("a.gif", "a.mp4"):
        (tmp_path / name).write_text("no video at all")
        with pytest.raises(ValueError, match=r"cannot be read|no video"):
            read_video(tmp_path / name)
    with pytest.raises(ValueError, match="one size"):
        read_video([picture(40), picture(40, 50)])


def test_without_pyav_a_film_says_what_to_install(videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        read_video(videos["film.mp4"])
    said = CliRunner().invoke(app, ["run", "--video", str(videos["film.mp4"]), "what"])
    assert said.exit_code and "pip install av" in said.output + said.stderr
    assert read_video(videos["film.gif"]).total == 8


class Whole:
    """A processor that takes videos: it hands back what it was given."""

    chat_template, video_processor, image_processor = "{}", object(), None

    def apply_chat_template(self, turns: Any, add_generation_prompt: bool) -> str:
        return "|".join(part.get("text", f"<{part['type']}>") for part in turns[0]["content"])

    def __call__(self, **given: Any) -> dict[str, Any]:
        return given


class Pieces(Whole):
    """One that takes pictures."""

    video_processor, image_processor = None, SimpleNamespace(crop_to_patches=True)


def test_how_videos_are_put() -> None:
    video = Video([picture(40), picture(60)], [0.0, 2.0], [0, 4], 8)
    whole = encode_videos(Whole(), ["what moved"], [video])
    assert whole["text"] == ["<video>|what moved"]
    assert whole["videos"] == [video.frames] and whole["do_sample_frames"] is False
    assert whole["video_metadata"] == [{"total_num_frames": 8, "fps": 2.0, "frames_indices": [0, 4]}]
    pieces = encode_videos(Pieces(), ["what moved"], [video])
    assert pieces["text"] == ["Frame1: |<image>|\n|Frame2: |<image>|\n|what moved"]
    assert pieces["images"] == [video.frames] and pieces["crop_to_patches"] is False
    assert len(video_parts(Pieces(), 5)) == 15
    with pytest.raises(ValueError, match="as many videos"):
        encode_videos(Whole(), ["what", "who"], [video])


def test_run_draws_every_frame(videos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pocket InternVL sees a still film: its first frame stays whole, and so many patches of the others."""
    drawn: list[Any] = []
    film = vtr.visualize.film
    monkeypatch.setattr(vtr.visualize, "film", lambda *given: drawn.append(given) or film(*given))
    said = CliRunner().invoke(
        app,
        ["run", "--video", str(videos["film.gif"]), "what color is the star", "--policy", "evs:0.5", "--frames", "4",
         "--show", str(tmp_path / "frames.png"), "--repeats", "1", "--model", "pocket-internvl"],
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    assert Image.open(tmp_path / "frames.png").width > 400
    ((shots, times),) = drawn
    assert times == pytest.approx([0.0, 0.5, 1.0, 1.5])
    kept = set(shots[0].row.kept(0))
    per_frame = [len(kept & set(range(s.first_slot, s.first_slot + len(s.layout)))) for s in shots]
    assert per_frame[0] == 36 and sum(per_frame) == 72 and len(shots) == 4


def test_frames_of_a_video_that_is_one_image() -> None:
    """Each tile of a video has slots of its own, one frame behind the other."""
    from tests.engine.test_video import FRAMES, onevision
    from tests.families import FAMILIES
    from tests.support import Models

    models = Models.from_family(next(family for family in FAMILIES if family.kind == "llava_onevision"))
    inputs = onevision(models, True, "what", 0)
    spans = frame_spans(models.patched, inputs)
    first = spans[0][0]
    assert [slot for slot, _ in spans] == [first + 9 * i for i in range(FRAMES)]
    assert all(layout.tiles == 1 and len(layout) == 9 for _, layout in spans)
