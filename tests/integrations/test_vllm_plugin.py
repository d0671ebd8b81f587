"""The plugin's pure parts: what a request may ask for, how many embeddings that is, names in caches."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vtr.eval.accuracy.blind  # "diverse"
from vtr.integrations.vllm import layouts
from vtr.integrations.vllm.specs import (
    LONGEST,
    RequestError,
    identity,
    made_of,
    packed,
    promised,
    read,
    spec_of,
    unpacked,
)

import vtr
from vtr.engine.adapters import find_adapter
from vtr.engine.tower import cls_scores, layers_of
from vtr.testing import tiny

EXACT = 'globalcom2:retention=0.3,budget="exact"'


def test_vtr_does_not_import_vllm() -> None:
    code = (
        "import vtr, vtr.cli, vtr.integrations.vllm, vtr.integrations.vllm.gateway, vtr.integrations.vllm.layouts, sys;"
    )
    code += "assert not [m for m in sys.modules if m.split('.')[0] == 'vllm'], 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("value", "images", "specs"),
    [
        (None, 2, ["none"] * 2),
        ("none", 1, ["none"]),
        ("m3:tokens=36", 2, ["m3:tokens=36"] * 2),
        ("m3", 1, ["m3:tokens=36"]),
        (" m3: tokens=9", 1, ["m3:tokens=9"]),
        ("m3:tokens=[36,9]", 2, ["m3:tokens=36", "m3:tokens=9"]),
        (["m3:tokens=36", None, EXACT], 3, ["m3:tokens=36", "none", EXACT]),
        ("globalcom2:retention=0.3,budget=exact", 1, [EXACT]),
        ("m3:tokens=36", 0, []),
    ],
)
def test_every_image_has_a_spec(value: Any, images: int, specs: list[str]) -> None:
    assert read(value, images, 10) == specs


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nonsense", "unknown policy 'nonsense'; known: "),
        ("m3:tokens", "tokens must be a count per tile"),
        ("m3:36,tokens", "write name:key=value"),
        ("m3:tokens=0", "at least 1 token"),
        ("m3:grid=4", "has no setting 'grid'"),
        (7, "must be a spec string"),
        ({"policy": "m3"}, "must be a spec string"),
        ([36, 9], "is a spec string"),
        (["m3", "m3", "m3"], "3 policies, but the request has 2 images"),
        ("m3:tokens=[36,9,1]", "names 3 scales, but the row has 2 images"),
        ("m3:tokens=" + "9" * LONGEST, "at most 500 characters"),
        ("globalcom2:retention=0.3", 'use globalcom2:retention=0.3,budget="exact"'),
        ("globalcom2:retention=2", "must be a float"),
        ("fastv:keep=0.25,layer=2", '0.4 of the tokens over 10 layers.*globalcom2:retention=0.4,budget="exact"'),
        ("gsearch:schedule=[1.0,1.0,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5]", "retention=0.6,"),
        ("gsearch", "use a policy before it, e.g. m3:tokens=36"),
        ("pyramid", '0.438 of the tokens over 10 layers.*globalcom2:retention=0.4375,budget="exact"'),
        ("diverse:keep=0.2,layer=2", "0.36 of the tokens over 10 layers.*retention=0.36,"),
        ("pmod", "retention=0.5"),
        ("dynamic-llava:keep=0.2,layer=2", "retention=0.36,"),
        ("uniform:keep=0.25", "use uniform:keep=0.25,before_decoder=true"),
        ("random:keep=9,seed=3", "use random:keep=9,seed=3,before_decoder=true"),
        ("uniform:keep=0.25,layer=1", "retention=0.325,"),
        ("m3:tokens=36+fastv", "ask for m3:tokens=36 alone"),
        ("autoscale", "tries answers"),
        ('auto:choices=["m3:9","none"]', "tries answers"),
        ("pmod:weights=/etc", "cannot name files"),
        ("dynamic-llava:weights=/etc", "cannot name files"),
        ("gsearch:schedule=/etc/passwd", "cannot name files"),
        ("pmod:/etc", "cannot name files"),
        ("gsearch:/etc/passwd", "cannot name files"),
        ("chain:policies=[]", "cannot name files"),
        ("cdpruner:keep=0.5,text_tower=/etc", "cannot name files"),
        ("trim:text_tower=some/name", "cannot name files"),
        ("mmtok", "looks at the question, but vLLM encodes an image once"),
        ("fastervlm", "reads attention inside the vision tower"),
        ("visionzip", "reads states inside the vision tower"),
    ],
)
def test_what_cannot_be_served_says_what_can(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(value, 2, 10)


@pytest.mark.parametrize(
    ("spec", "share"),
    [
        ("fastv:keep=0.25,layer=2", 0.2969),
        ("gsearch:schedule=llava-1.5-7b", None),
        ("pyramid", 0.4688),
        ("pmod", None),
        ("dynamic-llava:keep=0.2,layer=16", 0.6),
        ("diverse:keep=0.0625,layer=2", 0.1211),
    ],
)
def test_the_suggestion_has_the_same_mean_budget(spec: str, share: float | None) -> None:
    """On 32 layers, by what a row of 2880 tokens is counted as; docs/serving.md has these numbers."""
    with pytest.raises(RequestError) as error:
        spec_of(spec, 32)
    found = re.search(r'globalcom2:retention=([\d.]+),budget="exact"; or run (\S+) with vtr', str(error.value))
    assert found and found[2] == spec.split(":")[0]
    entering = vtr.policy(spec).entering(32, 2880)
    assert float(found[1]) == pytest.approx(sum(entering) / (32 * 2880), abs=1e-4)
    assert share is None or float(found[1]) == pytest.approx(share, abs=1e-4)


def test_no_file_is_looked_at(tmp_path: Path) -> None:
    """The same words for a folder that is there and one that is not."""
    said = []
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(RequestError) as error:
            spec_of(f"pmod:weights={folder}", 10)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_what_is_suggested_can_be_asked_for() -> None:
    for spec in ("fastv:keep=0.25", "pyramid", "uniform:keep=0.3", "random:keep=0.1,layer=2", "pmod", "globalcom2"):
        with pytest.raises(RequestError) as error:
            spec_of(spec, 10)
        words = [word.strip(";.,") for word in str(error.value).split()]
        named = [w for w in words if w.startswith(("globalcom2:", "uniform:", "random:")) and w != spec]
        assert spec_of(named[-1], 10) == named[-1]


def test_identity() -> None:
    names = [identity(image, spec) for image in ("a", "b") for spec in ("none", "m3:tokens=9", "m3:tokens=36")]
    assert len(set(names)) == 6 and names[0] == identity("a", "none")


def test_a_new_version_is_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity("a", "m3:tokens=9")
    monkeypatch.setattr("vtr.integrations.vllm.specs.VERSION", "another")
    assert identity("a", "m3:tokens=9") != before


def test_what_goes_with_an_image() -> None:
    for spec in ("none", EXACT, "m3:tokens=36"):
        assert unpacked(packed(spec, 97)) == (spec, 97)


# -- counts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layouts_are_the_adapters(family: str) -> None:
    """From sizes alone the same tokens at the same places as the adapters see in a call."""
    model = getattr(tiny, family)()
    if family == "llava_onevision":  # vLLM knows no other than anyres_max_9
        model.config.vision_aspect_ratio = "anyres_max_9"
    rows = [["a", tiny.IMAGE, "b"], [tiny.IMAGE], ["c", tiny.IMAGE]]
    if family == "llava_onevision":
        inputs = {**tiny._images(model, 3, 0), "input_ids": torch.zeros(1, 1)}
    else:
        inputs = tiny.batch(model, rows)
    found = find_adapter(model).layouts(model, inputs)[tiny.IMAGE_ID]
    sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else [[24, 24]] * 3
    of = getattr(layouts, family)
    for layout, (height, width) in zip(found, sizes, strict=True):
        mine = of(model.config, (height, width), layout.tiles)
        assert len(mine) == len(layout) and mine.grid == layout.grid
        for name in ("tile", "y", "x", "newline"):
            assert torch.equal(getattr(mine, name), getattr(layout, name))
        for spec in ("none", EXACT, "cls:keep=3", "uniform:keep=0.4,before_decoder=true", "pool:grid=2", "m3:tokens=1"):
            assert layouts.count_of(spec, mine) == promised(spec, layout) > 0


def test_a_policy_that_gives_another_number_is_noticed_beforehand() -> None:
    from dataclasses import dataclass

    @vtr.register_policy("test-more")
    @dataclass
    class More(vtr.Policy):
        keep: int = 3

        def kept_of(self, layout: Any) -> int:
            return self.keep

        def compress(self, image: vtr.Image) -> torch.Tensor:
            return torch.arange(self.keep + 1)

    try:
        layout = layouts.llava(tiny.llava().config, (24, 24), 1)
        with pytest.raises(RequestError, match="promises 3 embeddings of this image and gives 4"):
            layouts.count_of(spec_of("test-more", 5), layout)
    finally:
        vtr.settings._POLICIES.pop("test-more")


@pytest.mark.parametrize("spec", ["cls:keep=0", "uniform:keep=0.0,before_decoder=true"])
def test_an_image_cannot_vanish(spec: str) -> None:
    layout = layouts.llava(tiny.llava().config, (24, 24), 1)
    with pytest.raises(RequestError, match="at least one must stay"):
        layouts.count_of(spec, layout)


@pytest.mark.parametrize(
    ("layer", "served"), [(-2, True), (-1, True), (-3, False), ([-2, -4], False), (2, True), (1, False)]
)
def test_cls_scores_need_the_last_layer(layer: Any, served: bool) -> None:
    vision = SimpleNamespace(model_type="clip_vision_model", num_hidden_layers=3)
    config = SimpleNamespace(vision_config=vision, vision_feature_layer=layer)
    layouts.check_tower(config, "m3:tokens=1")
    if served:
        layouts.check_tower(config, EXACT)
    else:
        with pytest.raises(RequestError, match="m3:tokens=36"):
            layouts.check_tower(config, EXACT)


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_scores_of_the_layer_that_is_kept_are_the_towers(family: str) -> None:
    """vLLM's towers are built otherwise, so the worker keeps the last layer by itself, and the engine asks that."""
    from vtr.integrations.vllm.worker import Last

    tower = getattr(tiny, family)().model.vision_tower
    layers = layers_of(tower)
    width = tower.config.hidden_size
    states = torch.randn(2, 10, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(cls_scores(Last(layers[-1]), states)[0], cls_scores(tower, states)[0])


def test_specs_are_made_once() -> None:
    assert made_of("m3:tokens=9") is made_of("m3:tokens=9") and made_of("none") is None
