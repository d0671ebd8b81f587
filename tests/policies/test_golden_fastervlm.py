"""FasterVLM against the numbers of the official code (Theia-4869/FasterVLM)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtr
from tests import official
from tests.policies.encoder import each_tile, layout_of
from tests.seen import GivenTower, seen
from vtr.policies.picture._saliency import saliency

META = official.meta("fastervlm")


def cases(file: str) -> Any:
    return pytest.mark.parametrize("case", [c for c in META["cases"] if c["file"] == file], ids=lambda c: c["case"])


def given(case: dict[str, Any]) -> dict[str, Tensor]:
    prefix = case["case"] + "."
    return {k.removeprefix(prefix): v for k, v in official.tensors("fastervlm", case["file"]).items()
            if k.startswith(prefix)}  # fmt: skip


@cases("unit")
def test_kept_patches(case: dict[str, Any]) -> None:
    numbers = given(case)
    heads = numbers["attention_heads"]
    official.close(saliency(GivenTower(from_cls={None: heads})), numbers["attention_mean"], 1e-6)
    kept = each_tile(
        vtr.FasterVLM(case["T"]), numbers["features"], lambda i: GivenTower(from_cls={None: heads[i : i + 1]})
    )
    assert torch.equal(kept, numbers["mask"])


@cases("embeds")
def test_prompts(case: dict[str, Any]) -> None:
    """A row of the batch is its text, with the picture's kept tokens in the placeholder's stead."""
    numbers, policy = given(case), vtr.FasterVLM(case["T"], placement="official")
    layout, ids = layout_of(case), numbers["input_ids"]
    per_row = layout.tiles
    for row, want in enumerate(numbers["inputs_embeds"]):
        part = slice(row * per_row, (row + 1) * per_row)
        tower = GivenTower(from_cls={None: numbers["attention_heads"][part]})
        image = seen(numbers["features"][part], layout, tower, numbers["image_newline"])
        answer = policy.compress(image)
        kept = image.features[answer.sort().values] if isinstance(answer, Tensor) else answer.features
        at = ids[row].tolist().index(official.IMG)
        text = numbers["embed_tokens"][ids[row].clamp(min=0)]
        official.close(torch.cat([text[:at], kept, text[at + 1 :]]), want)
        assert len(kept) == policy.kept_of(layout) == numbers["mask"][part].sum()


@cases("e2e")
def test_from_pixels(case: dict[str, Any]) -> None:
    """The official tower in a LLaVA: its features, its attention, and which of its tokens enter the text model."""
    numbers, model = given(case), tiny_llava()
    count, side = case["tiles"], numbers["mask"].shape[1]
    ids = torch.tensor([[1, *[model.config.image_token_id] * (count * side), 2]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": numbers["pixel_values"]}
    with torch.no_grad():
        tower = model.model.vision_tower(numbers["pixel_values"], output_hidden_states=True)
        projected = model.model.multi_modal_projector(numbers["tower_features"])
    official.close(tower.hidden_states[-2][:, 1:], numbers["tower_features"], 1e-5)
    embeds, _ = official.run(model, inputs, vtr.FasterVLM(case["T"]))
    official.close(embeds[0, 1:-1], projected[numbers["mask"]], 1e-4)


def tiny_llava() -> Any:
    """A LLaVA whose vision tower has the official weights."""
    vision = CLIPVisionConfig(**META["e2e_vision_config"])
    text = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    at = {"image_token_index": 31, "vision_feature_layer": -2}
    made: Any = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **at))
    weights = official.tensors("fastervlm", "e2e_weights")
    weights = {name.rpartition("vision_model.")[2]: tensor for name, tensor in weights.items()}
    made.model.vision_tower.load_state_dict({k: v for k, v in weights.items() if "position_ids" not in k})
    made.set_attn_implementation("eager")
    return vtr.patch(made.eval())


def test_true_placement_keeps_newlines_and_no_padding() -> None:
    case = next(c for c in META["cases"] if c["file"] == "embeds" and c["grid_wh"] is not None)
    numbers, layout = given(case), layout_of(case)
    image = seen(numbers["features"], layout, GivenTower(from_cls={None: numbers["attention_heads"]}))
    policy = vtr.FasterVLM(case["T"])
    kept = policy.compress(image)
    assert isinstance(kept, Tensor) and len(kept.unique()) == len(kept) == policy.kept_of(layout)
    assert layout.newline[kept].sum() == layout.newline.sum()


def test_a_tower_without_cls_token_is_read_by_what_patches_get() -> None:
    scores = torch.rand(1, 16, generator=torch.Generator().manual_seed(0))
    image = seen(torch.zeros(1, 16, 4), tower=GivenTower(received={None: scores}, with_cls=False))
    kept = vtr.FasterVLM(3).compress(image)
    assert isinstance(kept, Tensor) and sorted(kept.tolist()) == vtr.top(scores[0], 3).tolist()
