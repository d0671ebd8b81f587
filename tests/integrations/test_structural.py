"""Models that no adapter was written for: what is read off them, and what is not believed untested."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.grids import layouts_of, rows_of_tokens
from vtr.integrations.structural import Structural, decoder_of

import vtr
from tests import stranger
from tests.loads import NOISE, close, snapshot
from vtr.engine import selftest
from vtr.engine.adapters import find_adapter


@pytest.fixture(scope="module")
def words() -> Any:
    return stranger.processor()


@pytest.fixture
def model(words: Any) -> Any:
    return stranger.model(words.tokenizer)


def ask(
    model: Any, words: Any, policy: Any = None, sides: tuple[tuple[int, int], ...] = ((40, 40), (90, 40))
) -> Tensor:
    """Logits of three tokens, [steps, rows, vocabulary], of a picture a row."""
    inputs = pictures(words, sides)
    out = model.generate(
        **inputs, policy=policy, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    return torch.stack(out.logits)


def pictures(words: Any, sides: tuple[tuple[int, int], ...]) -> Any:
    from PIL import Image

    drawn = [Image.linear_gradient("L").convert("RGB").resize(side) for side in sides]
    return vtr.chat.encode(words, ["what color is the star"] * len(sides), drawn)


# -- what is found
def test_parts_are_found(model: Any) -> None:
    adapter = find_adapter(model)
    assert isinstance(adapter, Structural)
    assert adapter.text_model(model) is decoder_of(model) is model.model.language_model
    assert adapter.tower(model) is model.model.vision_tower
    assert adapter.projector(model) is model.model.multi_modal_projector
    assert adapter.placeholders(model) == (model.config.image_token_id,)


def test_every_tile_is_a_grid(model: Any, words: Any) -> None:
    inputs = pictures(words, ((90, 40),))
    (layouts,) = Structural(model).layouts(model, inputs).values()
    assert len(layouts) == len(inputs["pixel_values"]) > 1
    assert {layout.grid for layout in layouts} == {(4, 4)}


@pytest.mark.parametrize("policy", ["fastv:keep=0.25", "m3:tokens=4", "divprune:keep=0.5", "vscan:keep=0.5"])
def test_rows_are_as_alone(model: Any, words: Any, policy: str) -> None:
    untouched = ask(copy.deepcopy(vtr.patch(model)), words)
    mixed = ask(model, words, [policy, None])
    close(mixed[:, 1], untouched[:, 1])
    close(mixed[:, 0], ask(model, words, policy, sides=((40, 40),))[:, 0])
    assert not torch.allclose(mixed[:, 0], untouched[:, 0], atol=NOISE)


def test_describes_itself(model: Any) -> None:
    said = vtr.describe(vtr.patch(model))
    assert (said.family, said.path, said.placeholders) == ("by structure", "packed", (model.config.image_token_id,))
    assert said.off is not None and said.off < 1e-5
    assert "visionzip" in said.cannot and "fastv" not in said.cannot
    assert "Cohere2Model, 4 layers: 3 sliding, 1 full" in str(said)


def test_patch_tells_what_it_found(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    vtr.patch(model, verbose=True)
    assert capsys.readouterr().out == f"{vtr.describe(model)}\n"


def test_models_without_images_are_not_served(words: Any) -> None:
    text = stranger.model(words.tokenizer).model.language_model
    with pytest.raises(vtr.UnsupportedError, match="no model family vtr knows"):
        find_adapter(text)


# -- what is tested
def mix_tokens(module: Any, args: Any, out: Tensor) -> Tensor:
    """What no packed engine can know of: a layer that adds the mean over all tokens it gets."""
    return out + out.mean(dim=(0, 1), keepdim=True)


def test_a_decoder_that_is_run_wrongly_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_passed", {})
    model.model.language_model.layers[1].register_forward_hook(mix_tokens)
    before = snapshot(model)
    with pytest.raises(vtr.UnsupportedError, match=r"AyaVisionForConditionalGeneration.* differ"):
        vtr.patch(model)
    assert snapshot(model) == before
    vtr.patch(model, self_test=False)
    assert vtr.describe(model).off is None


def test_a_test_that_cannot_run_says_so(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_passed", {})
    model.model.language_model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(vtr.UnsupportedError, match=r"cannot be tested.*ZeroDivisionError.*self_test=False"):
        vtr.patch(model)


def test_models_alike_are_tested_once(model: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_passed", {})
    vtr.patch(model)
    monkeypatch.setattr(selftest, "_difference", None)  # may not be asked again
    assert vtr.describe(vtr.patch(stranger.model(words.tokenizer))).off == vtr.describe(model).off


def test_the_test_leaves_a_model_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_passed", {})
    model.train()
    model.model.vision_tower.eval()
    drawn = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    vtr.patch(model)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(drawn, torch.get_rng_state())
    with pytest.raises(ValueError, match="nothing to report"):
        vtr.report(model)


def test_a_model_without_weights_is_not_tested(model: Any) -> None:
    assert vtr.describe(vtr.patch(model.to("meta"))).off is None
    assert "not run" in str(vtr.describe(model))


# -- grids
CONFIG = SimpleNamespace(vision_config=SimpleNamespace(patch_size=4))


def grids(inputs: dict[str, Any], *runs: tuple[int, int, int], kind: str = "image") -> list[tuple[int, int]] | None:
    found = layouts_of(CONFIG, inputs, runs, kind)
    return None if found is None else [layout.grid for layout in found]


def test_grids_of_patches_before_they_are_merged() -> None:
    inputs = {"image_grid_thw": torch.tensor([[1, 4, 12], [1, 8, 4]])}
    assert grids(inputs, (0, 3, 15), (0, 17, 25)) == [(2, 6), (4, 2)]
    assert grids(inputs, (0, 3, 23)) == [(2, 6), (4, 2)]  # nothing between the two
    assert grids(inputs, (0, 3, 51), (1, 0, 32)) == [(4, 12), (8, 4)]
    assert grids(inputs, (0, 0, 10), (1, 0, 10)) is None  # as many tokens, but an image in two rows


def test_sides_that_no_merge_divides_are_filled_up() -> None:
    assert grids({"spatial_shapes": torch.tensor([[5, 7]])}, (0, 0, 12)) == [(3, 4)]
    assert grids({"target_sizes": [torch.tensor([[8, 16]])]}, (0, 0, 8)) == [(2, 4)]


def test_rows_of_patches_with_tokens_between_them() -> None:
    runs = [(0, 5, 8), (0, 9, 12)]
    assert grids({"image_sizes": torch.tensor([[16, 24]])}, *runs) == [(2, 3)]


def test_positions_of_patches() -> None:
    y, x = torch.meshgrid(torch.arange(6), torch.arange(9), indexing="ij")
    padded = torch.cat([torch.stack([x, y], -1).flatten(0, 1), torch.full((5, 2), -1)])[None]
    assert grids({"image_position_ids": padded}, (0, 2, 8)) == [(2, 3)]


def test_tiles_of_one_size() -> None:
    assert grids({"pixel_values": torch.zeros(3, 3, 32, 32)}, (0, 0, 16), (0, 20, 52)) == [(4, 4)] * 3
    assert grids({"pixel_values": torch.zeros(1, 4, 3, 16, 32)}, (0, 0, 8)) == [(2, 4)]  # three tiles of padding
    assert grids({"pixel_values": torch.zeros(1, 3, 32, 32)}, (0, 0, 17)) is None
    assert grids({"pixel_values": torch.zeros(64, 588)}, (0, 0, 64)) is None


def test_videos() -> None:
    inputs = {"video_grid_thw": torch.tensor([[3, 4, 4]])}
    (film,) = layouts_of(CONFIG, inputs, [(0, 0, 12)], "video") or []
    assert film.frame.unique().tolist() == [0, 1, 2] and film.grid == (2, 2)
    frames = layouts_of(CONFIG, inputs, [(0, 0, 4), (0, 6, 10), (0, 12, 16)], "video") or []
    assert [frame.first_frame for frame in frames] == [0, 1, 2]


def test_where_nothing_is_known_a_run_is_a_row() -> None:
    (row,) = rows_of_tokens([(0, 3, 19)])
    assert row.grid == (1, 16) and not row.known


def test_learned_queries_have_no_place(model: Any, words: Any) -> None:
    class PerceiverResampler(torch.nn.Module):
        pass

    model.model.add_module("resampler", PerceiverResampler())
    (layouts,) = Structural(model).layouts(model, pictures(words, ((40, 40),))).values()
    assert not layouts[0].known


@pytest.mark.parametrize("policy", ["m3:tokens=4", "pool:grid=2"])
def test_policies_that_need_a_grid_say_so(model: Any, policy: str) -> None:
    mark = model.config.image_token_id
    ids = torch.tensor([[10, *[mark] * 16, 11]])
    with pytest.raises(ValueError, match="nothing in the inputs says how"):
        vtr.patch(model).generate(input_ids=ids, policy=policy, max_new_tokens=1)
