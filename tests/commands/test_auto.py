"""``import vtr.auto``: models are patched when they are built, whoever builds them."""

from __future__ import annotations

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    GitConfig,
    GitForCausalLM,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    pipeline,
)

import vtr
from tests import tiny
from vtr import autopatch

ROWS = [["ab", tiny.IMAGE, "cde"], ["a", tiny.IMAGE, "b", tiny.IMAGE, "cd"]]
F = "fastv:keep=0.25,layer=2"


def is_patched(model: Any) -> bool:
    return "_vtr" in vars(model)


def config() -> LlavaConfig:
    return tiny.llava(layers=3).config


# -------------------------------------------------------------------------------------------- what is patched, and when
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_built_models_take_policies(auto: Any, family: str) -> None:
    auto.disable()
    want = vtr.patch(getattr(tiny, family)())
    auto.enable(F)
    model = getattr(tiny, family)()
    assert [name for name, part in model.named_modules() if is_patched(part)] == [""]
    inputs = tiny.batch(model, ROWS)
    assert torch.equal(
        tiny.generate(model, inputs, max_new_tokens=4), tiny.generate(want, inputs, policy=F, max_new_tokens=4)
    )
    assert vtr.report(model).rows[0].policy == "fastv:keep=0.25"
    assert auto.patched() == [model]


def test_every_way_to_load(auto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is patched once, when its weights are in place."""
    tiny.llava(layers=3).save_pretrained(tmp_path)
    seen, patch = [], autopatch.patch

    def spy(model: Any, policy: Any) -> Any:
        seen.append((type(model).__name__, any(p.is_meta for p in model.parameters())))
        return patch(model, policy)

    monkeypatch.setattr(autopatch, "patch", spy)
    own, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    made = [
        own,
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_config(config()),
        LlavaForConditionalGeneration(config()),
    ]
    assert not info["missing_keys"] and all(map(is_patched, made))
    made_by_config = 2  # of the two models that only lend their config
    assert seen == [("LlavaForConditionalGeneration", False)] * (len(made) + made_by_config)


def test_a_pipeline_loads_a_patched_model(auto: Any) -> None:
    auto.enable("fastv:keep=0.1,layer=2")
    pipe = pipeline("image-text-to-text", model=str(vtr.pocket.WEIGHTS))
    image, question, answer = vtr.pocket.sample(0)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    said = pipe(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert said[0]["generated_text"].strip() == answer
    assert vtr.report(pipe.model).rows[0].policy == "fastv:keep=0.1"


def test_subclasses_are_patched_when_their_own_init_is_done(auto: Any) -> None:
    class Theirs(LlavaForConditionalGeneration):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.was_patched = is_patched(self)
            self.model.language_model.layers = self.model.language_model.layers[:2]

    model = Theirs(config())
    assert not model.was_patched and is_patched(model)
    with torch.no_grad():
        model(**tiny.batch(model, ROWS), policy="random:keep=0.5,layer=1")
    assert len(vtr.report(model).rows[0].vision_tokens) == 2


def test_models_inside_of_others(auto: Any) -> None:
    """A plain module may hold one; what is built while another is being made is a part of that one."""

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LlavaForConditionalGeneration(config())

    class Pair(LlavaForConditionalGeneration):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.draft = LlavaForConditionalGeneration(config)

    assert is_patched(Holder().inner)
    pair = Pair(config())
    assert is_patched(pair) and not is_patched(pair.draft)


def test_other_families_are_left_alone_and_named_once(auto: Any, caplog: pytest.LogCaptureFixture) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    seeing = GitConfig(vision_config={**small, "image_size": 4, "patch_size": 2}, vocab_size=16, **small)
    with caplog.at_level(logging.INFO, "vtr.auto"):
        for _ in range(2):
            model = GitForCausalLM(seeing)
            words = LlamaForCausalLM(config().text_config)
    assert not is_patched(model) and not is_patched(words)
    said = [(r.levelname, r.message.split(" ")[0]) for r in caplog.records if "left alone" in r.message]
    assert said == [("WARNING", "GitForCausalLM"), ("INFO", "LlamaForCausalLM")]
    assert "no model family vtr knows" in caplog.text


def test_empty_models_that_are_filled_later(auto: Any, tmp_path: Path) -> None:
    """accelerate's way to load what does not fit: patched while empty, weights and devices come afterwards."""
    accelerate = pytest.importorskip("accelerate")
    auto.enable("globalcom2:retention=0.25")
    full = tiny.llava(layers=3)
    inputs = tiny.batch(full, ROWS)
    save_file({name: tensor.clone() for name, tensor in full.state_dict().items()}, tmp_path / "model.safetensors")
    with accelerate.init_empty_weights():
        model = LlavaForConditionalGeneration(full.config)
    assert is_patched(model) and next(model.parameters()).is_meta
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), dict.fromkeys(parts, "cpu"))
    model.eval().generation_config.eos_token_id = None
    assert torch.equal(tiny.generate(model, inputs, max_new_tokens=4), tiny.generate(full, inputs, max_new_tokens=4))
    assert vtr.report(model).rows[0].policy == "globalcom2:retention=0.25"


