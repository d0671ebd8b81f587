"""Policies that act on pictures: alone, in front of every kind of processor, and together with those of the model."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature
from typer.testing import CliRunner
from vtr.integrations.internvl import grids_layout, tiles_layout

import vtr
import vtr.autopatch
from vtr.chat import encode
from vtr.cli import app
from vtr.engine.adapters import find_adapter
from vtr.image import CROP_GRIDS
from vtr.inputs import as_picture
from vtr.policies.input._crops import grids

WIDE = (250, 130)
QUESTION = "what color is the star"


def picture(size: tuple[int, int] = WIDE, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pocket() -> tuple[Any, Any]:
    model, processor = vtr.pocket.load()
    return vtr.patch(model), processor


@pytest.fixture(scope="module")
def internvl() -> tuple[Any, Any]:
    model, processor = vtr.pocket.load("internvl")
    return vtr.patch(model), processor


def vision_tokens(processor: Any, size: tuple[int, int], policy: Any = None) -> int:
    ids = encode(processor, ["what"], [picture(size)], policy)["input_ids"]
    return int((ids == processor.image_token_id).sum())


# -- as data -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "spec", ["downsample:scale=0.25", "fewer_crops:alpha=0.2", "msac:detail=[1,24],adaptive=[1,8]"]
)
def test_they_are_policies_as_data(spec: str, tmp_path: Path) -> None:
    made = vtr.policy(spec)
    assert isinstance(made, vtr.InputPolicy) and made.spec == spec and vtr.policy(made.spec) == made
    together = made + vtr.FastV(0.25)
    together.save_pretrained(tmp_path)
    assert vtr.Policy.from_pretrained(tmp_path) == together == vtr.policy(f"{spec} + fastv:0.25")
    assert not any(made.asks(question) for question in ("compress", "prune", "route", "attend", "remember", "resolve"))


def test_split() -> None:
    assert vtr.split(None) == (None, None)
    fastv = vtr.FastV(0.5)
    assert vtr.split(fastv) == (None, fastv) and vtr.split("downsample") == (vtr.Downsample(), None)
    before, rest = vtr.split("downsample:0.5 + m3:36 + fewer_crops + fastv")
    assert before == vtr.policy("downsample:0.5+fewer_crops") and rest == vtr.policy("m3:36+fastv")


def test_settings_that_cannot_be() -> None:
    for spec in ("downsample:0", "downsample:2", "fewer_crops:1.0", "fewer_crops:-0.1", "msac:[4]", "msac:[5,4]"):
        with pytest.raises(ValueError, match=r"lies in|fewest"):
            vtr.policy(spec)
    for spec in ("downsample:half", "fewer_crops:x", "msac:4", 'msac:["a",3]'):
        with pytest.raises(TypeError, match="must be"):
            vtr.policy(spec)
    with pytest.raises(ValueError, match="join it in front"):
        vtr.policy('by_image:default="fewer_crops+m3:9"')
    with pytest.raises(ValueError, match="'or' or 'and'"):
        vtr.policy("msac:rule=xor")


# -- in front of a processor -------------------------------------------------------------------------------------------
def test_sizes_and_tokens(pocket: Any) -> None:
    """What the page says of the pocket LLaVA-NeXT (96 pixels a tile, at most 2 × 2)."""
    processor = pocket[1]
    square = [vision_tokens(processor, (192, 192), policy) for policy in (None, "downsample:0.5", "downsample:0.25")]
    assert square == [744, 300, 300]
    assert vtr.Downsample(0.01).size_for((192, 20), None, {}) == (2, 1)
    above = [vision_tokens(processor, (100, 98), policy) for policy in (None, "fewer_crops", "fewer_crops:0.0")]
    assert above[0] == above[2] > 2 * above[1]
    padded = [encode(processor, ["what"], [picture((96, 100))], policy) for policy in (None, "fewer_crops")]
    assert [one["pixel_values"].shape[1] for one in padded] == [3, 2]  # (padding has tiles, but no tokens)
    assert vision_tokens(processor, (192, 192), "fewer_crops") == 744


def test_the_table_of_the_page(pocket: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods" / "input.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) × (\d+) \| (\d+) tiles, (\d+) tokens \| (\d+), (\d+) \| (\d+), (\d+) \|$", page, re.M)
    assert len(rows) == 6
    for width, height, *want in (map(int, row) for row in rows):
        found: list[int] = []
        for policy in (None, "fewer_crops", "downsample:0.5"):
            inputs = encode(pocket[1], ["what"], [picture((width, height))], policy)
            found += [inputs["pixel_values"].shape[1], int((inputs["input_ids"] == 4).sum())]
        assert found == want, (width, height)


def test_what_it_saves_is_what_the_study_found() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "methods" / "input.md").read_text(encoding="utf-8")
    for one in json.loads((docs / "results" / "before-tower.json").read_text(encoding="utf-8"))["sizes"]:
        none, *others = one["rows"].values()
        if others[0]["tiles"] < none["tiles"]:
            cells = [f"{row['flops'] / none['flops']:.2f}, {row['cpu_time']:.2f}" for row in others]
            assert f"| {one['size'][0]} × {one['size'][1]} | {' | '.join(cells)} |" in page


def test_the_processor_is_as_it_was(pocket: Any, tmp_path: Path) -> None:
    processor = pocket[1]
    before = encode(processor, ["what"], [picture()])
    made = vtr.processor(processor, "downsample:0.3")
    assert type(made) is type(processor) and made.tokenizer is processor.tokenizer
    assert made.image_processor.size == processor.image_processor.size and processor.image_processor is not made
    for one in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made)), vtr.processor(made, "downsample:0.5")):
        assert one(images=picture((300, 300)), text="<image>", return_tensors="pt")["image_sizes"].max() <= 90
    made.save_pretrained(tmp_path / "wrapped")
    processor.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "wrapped" / file.name).read_bytes()
    after = encode(processor, ["what"], [picture()])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert vtr.processor(processor, None) is processor


def test_chat_templates_take_it_too(pocket: Any, tmp_path: Path) -> None:
    """Pictures in messages: as objects, as files; batches; and text alone."""
    picture((192, 192)).save(tmp_path / "a.png")
    made, how = vtr.processor(pocket[1], "downsample"), {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    text = {"type": "text", "text": QUESTION}
    for part in ({"image": picture((192, 192))}, {"path": str(tmp_path / "a.png")}):
        turn = [{"role": "user", "content": [{"type": "image", **part}, text]}]
        inputs = made.apply_chat_template(turn, add_generation_prompt=True, **how)
        assert int((inputs["input_ids"] == 4).sum()) == 300
        both = made.apply_chat_template([turn, turn], **how)
        assert both["input_ids"].shape[0] == 2 and both["image_sizes"].tolist() == [[96, 96]] * 2
    assert "pixel_values" not in made.apply_chat_template([{"role": "user", "content": [text]}], **how)


def test_arrays_are_pictures_too(pocket: Any) -> None:
    shown = picture((192, 192))
    for image in (np.asarray(shown), torch.from_numpy(np.asarray(shown).copy())):
        assert as_picture(image).size == (192, 192)
    with pytest.raises(TypeError, match="PIL pictures"):
        vtr.processor(pocket[1], "downsample")(images=np.zeros((8, 8, 3)), text="<image>")


def test_onevision_cuts_the_only_picture_of_a_row() -> None:
    """Of several pictures in a row it makes one tile each, so these stay as they are."""

    class OneVision:
        image_grid_pinpoints = [[384 * h, 384 * w] for h in (1, 2) for w in (1, 2)]  # noqa: RUF012
        model_input_names = ("pixel_values", "image_sizes", "batch_num_images")

        def __call__(self, images: Any, **settings: Any) -> Any:
            return images

    seen = vtr.FewerCrops().process(OneVision(), [[picture((394, 390))], [picture((394, 390))] * 2], {})
    assert [[one.size for one in row] for row in seen] == [[(384, 380)], [(394, 390)] * 2]


def test_internvl_gets_fewer_tiles(internvl: Any) -> None:
    """The processor's own choice, of a picture that has the proportions of the relaxed canvas."""
    processor = internvl[1]
    images = processor.image_processor
    for size in ((300, 60), (90, 95), (60, 200), (400, 400), (250, 130)):
        plain, fewer = (
            vtr.processor(processor, policy)(images=picture(size), text=processor.image_token, return_tensors="pt")
            for policy in (None, "fewer_crops")
        )
        assert len(fewer["pixel_values"]) <= len(plain["pixel_values"])
        scaled = vtr.FewerCrops().size_for(size, images, {"crop_to_patches": True})
        assert (scaled == size) == (len(fewer["pixel_values"]) == len(plain["pixel_values"]))
    assert vtr.FewerCrops().size_for((300, 60), images, {"crop_to_patches": True}) != (300, 60)


