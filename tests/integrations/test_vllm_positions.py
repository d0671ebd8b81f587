"""The plugin's pure parts for Qwen-VL, Idefics3 and SmolVLM: whose tokens are known from sizes, and their positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vtr.integrations.idefics3 import Idefics3
from vtr.integrations.llava import tile_layout
from vtr.integrations.vllm import ARCHITECTURES, layouts, positions, start
from vtr.integrations.vllm.specs import RequestError, made_of, spec_of

import vtr
from tests.families import FAMILIES
from tests.tiny import IMAGE, IMAGE_ID

QWEN = {family.kind: family for family in FAMILIES if family.kind.startswith("qwen")}
ROWS = [["what", IMAGE, "is", IMAGE, "there"], [IMAGE, IMAGE], ["look", IMAGE]]
KNOWN = [
    "uniform:keep=0.3,before_decoder=true", "random:keep=5,before_decoder=true", "pool:grid=2", "pool:grid=[2,1]",
    "m3:tokens=6",
]  # fmt: skip
"""m3: a scale of 4 × 6 and of 6 × 4 tokens, the first two pictures."""


@pytest.fixture(scope="module", params=list(QWEN))
def qwen(request: pytest.FixtureRequest) -> Any:
    family = QWEN[request.param]
    model = family.make()
    vtr.patch(model)
    return family, model


def of_prompt(model: Any, ids: list[int], grids: list[tuple[int, int]], spec: str) -> tuple[torch.Tensor, int]:
    """As the plugin's model does with vLLM's own positions, here those of transformers: positions, decode's delta."""
    reduced: list[int] = []
    cuts, at, left = [], 0, list(grids)
    while at < len(ids):
        if ids[at] != IMAGE_ID:
            reduced.append(ids[at])
            at += 1
            continue
        layout = tile_layout(*left.pop(0))
        count = positions.count_of(spec, layout)
        cuts.append(positions.Cut(len(reduced), count, layout, spec))
        reduced += [IMAGE_ID] * count
        at += len(layout)
    tokens, begins = positions.lengthened(reduced, cuts, IMAGE_ID)
    assert tokens == ids
    given = torch.tensor([tokens])
    grid = torch.tensor([(1, 2 * h, 2 * w) for h, w in grids])
    whole, delta = model.model.get_rope_index(given, (given == IMAGE_ID).int(), grid)
    return positions.shortened(whole[:, 0], cuts, begins), int(delta) + len(ids) - len(reduced)


@pytest.mark.parametrize("spec", KNOWN)
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_positions_are_those_of_vtr_on_transformers(qwen: Any, spec: str, row: int) -> None:
    """Of every token of the prompt, and of those decoded behind it; also where a prompt ends in a picture."""
    family, model = qwen
    inputs = family.batch(model, [ROWS[row]])
    seen: list[torch.Tensor] = []
    rotary = model.model.language_model.rotary_emb

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((kwargs.get("position_ids") if len(args) < 2 else args[1]).clone())

    handle = rotary.register_forward_pre_hook(note, with_kwargs=True)
    try:
        family.generate(model, inputs, policy=spec, max_new_tokens=3, min_new_tokens=3)
    finally:
        handle.remove()
    made, delta = of_prompt(model, inputs["input_ids"][0].tolist(), family.grids(inputs), spec)
    prompt = next(one for one in seen if one.shape[-1] == made.shape[1])
    assert torch.equal(prompt[:3, 0] if prompt.ndim == 3 else prompt, made)
    first = next(one for one in seen if one.shape[-1] == 1)
    assert first.flatten().tolist() == [made.shape[1] + delta] * first.numel()


@pytest.mark.parametrize("spec", ["divprune", "cls:keep=5", "tome", 'globalcom2:retention=0.3,budget="exact"'])
@pytest.mark.parametrize("grid", [(4, 6), (8, 8), (40, 30)])
def test_policies_that_look_at_the_picture_are_refused_with_another(spec: str, grid: tuple[int, int]) -> None:
    layout = tile_layout(*grid)
    with pytest.raises(RequestError, match="depends on the picture") as error:
        positions.count_of(spec_of(spec, 4), layout)
    (other,) = [word.strip(",") for word in str(error.value).split() if word.startswith("uniform:")]
    assert positions.count_of(spec_of(other, 4), layout) == layouts.count_of(spec_of(spec, 4), layout)


@pytest.mark.parametrize("spec", [*KNOWN, "none", "downsample", "evs", "divprune:keep=1.0"])
def test_what_follows_from_sizes_is_served(spec: str) -> None:
    layout = tile_layout(6, 4)
    made = spec_of(spec, 4)
    assert positions.count_of(made, layout) == layouts.count_of(made, layout)


