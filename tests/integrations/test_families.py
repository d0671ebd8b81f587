"""Layouts against transformers' own packing: coordinates are sent through it as if they were features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vtr.integrations.internvl import InternVL, crops_of
from vtr.integrations.llava_next import LlavaNext
from vtr.integrations.llava_onevision import LlavaOnevision

import vtr
from tests import tiny
from vtr.engine.adapters import families, find_adapter


@pytest.fixture(scope="module")
def next_model() -> Any:
    return tiny.llava_next()


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 400), st.integers(8, 400))
def test_anyres_layout(next_model: Any, height: int, width: int) -> None:
    sizes = torch.tensor([[height, width]])
    layout = LlavaNext().layouts(next_model, {"pixel_values": torch.zeros(1), "image_sizes": sizes})[tiny.IMAGE_ID][0]
    side, tiles = tiny.SIDE // tiny.PATCH, 1 + layout.crops[0] * layout.crops[1]
    tile, y, x = torch.meshgrid(torch.arange(tiles), torch.arange(side), torch.arange(side), indexing="ij")
    coordinates = torch.stack([tile, y, x], -1).reshape(tiles, side * side, 3).float()
    newline = torch.full((3,), -1.0)
    packed, _ = next_model.model.pack_image_features([coordinates], sizes, "default", image_newline=newline)
    patches = layout.newline == 0
    ours = torch.stack([layout.tile, layout.y, layout.x], -1).float()
    assert len(layout) == len(packed[0])
    assert torch.equal(ours[patches], packed[0][patches])
    assert (packed[0][~patches] == -1).all()
    # a newline token stands one past the patch before it
    ends = (~patches).nonzero().squeeze(1)
    ends = ends[layout.newline[ends - 1] == 0]
    ends = ends[ends > side * side]
    assert torch.equal(layout.x[ends], layout.x[ends - 1] + 1) and torch.equal(layout.tile[ends], layout.tile[ends - 1])


def test_llava_layout_follows_the_pixels() -> None:
    model = tiny.llava()
    layouts = find_adapter(model).layouts(model, {"pixel_values": torch.zeros(2, 3, tiny.SIDE, tiny.SIDE)})
    layouts = layouts[tiny.IMAGE_ID]
    assert [len(layout) for layout in layouts] == tiny.lengths(model, {"pixel_values": torch.zeros(2, 3, 24, 24)})
    assert layouts[0].y.tolist() == [i // 6 for i in range(36)] and layouts[0].x.tolist() == [i % 6 for i in range(36)]


@pytest.fixture(scope="module")
def onevision() -> Any:
    return tiny.llava_onevision()


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 400), st.integers(8, 400))
def test_anyres_max_layout(onevision: Any, height: int, width: int) -> None:
    """Canvas rows and columns sent through transformers' packing; where it scales down, ours are the nearest cells'."""
    sizes = torch.tensor([[height, width]])
    layout = LlavaOnevision().layouts(onevision, {"pixel_values": torch.zeros(1), "image_sizes": sizes})
    ours, side = layout[tiny.IMAGE_ID][0], tiny.SIDE // tiny.PATCH
    rows, columns = ours.crops
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    canvas = torch.stack([y, x], -1).view(rows, side, columns, side, 2).transpose(1, 2).reshape(-1, side * side, 2)
    everything = torch.cat([torch.zeros(1, side * side, 2), canvas.float()])
    newline = torch.full((2,), -9.0)
    packed = onevision.model.pack_image_features([everything], sizes, newline, "anyres_max_2")[0][0]
    assert len(ours) == len(packed)
    body = torch.arange(len(ours)) >= side * side
    ends = ours.newline.bool()
    assert torch.equal(ends, packed[:, 0] == -9) and not ends[~body].any()
    patches = body & ~ends
    crop = ours.tile[patches] - 1
    got = torch.stack([crop // columns * side + ours.y[patches], crop % columns * side + ours.x[patches]], -1)
    assert (got - packed[patches]).abs().max() <= 0.5 + 1e-3 if patches.any() else True
    assert ours.y.max() < side and (ours.x - ours.newline).max() < side


def test_a_row_of_several_onevision_images(onevision: Any) -> None:
    """With batch_num_images, images that share a row are one tile and a newline each; those alone have crops."""
    sizes = torch.tensor([(40, 40), (20, 44), (48, 24)])
    images = {"pixel_values": torch.randn(3, 5, 3, 24, 24), "image_sizes": sizes}
    counts = torch.tensor([2, 1])
    with torch.no_grad():
        made = onevision.model.get_image_features(**images, batch_num_images=counts).pooler_output
    layouts = LlavaOnevision().layouts(onevision, {**images, "batch_num_images": counts})[tiny.IMAGE_ID]
    assert [len(layout) for layout in layouts] == [len(tokens) for tokens in made]
    assert layouts[0].newline.tolist() == [0] * 36 + [1] and layouts[2].crops != (0, 0)


def test_video_frames_are_tiles(onevision: Any) -> None:
    model = vtr.patch(tiny.llava_onevision())
    inputs = tiny.batch(model, [["ab", tiny.VIDEO, "what"], ["a", tiny.IMAGE, "b", tiny.VIDEO, "which"]])
    layout = LlavaOnevision().layouts(model, inputs)[tiny.VIDEO_ID][0]
    assert layout.tile.tolist() == [frame for frame in range(3) for _ in range(9)] + [2]
    assert layout.newline.tolist() == [0] * 27 + [1] and layout.grid == (3, 3)
    out = tiny.generate(model, inputs, policy=["fastv:keep=0.5", "uniform:keep=0.3"], max_new_tokens=3)
    rows = vtr.report(model).rows
    assert rows[0].vision_tokens == [28, 28, 14, 14, 14]
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (2, 3), (3, 2), (1, 6), (3, 4)])
def test_internvl_crops_are_put_where_they_were(rows: int, columns: int) -> None:
    """The picture is cut and shrunk as the processor does; only the pixels say how it was cut."""
    made = torch.Generator().manual_seed(rows * 10 + columns)
    coarse = torch.rand(1, 3, 5, 5, generator=made)
    canvas = torch.nn.functional.interpolate(coarse, (rows * 56, columns * 56), mode="bilinear")[0]
    crops = canvas.unflatten(2, (columns, 56)).unflatten(1, (rows, 56)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    thumbnail = torch.nn.functional.interpolate(canvas[None], (56, 56), mode="bicubic", antialias=True)
    assert crops_of(torch.cat([crops, thumbnail])) == (rows, columns)


def test_internvl_layout() -> None:
    """Tiles in the order of pixel_values, 3 × 3 tokens each after the pixel shuffle, thumbnail last and numbered 0."""
    model = tiny.internvl()
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "cd", tiny.IMAGE, "e"]])
    first, second = InternVL().layouts(model, inputs)[tiny.IMAGE_ID]
    assert first.tile.tolist() == [tile for tile in (1, 2, 3, 4, 0) for _ in range(9)] and first.grid == (3, 3)
    assert first.crops[0] * first.crops[1] == 4 and second.crops == (0, 0)
    assert second.tile.tolist() == [0] * 9 and second.y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    coordinates = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1)[None].float()
    shuffled = model.model.pixel_shuffle(coordinates, 0.5).view(9, 4, 2)
    assert torch.equal(shuffled.mean(1), torch.stack([second.y, second.x], -1) * 2 + 0.5)


@pytest.mark.parametrize("tokens", [8, 18])
def test_internvl_runs_that_are_no_image(tokens: int) -> None:
    model = vtr.patch(tiny.internvl())
    ids = torch.tensor([[1, 6, *[tiny.IMAGE_ID] * tokens, 7, 9]])
    with pytest.raises(ValueError, match="not the tiles of one image"):
        model(input_ids=ids, pixel_values=torch.randn(max(tokens // 9, 1), 3, 24, 24), policy="random:keep=0.5")


def test_full_features_of_clip_are_refused() -> None:
    model = tiny.llava()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(vtr.UnsupportedError, match="use 'default'"):
        find_adapter(model).layouts(model, {"pixel_values": torch.zeros(1, 3, 24, 24)})


def test_every_family_says_its_classes() -> None:
    assert families()["LLaVA-NeXT"] == ("LlavaNextForConditionalGeneration",)


def test_a_checkpoint_in_the_usual_layout_loads(tmp_path: Any) -> None:
    """from_pretrained of a saved folder through the Auto class, then patched, as a user does."""
    from transformers import AutoModelForImageTextToText

    made = tiny.llava_next()
    made.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    model.generation_config.eos_token_id = None
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "cd"]])
    want = tiny.generate(vtr.patch(made), inputs, policy="fastv:keep=0.3", max_new_tokens=4)
    assert torch.equal(tiny.generate(vtr.patch(model), inputs, policy="fastv:keep=0.3", max_new_tokens=4), want)