# -- where it has nothing to do ----------------------------------------------------------------------------------------
class Fixed:
    """LLaVA-1.5's image processor, as far as it is asked."""


class Qwen(Fixed):
    max_pixels = 1


class Splits(Fixed):
    do_image_splitting = True


@pytest.mark.parametrize(("images", "said"), [(Fixed, "one size"), (Qwen, "max_pixels"), (Splits, "longest_edge")])
def test_processors_without_crops_are_refused(images: Any, said: str) -> None:
    class Processor:
        image_processor = images()

    with pytest.raises(vtr.UnsupportedError, match=said):
        vtr.processor(Processor(), "fewer_crops")
    with pytest.raises(vtr.UnsupportedError, match="InternVL"):
        vtr.processor(Processor(), "msac")
    assert vtr.processor(Processor(), "downsample").image_processor.policy == vtr.Downsample()


def test_a_model_does_not_take_them(pocket: Any) -> None:
    model, processor = pocket
    inputs = encode(processor, [QUESTION], [picture()])
    for call in (
        lambda: model.generate(**inputs, policy="fewer_crops+fastv:0.25"),
        lambda: model(**inputs, policy=vtr.Downsample() + vtr.FastV(0.25)),
        lambda: model.generate(**inputs, policy=["fewer_crops+fastv:0.25"]),
        lambda: vtr.use(model, "fewer_crops+fastv:0.25").__enter__(),
        lambda: vtr.patch(model, policy="fewer_crops+fastv:0.25"),
    ):
        with pytest.raises(vtr.UnsupportedError, match=r"vtr\.processor\(processor.*policy='fastv:keep=0.25'"):
            call()
    with pytest.raises(ValueError, match=r"models are patched here.*vtr\.processor"):
        vtr.autopatch.enable("fewer_crops")
    with pytest.raises(vtr.UnsupportedError, match="policy=None"):
        model.generate(**inputs, policy="downsample")
    with pytest.raises(ValueError, match=r"'fastv:keep=0.5' acts in the model.*'downsample:scale=0.5' alone here"):
        vtr.processor(processor, "downsample+fastv")
    with pytest.raises(vtr.UnsupportedError, match="no image_processor"):
        vtr.processor(processor.tokenizer, "downsample")
    with pytest.raises(TypeError, match="before the processor"):
        vtr.testing.check_policy(vtr.FewerCrops)