def test_a_policy_that_breaks_its_promise_in_a_rehearsal_is_refused() -> None:
    from tests.serving import broken

    broken.register()
    try:
        for name, gives in (("short", 7), ("liar", 9)):
            with pytest.raises(RequestError, match=f"promises 8 embeddings of this image and gives {gives}"):
                positions.count_of(f"test-{name}:keep=8", tile_layout(4, 4))
        assert positions.count_of("test-late:keep=8", tile_layout(4, 4)) == 8  # nobody sees it here
    finally:
        for name in ("short", "raising", "liar", "late", "elsewhere"):
            vtr.settings._POLICIES.pop(f"test-{name}")


def test_other_tokens_are_not_the_same_answer() -> None:
    layout = tile_layout(4, 6)
    one, other = positions.chosen("pool:grid=2", layout), positions.chosen("m3:tokens=6", layout)
    kept = positions.chosen("uniform:keep=6,before_decoder=true", layout)
    assert positions.same(one, one) and positions.same(kept, kept)
    assert not positions.same(one, other) and not positions.same(kept, other)
    again, made = one[0], one[1]
    assert made is not None
    assert positions.same(one, (again, vtr.Pooled(made.features, [list(some) for some in made.sources])))
    assert not positions.same(one, (again, vtr.Pooled(made.features, [list(some)[::-1] for some in made.sources])))


@pytest.mark.parametrize("spec", ["divprune:keep=3", "pool:grid=2"])
def test_a_policy_that_says_something_else_by_now_leaves_the_prompt_its_length(spec: str) -> None:
    """That would end the engine; the request ends in an error."""
    layout = tile_layout(4, 6)
    cut, whole = positions.Cut(1, 3, layout, spec), torch.arange(30).expand(3, -1)
    assert positions.shortened(whole, [cut], [1]).shape == (3, 30 - 24 + 3)
    answer = positions.chosen("uniform:keep=3,before_decoder=true", layout)
    if spec == "pool:grid=2":
        assert not positions.as_told(spec, layout, answer)
    else:
        with pytest.raises(RequestError):  # the guard takes that for a broken promise
            positions.as_told(spec, layout, answer)


# -- Idefics3, SmolVLM -------------------------------------------------------------------------------------------------
def test_each_run_of_a_pictures_tokens_is_cut() -> None:
    mark, text = 4, [7, 8]
    ids = [*text, *[mark] * 9, 5, *[mark] * 9, 6, 5, *[mark] * 9, 7]
    assert layouts.shortened(ids, mark, 9, 2) == [*text, mark, mark, 5, mark, mark, 6, 5, mark, mark, 7]
    assert layouts.shortened(ids, mark, 9, 9) == ids


def test_a_tile_is_the_adapters() -> None:
    (family,) = [one for one in FAMILIES if one.kind == "idefics3"]
    model = family.make()
    for layout in family.adapter.layouts(model, family.batch(model, [["a", IMAGE]]))[IMAGE_ID]:
        mine = layouts.idefics3(model.config, (0, 0), 1)
        assert mine.grid == layout.grid and len(mine) == len(layout)


def test_what_vtr_refuses_on_transformers_is_refused() -> None:
    with pytest.raises(RequestError, match="does not work on Idefics3, SmolVLM"):
        layouts.check_family(Idefics3(), 'globalcom2:retention=0.3,budget="exact"')
    for spec in ("none", "downsample:scale=0.5", "pool:grid=2", "divprune:keep=0.5", "cls:keep=3"):
        layouts.check_family(Idefics3(), spec)


# -- at start ----------------------------------------------------------------------------------------------------------
def config(graphs: bool = False, pruning: bool = False, pictures: bool = True) -> Any:
    asked = SimpleNamespace(is_multimodal_pruning_enabled=lambda: pruning) if pictures else None
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=graphs),
        model_config=SimpleNamespace(multimodal_config=asked),
    )


def test_settings_that_go_past_the_plugin_are_refused() -> None:
    start.check(config())
    start.check(config(pictures=False))
    for settings, name in (({"graphs": True}, "cudagraph_mm_encoder"), ({"pruning": True}, "--video-pruning-rate")):
        with pytest.raises(vtr.UnsupportedError, match=name) as error:
            start.check(config(**settings))
        assert 'VLLM_PLUGINS=""' in str(error.value)


def test_every_architecture_has_its_module() -> None:
    from pathlib import Path

    import vtr.integrations.vllm as plugin

    folder = Path(plugin.__file__).parent
    for name, module in ARCHITECTURES.items():
        assert f"class {name}(" in (folder / f"{module}.py").read_text()
    assert made_of("none") is None
