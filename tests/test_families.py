"""Layouts against transformers' own packing: coordinates are sent through it as if they were features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vtr.integrations.llava_next import LlavaNext

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
    layout = LlavaNext().layouts(next_model, {"pixel_values": torch.zeros(1), "image_sizes": sizes})[0]
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
    assert [len(layout) for layout in layouts] == tiny.lengths(model, {"pixel_values": torch.zeros(2, 3, 24, 24)})
    assert layouts[0].y.tolist() == [i // 6 for i in range(36)] and layouts[0].x.tolist() == [i % 6 for i in range(36)]


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
