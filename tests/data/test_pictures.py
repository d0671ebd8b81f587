"""Every door turns a photo as its EXIF orientation says, once; deep gray keeps its range; broken files are named."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import types
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from transformers.image_utils import load_image
from typer.testing import CliRunner

import vtr
from vtr.cli import app
from vtr.commands.run import prepare
from vtr.data.pictures import ORIENTATION, BadPictureError, check, upright

WIDTH, HEIGHT = 96, 60
FORMATS = ["JPEG", "PNG", "TIFF", *(["WEBP"] if features.check("webp") else [])]


def scene() -> Image.Image:
    """No two sides of it look alike."""
    draw = np.random.default_rng(0).integers(0, 255, (HEIGHT // 6, WIDTH // 6, 3), dtype=np.uint8)
    return Image.fromarray(draw).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)


def photo(path: Path, orientation: int = 6, picture: Image.Image | None = None, **how: Any) -> Path:
    """Saved as a camera does that was held so."""
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes each orientation, as Image.Transpose
    turn = turns[orientation]
    picture = scene() if picture is None else picture
    tag = Image.Exif()
    tag[ORIENTATION] = orientation
    stored = picture if turn is None else picture.transpose(Image.Transpose(turn))
    stored.save(path, exif=tag, **how)
    return path


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode == "RGB" and a.size == b.size and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_from_all_sources(kind: str, orientation: int, tmp_path: Path) -> None:
    path = photo(tmp_path / f"x.{kind.lower()}", orientation, format=kind)
    want = scene() if kind in ("PNG", "TIFF") else load_image(str(path))
    assert want.size == (WIDTH, HEIGHT) and (kind == "TIFF" or same(want, load_image(str(path))))
    opened = Image.open(path)
    kept = Image.open(path).convert("RGB")  # converted, the tag is still there
    sources = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), opened]
    for source in sources + [kept] * (kind != "TIFF"):  # old versions of Pillow turn a TIFF and leave the tag
        got = upright(source)
        assert same(got, want)
        assert same(upright(got), want) and (got is source or same(upright(ImageOps.exif_transpose(got)), want))
    if kind != "TIFF":  # some versions of Pillow turn these twice
        assert same(upright(ImageOps.exif_transpose(Image.open(path))), want)  # by a kit, before


def test_an_rgb_picture_without_a_tag_is_given_back_as_it_is() -> None:
    picture = scene()
    assert upright(picture) is picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_turned_gray_tiffs_are_not_misread(mode: str, orientation: int, tmp_path: Path) -> None:
    gray = np.asarray(scene().convert("L"))
    deep = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(gray)
    path = photo(tmp_path / "x.tiff", orientation, deep)
    assert same(upright(path), Image.fromarray(gray).convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_as_transformers_loads_them(mode: str) -> None:
    picture = scene().convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
    assert same(upright(picture), load_image(picture))


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    scene().convert("P").save(tmp_path / "p.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(upright(tmp_path / "p.png"), load_image(str(tmp_path / "p.png")))


RAMP = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.pgm"])
def test_sixteen_bits_keep_their_range(name: str, tmp_path: Path) -> None:
    def read(values: Any) -> Any:
        if name == "x.pgm":  # old versions of Pillow cannot write it
            head = f"P5 {WIDTH} {HEIGHT} 65535\n".encode()
            (tmp_path / name).write_bytes(head + values.astype(">u2").tobytes())
        else:
            Image.fromarray(values).save(tmp_path / name)
        return np.asarray(upright(tmp_path / name))

    assert np.abs(read(RAMP) - RAMP[..., None] / 257).max() <= 0.5
    assert read(RAMP // 512).max() == 0  # 16 bits stay 16 bits, whatever values occur


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (RAMP.astype(np.int32), 0, 255),
        (RAMP.astype(np.int32) // 512, 0, 127),  # eight bits in a wide type
        (RAMP.astype(np.int32) * 3000, 0, 255),
        (RAMP.astype(np.int32) - 40000, 0, 255),
        (RAMP.astype(np.float32) / 65535 / 2, 0, 127),
        (RAMP.astype(np.float32) / 257, 0, 255),
        (np.full((4, 4), 7.0, np.float32), 7, 7),
        (np.full((4, 4), -7, np.int32), 0, 0),
        (np.array([[np.nan, 1.0]], np.float32), 0, 255),
    ],
)
def test_ints_and_floats_keep_their_range(values: Any, low: int, high: int) -> None:
    got = np.asarray(upright(Image.fromarray(values)))
    assert abs(int(got.min()) - low) <= 1 and abs(int(got.max()) - high) <= 1
    assert (np.diff(got[..., 0].flatten().astype(int)) >= 0).all()


def test_big_endian_sixteen_bits() -> None:
    picture = Image.frombytes("I;16B", (WIDTH, HEIGHT), RAMP.astype(">u2").tobytes())
    assert same(upright(picture), upright(Image.fromarray(RAMP)))


# -- what is no picture ------------------------------------------------------------------------------------------------
def bomb(path: Path) -> Path:
    """20,000 × 20,000 pixels in a kilobyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def broken(folder: Path) -> dict[str, Path]:
    """Files that are no pictures, and what is said of them."""
    cut, text, pipe = folder / "cut.jpg", folder / "text.png", folder / "pipe.png"
    photo(cut, 1)
    cut.write_bytes(cut.read_bytes()[:-900])
    text.write_text("no picture")
    os.mkfifo(pipe)
    return {
        "truncated": cut, "not a picture Pillow can read": text, "no regular file": pipe,
        "DecompressionBomb": bomb(folder / "bomb.png"),
    }  # fmt: skip


