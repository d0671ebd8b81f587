"""Weights in a byte a number, and models kept as what training changed of another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import vtr
from vtr.cli import app
from vtr.pocket import MODELS, TRAINED_ON, changes
from vtr.pocket.changes import FILE, WHOLE, leave_only, load_model, of, pack, put_on, unpack


@pytest.fixture
def weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 40, generator=draw) * torch.logspace(-9, 6, 7)[:, None]
    matrix[3] = 0
    return {
        "matrix": matrix,
        "kernel": torch.randn(3, 2, 4, 4, generator=draw),
        "vector": torch.randn(5, generator=draw),
    }


# -- packing -----------------------------------------------------------------------------------------------------------
def test_what_is_packed_comes_back(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Vectors as they were, a matrix's numbers to half a scale, rows of zeros and tiny ones too."""
    pack(weights, tmp_path / "w")
    stored, found = load_file(tmp_path / "w"), unpack(tmp_path / "w")
    assert found.keys() == weights.keys() and all(tensor.dtype == torch.float32 for tensor in found.values())
    assert torch.equal(found["vector"], weights["vector"])
    for name in ("matrix", "kernel"):
        assert stored[name].dtype == torch.int8 and stored[name + ".scale"].dtype == torch.float16
        off, largest = ((found[name] - weights[name]).flatten(1).abs().amax(1), weights[name].flatten(1).abs().amax(1))
        assert found[name].shape == weights[name].shape and bool((off <= largest / 250 + 6e-8).all()), name
    assert not found["matrix"][3].any() and bool(found["matrix"][2].any())
    pack({"turned": weights["matrix"].T}, tmp_path / "turned")
    assert unpack(tmp_path / "turned")["turned"].shape == (40, 7)
    pack({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "half")
    assert torch.equal(unpack(tmp_path / "half")["vector"], weights["vector"].bfloat16().float())


def test_what_was_unpacked_is_packed_alike(weights: dict[str, Tensor], tmp_path: Path) -> None:
    pack(weights, tmp_path / "w")
    pack(unpack(tmp_path / "w"), tmp_path / "again")
    once, twice = load_file(tmp_path / "w"), load_file(tmp_path / "again")
    assert all(torch.equal(once[name], twice[name]) for name in weights if name != "matrix")
    assert torch.equal(once["matrix"][3:], twice["matrix"][3:])  # the rows before are as small as float16's steps


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"w.scale": torch.ones(2)}, "names that end in"),
        ({"w": torch.tensor([[1.0, torch.nan]])}, "NaN or infinite values in w"),
        ({"w": torch.full((1, 2), 1e8)}, "NaN or infinite values in w.scale"),
    ],
)
def test_what_cannot_be_packed(more: dict[str, Tensor], told: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        pack(weights | more, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_what_cannot_be_unpacked(weights: dict[str, Tensor], tmp_path: Path) -> None:
    pack(weights, tmp_path / "w")
    stored = load_file(tmp_path / "w")
    for wrong in ({"matrix.scale": stored["matrix.scale"][1:]}, {"matrix": stored["matrix"][0]}):
        save_file(stored | wrong, tmp_path / "wrong")
        with pytest.raises(ValueError, match="matrix is int8 without a scale for each row"):
            unpack(tmp_path / "wrong")
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-9])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        unpack(tmp_path / "w")
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "gone")


# -- changes -----------------------------------------------------------------------------------------------------------
def test_changes_put_on_give_what_was_trained() -> None:
    base = {"same": torch.ones(2), "table": torch.ones(2, 3).half(), "matrix": torch.arange(4.0).view(2, 2)}
    trained = base | {"table": torch.full((4, 3), 2.0).half(), "matrix": base["matrix"] + 0.5}
    found = of(trained, base)
    assert set(found) == {"table", "matrix"}
    assert found["table"].tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2  # new rows are changes of zeros
    again = put_on(base, found)
    assert again.keys() == base.keys() and all(torch.equal(again[name], trained[name].float()) for name in base)


@pytest.mark.parametrize(
    "trained",
    [
        {"m": torch.zeros(2, 3), "more": torch.zeros(1)},
        {"m": torch.zeros(2, 4)},
        {"m": torch.zeros(1, 3)},
        {"m": torch.zeros(3)},
    ],
)
def test_what_are_no_changes_of_a_base(trained: dict[str, Tensor]) -> None:
    base = {"m": torch.ones(2, 3)}
    with pytest.raises(ValueError, match="no such tensors"):
        of(trained, base)
    with pytest.raises(ValueError, match="no such tensors"):
        put_on(base, trained)
    with pytest.raises(ValueError, match="m: in the base but not"):
        of({}, base)


# -- the shipped ones --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", TRAINED_ON)
def test_the_shipped_changes(family: str, tmp_path: Path) -> None:
    """The tower is the base's number for number; the other dtypes round once; saved whole, it is the same model."""
    model, processor = vtr.pocket.load(family)
    base = vtr.pocket.load(TRAINED_ON[family])[0]
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, base.model.vision_tower.state_dict()[name]), name
    layer = "model.language_model.layers.5.mlp.up_proj.weight"
    assert not torch.equal(model.get_parameter(layer), base.get_parameter(layer))
    half = vtr.pocket.load(family, torch.bfloat16)[0]
    assert torch.equal(half.get_parameter(layer), model.get_parameter(layer).bfloat16())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    whole, _ = vtr.pocket.load(family, folder=tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name
    assert whole.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()


def test_a_whole_checkpoint_becomes_changes_and_comes_back(tmp_path: Path) -> None:
    family, base = "video", MODELS[TRAINED_ON["video"]]
    model, processor = vtr.pocket.load(family)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    leave_only(tmp_path, base)
    assert not (tmp_path / WHOLE).exists() and (tmp_path / FILE).stat().st_size < 3e6
    again, _ = vtr.pocket.load(family, folder=tmp_path)
    for name, weight in model.state_dict().items():  # what went through int8 once goes through it unharmed
        torch.testing.assert_close(again.state_dict()[name], weight, atol=1e-5, rtol=0)


def test_changes_of_another_base_are_refused(tmp_path: Path) -> None:
    ours = Path(changes.__file__).parent / "video" / "weights"
    with pytest.raises(ValueError, match=r"changes of another model\.safetensors than .*train it again"):
        load_model(ours, MODELS["llava-next"])
    shutil.copytree(ours, tmp_path / "w")
    pack({}, tmp_path / "w" / FILE)  # nothing says which base
    with pytest.raises(ValueError, match="train it again"):
        vtr.pocket.load("video", folder=tmp_path / "w")


def test_changes_are_no_whole_checkpoint() -> None:
    for family in TRAINED_ON:
        with pytest.raises(ValueError, match=rf"no whole checkpoint.*load\('{family}'\)"):
            vtr.pocket.checkpoint(family)
    shown = CliRunner().invoke(app, ["serve", "pocket-shots", "--upstream", "http://127.0.0.1:9"])
    assert shown.exit_code == 1 and "save_pretrained" in shown.output
