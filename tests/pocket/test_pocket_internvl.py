"""The pocket InternVL: loads offline, reads, and runs every policy that needs no weights of its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from vtr.eval.accuracy.processes import Rank
from vtr.eval.accuracy.run import Settings, prepare

import vtr
from vtr.chat import decode, encode
from vtr.cli import app
from vtr.image import scales
from vtr.pocket import scenes as S
from vtr.pocket.internvl.__main__ import work
from vtr.pocket.internvl.model import SCALES, SHOWING, SIDE, build, features
from vtr.pocket.language import Batch
from vtr.pocket.model import pixels_of, see

POLICIES = [
    "fastv:keep=0.25,layer=2",
    "gsearch:schedule=[1.0,1.0,0.75,0.5,0.5,0.25,0.25,0.25,0.1,0.1]",
    "m3:tokens=9",
    "globalcom2:retention=0.5",
    "pool:grid=3",
    "random:keep=0.5,layer=1",
    None,
]


@pytest.fixture(scope="module")
def pocket() -> Any:
    model, processor = vtr.pocket.load("internvl")
    return vtr.patch(model), processor


@pytest.fixture(scope="module")
def asked() -> list[dict[str, Any]]:
    return list(vtr.pocket.samples(48, split="test", seed=21))


@pytest.mark.slow
def test_another_process_loads_it_offline() -> None:
    """By transformers' auto classes, without vtr and without a network."""
    code = (
        "import sys\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "print(type(model).__name__, type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)\n"
        "assert not any(info.values()), info\n"
    )
    folder = str(vtr.pocket.MODELS["internvl"])
    out = subprocess.run(
        [sys.executable, "-c", code, folder], env={"HF_HUB_OFFLINE": "1", "PATH": ""}, capture_output=True, text=True
    )
    assert out.stdout.split() == ["InternVLForConditionalGeneration", "QianfanOCRProcessor"], out.stderr


def test_no_such_family() -> None:
    with pytest.raises(ValueError, match="llava-next, joint, internvl, video"):
        vtr.pocket.load("qwen")


def test_it_reads_and_the_questions_need_the_picture(pocket: Any, asked: list[dict[str, Any]]) -> None:
    from vtr.pocket.evaluate import accuracy

    model, processor = pocket
    assert accuracy(model, processor, asked)["all"] >= 44 / 48
    assert accuracy(model, processor, asked, blind=True)["all"] <= 16 / 48


@pytest.mark.parametrize(("size", "tiles"), [((192, 192), 5), ((192, 96), 3), ((96, 192), 3), ((96, 96), 1)])
def test_tiles_of_a_picture(pocket: Any, size: tuple[int, int], tiles: int) -> None:
    """Crops in rows as the tasks cut them, the thumbnail last."""
    _, processor = pocket
    picture = S.make_scene(random.Random(5), "val", (192, 192)).image.resize(size)
    inputs = encode(processor, ["what is in the picture"], [picture])
    assert len(inputs["pixel_values"]) == tiles
    assert int((inputs["input_ids"] == 4).sum()) == tiles * SIDE**2
    if tiles > 1:
        wanted = pixels_of(torch.from_numpy(S.tiles_of(picture))).roll(-1, 0)
        torch.testing.assert_close(inputs["pixel_values"], wanted, rtol=0, atol=2e-3)


def test_scales_are_those_of_its_grid(pocket: Any, asked: list[dict[str, Any]]) -> None:
    model, processor = pocket
    assert SCALES == scales((6, 6)) == {36: 1, 9: 2, 1: 6}
    inputs = encode(processor, [asked[0]["question"]], [asked[0]["image"]])
    for tokens in SCALES:
        model.generate(**inputs, policy=f"m3:tokens={tokens}", max_new_tokens=1)
        row = vtr.report(model).rows[0]
        tiles = len(inputs["pixel_values"])
        assert row.total == tiles * 36 and set(row.vision_tokens) == {tiles * tokens}
    with pytest.raises(ValueError, match="choose 36, 9, 1"):
        model.generate(**inputs, policy="m3:tokens=4", max_new_tokens=1)


def test_the_middle_scale_reads(pocket: Any, asked: list[dict[str, Any]]) -> None:
    model, processor = pocket
    inputs = encode(processor, [s["question"] for s in asked], [s["image"] for s in asked])
    out = model.generate(**inputs, policy="m3:tokens=9", max_new_tokens=2, do_sample=False)
    said = decode(processor, out, inputs["input_ids"].shape[1])
    assert sum(a == s["answer"] for a, s in zip(said, asked, strict=True)) >= 40


def test_off_is_off(asked: list[dict[str, Any]]) -> None:
    model, processor = vtr.pocket.load("internvl")
    inputs = encode(processor, [s["question"] for s in asked[:3]], [s["image"] for s in asked[:3]])
    with torch.inference_mode():
        before = model(**inputs).logits
        vtr.patch(model)
        assert torch.equal(model(**inputs).logits, before)
        model.generate(**inputs, policy=POLICIES[0], max_new_tokens=2)
        vtr.unpatch(model)
        assert torch.equal(model(**inputs).logits, before)