@pytest.mark.parametrize("look", [upright, check])
def test_broken_files_are_one_kind_of_error_that_names_them(look: Callable[[Any], Any], tmp_path: Path) -> None:
    for told, path in broken(tmp_path).items():
        with pytest.raises(BadPictureError, match=f"{path.name}.*{told}"):
            look(path)
    with pytest.raises(BadPictureError, match="no regular file"):
        look(tmp_path)
    with pytest.raises(FileNotFoundError):
        look(tmp_path / "none.png")
    with pytest.raises(BadPictureError, match="the picture is not a picture"):
        look(b"no picture")
    with pytest.raises(TypeError, match="got int"):
        look(3)  # type: ignore[arg-type]


def test_broken_metadata_say_nothing_of_an_orientation(tmp_path: Path) -> None:
    scene().save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert upright(tmp_path / "x.jpg").size == (WIDTH, HEIGHT)


# -- every door --------------------------------------------------------------------------------------------------------
def from_data_set(path: Path, decode: bool, nested: bool) -> Any:
    datasets = pytest.importorskip("datasets")
    kind: Any = datasets.Image(decode=decode)
    kind = datasets.Sequence(kind) if nested else kind
    one = {"bytes": path.read_bytes(), "path": None}
    features = datasets.Features(image=kind, question=datasets.Value("string"), answer=datasets.Value("string"))
    table = {"image": [[one] if nested else one], "question": ["what"], "answer": ["a"]}
    return datasets.Dataset.from_dict(table, features=features)


def saved(path: Path, decode: bool, nested: bool) -> Image.Image:
    from vtr.eval.accuracy.data import open_data

    folder = path.parent / f"saved-{decode}-{nested}"
    from_data_set(path, decode, nested).save_to_disk(folder)
    return next(iter(open_data(str(folder)))).picture()  # type: ignore[union-attr]


def listed(path: Path) -> Path:
    lines = path.parent / "d.jsonl"
    lines.write_text(json.dumps({"image": path.name, "question": "what", "answer": "a"}) + "\n")
    return lines


def evaluated(path: Path) -> Image.Image:
    from vtr.eval.accuracy.data import open_data

    return next(iter(open_data(str(listed(path))))).picture()  # type: ignore[union-attr]


def kit(path: Path, opened: bool) -> Image.Image:
    from vtr.integrations.chat import picture

    return picture(Image.open(path) if opened else str(path))


DOORS: dict[str, Callable[[Path], Image.Image]] = {
    "run": lambda path: prepare(path, "what", None, "pocket", "cpu").picture,
    "eval": evaluated,
    **{
        f"eval of a data set, {d}, {n}": lambda p, d=d, n=n: saved(p, d, n)
        for d in (True, False)
        for n in (True, False)
    },
    "search of a file": lambda path: vtr.search.examples(listed(path))[0].image,
    "search of pictures": lambda path: vtr.search.examples([(Image.open(path), "what", "a")])[0].image,
    "search of bytes": lambda path: vtr.search.examples([(path.read_bytes(), "what", "a")])[0].image,
    "search of a data set": lambda path: vtr.search.examples(from_data_set(path, True, False))[0].image,
    "a kit's file": lambda path: kit(path, False),
    "a kit's picture": lambda path: kit(path, True),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_turns_a_photo(door: str, tmp_path: Path) -> None:
    assert same(DOORS[door](photo(tmp_path / "photo.png")), scene())


@pytest.fixture(scope="module")
def pocket() -> tuple[Any, Any]:
    model, processor = vtr.pocket.load()
    return vtr.patch(model), processor


def test_processors_get_photos_upright(pocket: tuple[Any, Any], tmp_path: Path) -> None:
    """Training's batches, prompts, embeddings and drawings: the picture and the photo give the same."""
    from vtr.encode import encode
    from vtr.training.data import Collate, as_sample, read_samples

    model, processor = pocket
    path = photo(tmp_path / "photo.png")
    batches = [
        Collate(processor)([as_sample(source, "what", "a")]) for source in (scene(), Image.open(path), str(path))
    ]
    batches.append(Collate(processor)(read_samples(listed(path))))
    batches += [vtr.chat.encode(processor, ["what"], [source]) for source in (scene(), Image.open(path))]
    for batch in batches:
        assert batch["image_sizes"].tolist() == [[HEIGHT, WIDTH]]
        assert batch["pixel_values"].equal(batches[0]["pixel_values"])
    whole, turned = (encode(model, processor, source, None) for source in (scene(), Image.open(path)))
    assert whole.equal(turned)
    (shot,) = vtr.visualize.ask(model, processor, Image.open(path), "what", [None], max_new_tokens=1)
    assert same(shot.picture, scene())


def test_the_commands_say_what_is_wrong_with_a_picture(tmp_path: Path) -> None:
    for told, path in broken(tmp_path).items():
        for command in (["run", str(path), "what"], ["encode", str(path), "--out", str(tmp_path / "out")]):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
            assert told.split()[0] in result.output and path.name in "".join(result.output.split())


def test_the_client_sends_photos_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import base64
    import runpy

    monkeypatch.setitem(sys.modules, "openai", types.SimpleNamespace(OpenAI=None))
    client = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "openai_client.py"))
    url = client["data_url"](photo(tmp_path / "photo.jpg", quality=95))
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.size == (WIDTH, HEIGHT) and not sent.getexif()