def test_threads(auto: Any) -> None:
    start = threading.Barrier(4)

    def build(i: int) -> Any:
        start.wait()
        return LlavaForConditionalGeneration(given)

    given = config()
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(build, range(4)))
    assert all(map(is_patched, models)) and set(map(id, models)) <= set(map(id, auto.patched()))


def test_a_failed_construction_leaves_no_trace(auto: Any) -> None:
    with pytest.raises(TypeError, match="should be an instance"):
        LlavaForConditionalGeneration(None)
    assert is_patched(LlavaForConditionalGeneration(config()))


# --------------------------------------------------------------------------------------------------- the default policy
def test_the_default_policy_and_models_it_does_not_suit(auto: Any, tmp_path: Path) -> None:
    auto.enable("fastv:keep=0.25,layer=7")
    with pytest.raises(
        ValueError, match=r"vtr\.auto: the default policy 'fastv:keep=0.25,layer=7' does not suit this Ll"
    ):
        tiny.llava(layers=5)
    with pytest.raises(ValueError, match="unknown policy"):
        auto.enable("fstv")
    vtr.FastV(0.25, 1).save_pretrained(tmp_path)
    auto.enable(str(tmp_path))
    model = tiny.llava(layers=2)
    tiny.generate(model, tiny.batch(model, ROWS), max_new_tokens=1)
    assert vtr.report(model).rows[0].policy == "fastv:keep=0.25,layer=1"
    auto.enable("none")
    assert is_patched(tiny.llava(layers=3))


# ----------------------------------------------------------------------------------------------------------------- undo
def test_disable_puts_everything_back(auto: Any) -> None:
    auto.disable()
    classes = [PreTrainedModel, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, LlamaForCausalLM]
    before = [dict(vars(cls)) for cls in classes]
    auto.enable(F)
    auto.enable(F)
    assert vars(LlavaForConditionalGeneration)["__init__"] is not before[1]["__init__"]
    model, by_hand = tiny.llava(layers=3), None
    twin = copy.deepcopy(model)
    with vtr.use(model, F), pytest.raises(RuntimeError, match=r"vtr\.use block is open"):
        auto.disable()
    assert is_patched(model) and is_patched(tiny.llava(layers=3))
    auto.disable()
    auto.disable()
    by_hand = vtr.patch(tiny.llava(layers=3))
    assert [dict(vars(cls)) for cls in classes] == before
    assert not is_patched(model) and is_patched(twin) and is_patched(by_hand)
    assert not is_patched(tiny.llava(layers=3))
    auto.enable(F)
    kept = tiny.llava(layers=3)
    auto.disable(unpatch_models=False)
    tiny.generate(kept, tiny.batch(kept, ROWS), max_new_tokens=1)
    assert vtr.report(kept).rows[0].policy == "fastv:keep=0.25"


def test_somebody_else_wrapped_it_since(auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = LlavaForConditionalGeneration.__init__

    def theirs(self: Any, *args: Any) -> None:
        ours(self, *args)

    monkeypatch.setattr(LlavaForConditionalGeneration, "__init__", theirs)
    auto.disable()
    assert LlavaForConditionalGeneration.__init__ is theirs
    assert not is_patched(LlavaForConditionalGeneration(config()))
    auto.enable()
    assert is_patched(LlavaForConditionalGeneration(config()))
    auto.disable()
    assert LlavaForConditionalGeneration.__init__ is theirs
    monkeypatch.undo()
    LlavaForConditionalGeneration.__init__ = ours.__wrapped__  # type: ignore[attr-defined,method-assign]