# -- two grids ---------------------------------------------------------------------------------------------------------
def tiles_of(processor: Any, size: tuple[int, int] = WIDE, policy: Any = "msac") -> BatchFeature:
    return encode(processor, [QUESTION], [picture(size)], policy)


def test_tiles_are_those_of_both_grids_and_the_thumbnail(internvl: Any) -> None:
    processor = internvl[1]
    images, shown = processor.image_processor, picture()
    detail, adaptive = vtr.MSAC().grids_for(WIDE, 96)
    assert (detail, adaptive) == ((4, 2), (3, 2))
    inputs = tiles_of(processor)
    assert inputs[CROP_GRIDS].tolist() == [[[2, 4], [2, 3]]]
    own = images([shown], crop_to_patches=True, min_patches=4, max_patches=12, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"][:8], own[:8]) and torch.equal(inputs["pixel_values"][-1], own[-1])
    wide = shown.resize((3 * 96, 2 * 96), Image.Resampling(images.resample))
    for at in range(6):
        left, top = at % 3 * 96, at // 3 * 96
        tile = images([wide.crop((left, top, left + 96, top + 96))], crop_to_patches=False, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"][8 + at], tile["pixel_values"][0])
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 15 * 36


def test_grids_of_one_tile_are_the_thumbnail(internvl: Any) -> None:
    processor = internvl[1]
    alone = tiles_of(processor, (90, 90), "msac:[1,4],adaptive=[1,1]")
    assert len(alone["pixel_values"]) == 1 and alone[CROP_GRIDS].shape == (0, 2, 2)
    one = tiles_of(processor, WIDE, "msac:[2,2],adaptive=[1,1]")
    assert one[CROP_GRIDS].tolist() == [[[1, 2], [0, 0]]]
    (layout,) = find_adapter(internvl[0]).layouts(internvl[0], one)[internvl[0].config.image_token_id]
    assert layout.crops == (1, 2) and not layout.groups


def test_how_two_grids_lie() -> None:
    layout = grids_layout(((2, 4), (2, 3)), (6, 6))
    plain = tiles_layout(15, (6, 6), (3, 5))
    assert torch.equal(layout.tile, plain.tile) and layout.tiles == 15 and layout.has_all_patches
    assert layout.groups == ((1, 2, 4), (9, 2, 3)) and layout.crops == (0, 0)
    assert layout.group.tolist() == [1] * 8 * 36 + [2] * 6 * 36 + [0] * 36
    assert layout.shrunk is not None and layout.shrunk(2).groups == layout.groups
    assert plain.group.tolist() == [1] * 14 * 36 + [0] * 36


def test_scm_cuts_the_detail_grid(internvl: Any) -> None:
    model, processor = internvl
    inputs = tiles_of(processor)
    for policy in ("scm", "scm:restart=true"):
        model.generate(**inputs, policy=policy, max_new_tokens=2, do_sample=False)
        row = vtr.report(model).rows[0]
        kept = row.kept(9)
        first = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[0])
        coarse = list(range(first + 8 * 36, first + 15 * 36))
        assert len(kept) == 4 * 36 + 7 * 36 and kept[-len(coarse) :] == coarse


def test_a_mixed_batch_is_its_rows_alone(internvl: Any) -> None:
    """Rows of two grids and of one: what each keeps, and says."""
    model, processor = internvl
    sizes, policies = [(250, 130), (90, 90), (130, 250)], ["scm", "fastv:0.25", "m3:9"]
    made = [picture(size, seed) for seed, size in enumerate(sizes)]
    policy = "msac:[1,6],adaptive=[1,4]"
    together = encode(processor, [QUESTION] * 3, made, policy)
    assert len(together[CROP_GRIDS]) == 2 + 1
    run: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": []}
    run |= {"return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**together, policy=policies, **run)
    rows = vtr.report(model).rows
    for b, (one, mine) in enumerate(zip(made, policies, strict=True)):
        alone = model.generate(**encode(processor, [QUESTION], [one], policy), policy=mine, **run)
        assert vtr.report(model).rows[0].vision_tokens == rows[b].vision_tokens
        torch.testing.assert_close(torch.stack(alone.logits)[:, 0], torch.stack(want.logits)[:, b], atol=2e-4, rtol=0)


def test_a_forward_takes_the_grids_too(internvl: Any) -> None:
    model, processor = internvl
    inputs = tiles_of(processor)
    with torch.no_grad():
        plain = model(**inputs).logits
        assert torch.equal(plain, model(**{k: v for k, v in inputs.items() if k != CROP_GRIDS}).logits)
        model(**inputs, policy="scm")
    assert vtr.report(model).rows[0].vision_tokens[-1] == 11 * 36
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2 and vtr.report(model).rows[0].total == 15 * 36


def test_grids_of_other_images_are_refused(internvl: Any) -> None:
    model, processor = internvl
    inputs = tiles_of(processor)
    for told in (torch.tensor([[[2, 4], [3, 3]]]), torch.zeros(0, 2, 2).long(), inputs[CROP_GRIDS].repeat(2, 1, 1)):
        with pytest.raises(ValueError, match="one call of the processor"):
            model.generate(**{**inputs, CROP_GRIDS: told}, policy="scm", max_new_tokens=1)


# -- one way to say it everywhere --------------------------------------------------------------------------------------
def test_pictures_of_several_policies(pocket: Any) -> None:
    model, processor = pocket
    shots = vtr.visualize.ask(model, processor, picture((192, 192)), QUESTION, [None, "downsample+fastv:0.5"])
    assert [shot.row.total for shot in shots] == [744, 300] and [len(shot.layout) for shot in shots] == [744, 300]


def test_embeddings_of_fewer_tiles(pocket: Any) -> None:
    from vtr.encode import encode as embeddings

    model, processor = pocket
    for policy, count in (("downsample", 300), ("downsample+uniform:0.5,before_decoder=true", 150)):
        assert len(embeddings(model, processor, picture((192, 192)), policy)) == count


def test_a_run_says_what_is_left_of_the_whole_prompt(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["run", "--sample", "0", "--policy", "downsample+fastv:0.5,layer=2", "--compare", "--repeats", "1",
              "--show", str(tmp_path / "kept.png")], env={"COLUMNS": "200"},
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    share = (2 * 300 + 8 * 150) / 10 / 744
    assert f"{share:.0%}" in done.output and "random:keep=180,layer=0" in done.output
    assert (tmp_path / "kept.png").stat().st_size > 10_000


def test_kits_split_them() -> None:
    from vtr.integrations.chat import Chat, spelled

    kit = Chat("pocket", "downsample:0.5+fastv:0.5;layer=2")
    assert spelled(kit.policy) == "downsample:scale=0.5+fastv:keep=0.5"
    message = {
        "role": "user",
        "content": [{"type": "image", "image": picture((192, 192))}, {"type": "text", "text": QUESTION}],
    }
    (said,) = kit.answers([kit.prompt([message])], {"max_new_tokens": 2, "do_sample": False})
    assert said.vision_tokens == (2 * 300 + 8 * 150) / 10


def test_an_evaluation_encodes_anew(pocket: Any) -> None:
    from vtr.eval.accuracy.answers import Bench
    from vtr.eval.accuracy.contenders import contender
    from vtr.eval.accuracy.data import open_data
    from vtr.eval.accuracy.metrics import metric

    found = [contender(spec) for spec in ("none", "downsample", "fewer_crops+fastv:0.5")]
    assert [one.name for one in found] == ["none", "downsample", "fewer_crops"]
    bench = Bench(*pocket, found, metric("auto"), max_new_tokens=2)
    (row,) = bench.rows(list(open_data("pocket", limit=1, seed=0, columns={}, images=None)))
    totals = [cell["total"] for cell in row["policies"].values()]
    assert totals[0] == totals[2] and totals[1] < totals[0]


def test_requests_may_name_them() -> None:
    from vtr.integrations.vllm.specs import RequestError, acts_before, made_of, read, scaled

    assert read("fewer_crops+m3:tokens=[36,9]", 2, 10) == [
        f"fewer_crops:alpha=0.1+m3:tokens={tokens}" for tokens in (36, 9)
    ]
    (spec,) = read("downsample:0.5", 1, 10)
    assert made_of(spec) is None and acts_before(spec) and not acts_before("none") and not acts_before("m3:tokens=36")
    assert made_of("downsample+m3:36") == vtr.Matryoshka(36)
    assert scaled(picture(), spec, Fixed()).size == (125, 65) and scaled(None, spec, Fixed()) is None
    with pytest.raises(RequestError, match="one size"):
        scaled(picture(), "fewer_crops", Fixed())
    for value, said in {"msac": "vLLM's models do not know", "downsample+fastv": "inside the decoder"}.items():
        with pytest.raises(RequestError, match=said):
            read(value, 1, 10)


def test_grids_in_order_of_area() -> None:
    assert grids(3, 4) == [(1, 3), (3, 1), (1, 4), (2, 2), (4, 1)]