def test_rows_of_a_mixed_batch_are_those_alone(pocket: Any, asked: list[dict[str, Any]]) -> None:
    model, processor = pocket
    rows = asked[:40:6][: len(POLICIES)]
    assert len(rows) == len(POLICIES)
    how = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    inputs = encode(processor, [s["question"] for s in rows], [s["image"] for s in rows])
    mixed = model.generate(**inputs, policy=POLICIES, min_new_tokens=3, **how)
    kept = [row.vision_tokens for row in vtr.report(model).rows]
    for b, (sample, policy) in enumerate(zip(rows, POLICIES, strict=True)):
        one = encode(processor, [sample["question"]], [sample["image"]])
        alone = model.generate(**one, policy=policy, min_new_tokens=3, **how)
        assert vtr.report(model).rows[0].vision_tokens == kept[b], policy
        assert alone.sequences[0, -3:].tolist() == mixed.sequences[b, -3:].tolist(), policy
        for ours, theirs in zip(alone.logits, mixed.logits, strict=True):
            torch.testing.assert_close(ours[0], theirs[b], rtol=0, atol=1e-4)


def test_weights_of_the_llava_next_are_refused(pocket: Any, asked: list[dict[str, Any]]) -> None:
    model, processor = pocket
    inputs = encode(processor, [asked[0]["question"]], [asked[0]["image"]])
    for name in ("pmod", "dynamic-llava"):
        with pytest.raises(ValueError, match="trained with another model"):
            model.generate(**inputs, policy=f"{name}:weights=pocket", max_new_tokens=1)


def test_by_its_name_on_the_command_line(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["run", "--sample", "0", "--model", "pocket-internvl", "--repeats", "1"])
    assert ran.exit_code == 0 and vtr.pocket.sample(0)[2] in ran.output, ran.output
    more = [
        "--model",
        "pocket-internvl",
        "-p",
        "m3:tokens=9",
        "--limit",
        "2",
        "--processes",
        "1",
        "--out",
        str(tmp_path),
    ]
    ran = CliRunner().invoke(app, ["eval", *more])
    assert ran.exit_code == 0, ran.output
    body = json.loads((tmp_path / "results.json").read_text())
    assert body["model"] == "pocket-internvl" and len(body["policies"]) == 2
    ran = CliRunner().invoke(app, ["serve", "pocket-internvl"])
    assert ran.exit_code == 1 and "serve pocket" in ran.output


@pytest.mark.slow
def test_all_leaves_out_what_was_trained_into_the_llava_next() -> None:
    bench, left_out, _ = prepare(Settings(model="pocket-internvl", limit=2, batch_size=2), Rank())
    assert {"pmod", "dynamic-llava"} <= set(left_out)
    assert {"none", "fastv", "m3", "globalcom2", "gsearch", "downsample"} <= {one.name for one in bench.contenders}


# -- how it is made ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_dropped_tokens_leave_the_others_in_place(keep: float) -> None:
    """All kept is the whole picture; fewer are some of it, at their positions or without gaps."""
    model, _ = vtr.pocket.load("internvl")
    scene = S.make_scene(random.Random(4), "val", S.SIZES[0])
    pixels = pixels_of(torch.from_numpy(S.tiles_of(scene.image)))[None]
    none = torch.zeros(1, 1).long()
    batch = Batch(pixels, 2, 2, none, none, none, none, none)
    with torch.inference_mode():
        whole = SHOWING.whole(model, batch)[0]
        starts = set()
        for seed in range(6):
            got, where, start = SHOWING.pruned(model, batch, False, ("keep", keep, keep), random.Random(seed))
            starts.add(start)
            assert got.shape[1] == 2 + int(36 * keep) + int(144 * keep)
            assert where[0, 0] == 1 and where[0, -1] == start - 1 and bool((where.diff() > 0).all())
            if start == 183:
                torch.testing.assert_close(got[0], whole[where[0] - 1])
    assert starts == ({183} if keep == 1 else {183, got.shape[1] + 1})


@pytest.mark.slow
def test_it_starts_near_the_llava_next_and_training_goes_on_where_it_was(tmp_path: Path) -> None:
    teacher = vtr.pocket.load()[0]
    model = build(teacher)
    pixels = pixels_of(torch.from_numpy(S.tiles_of(S.make_scene(random.Random(8), "val").image)))
    with torch.no_grad():
        wanted = see(teacher, pixels)
        left = (features(model, pixels) - wanted).square().mean() / wanted.var()
    assert left < 0.5
    assert model.lm_head.weight is model.get_input_embeddings().weight
    stages = {
        "copy": {"steps": 2, "lr": 1e-3, "scenes": 1},
        "nest": {"steps": 1, "lr": 8e-4, "pictures": 1, "tower": 0.1},
    }
    work(tmp_path, 0, stages)
    before = [(tmp_path / f"{stage}.pt").stat().st_mtime_ns for stage in stages]
    work(tmp_path, 0, stages)  # nothing left to do
    assert [(tmp_path / f"{stage}.pt").stat().st_mtime_ns for stage in stages] == before
    assert vtr.pocket.load(folder=tmp_path / "weights")[0].dtype == torch.float32
