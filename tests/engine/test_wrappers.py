"""Models inside of wrappers (peft, torch's, accelerate's), and parts of models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from tests import tiny
from tests.tiny import IMAGE
from vtr.engine.adapters import unwrapped

SPEC = "fastv:keep=0.3,layer=2"
KEPT = [36, 36, 10, 10, 10]
TARGETS = ["q_proj", "k_proj", "v_proj"]


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def prepared(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(model)


def dispatched(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def lora(task: str | None = None, mixed: bool = False) -> Callable[[Any], Any]:
    def wrap(model: Any) -> Any:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, task_type=task)
        return peft.get_peft_model(model, config, mixed=mixed).eval()

    return wrap


def nested(model: Any) -> Any:
    return compiled(torch.nn.DataParallel(lora("CAUSAL_LM")(model)))


WRAPPERS = {
    "compile": compiled,
    "data_parallel": torch.nn.DataParallel,
    "accelerate": prepared,
    "accelerate_hooks": dispatched,
    "peft": lora(),
    "peft_task": lora("CAUSAL_LM"),
    "peft_mixed": lora(mixed=True),
    "nested": nested,
}


def generating(model: Any) -> Any:
    """``model`` or what is inside of it, if the wrapper does not generate."""
    return model if hasattr(model, "generate") else unwrapped(model)


@pytest.fixture
def inputs() -> Any:
    return tiny.batch(tiny.llava(), [["ab", IMAGE, "what"]])


@pytest.mark.parametrize("early", [True, False], ids=["patched before", "patched after"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_is_as_good_as_its_model(wrap: Any, early: bool, inputs: Any) -> None:
    model = tiny.llava()
    if early:
        vtr.patch(model)
    outer = wrap(model)
    assert unwrapped(outer) is model
    if not early:
        assert vtr.patch(outer) is outer and "_vtr" in model.__dict__
    want = tiny.generate(model, inputs, policy=SPEC, max_new_tokens=3)
    assert vtr.report(outer).rows[0].vision_tokens == KEPT
    got = tiny.generate(generating(outer), inputs, policy=SPEC, max_new_tokens=3)
    assert torch.equal(got, want) and vtr.report(outer).rows[0].vision_tokens == KEPT
    tiny.generate(generating(outer), inputs, max_new_tokens=3)
    assert vtr.report(outer).rows[0].vision_tokens == [36] * 5
    with vtr.use(outer, SPEC):
        assert torch.equal(tiny.generate(generating(outer), inputs, max_new_tokens=3), want)
        with pytest.raises(RuntimeError, match=r"vtr\.use"):
            vtr.unpatch(outer)
    with vtr.shared_features(outer) as shared, torch.no_grad():
        for _ in range(2):
            tiny.generate(generating(outer), inputs, policy=SPEC, max_new_tokens=1)
    assert (shared.computed, shared.reused) == (1, 1)
    assert vtr.unpatch(outer) is outer and "_vtr" not in model.__dict__
    with pytest.raises(ValueError, match=r"vtr\.patch"):
        vtr.report(outer)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lora(), prepared], ids=["data_parallel", "peft", "accelerate"])
def test_a_forward_through_a_wrapper_is_reduced(wrap: Any, inputs: Any) -> None:
    model = wrap(vtr.patch(tiny.llava()))
    with torch.no_grad():
        want, full = unwrapped(model)(**inputs, policy=SPEC).logits, unwrapped(model)(**inputs).logits
        got = model(**inputs, policy=SPEC).logits
    assert torch.equal(got, want) and not torch.allclose(want, full)


def test_loaded_lora_weights(tmp_path: Path, inputs: Any) -> None:
    peft = pytest.importorskip("peft")
    lora()(tiny.llava()).save_pretrained(tmp_path)
    for early in (True, False):
        base = tiny.llava()
        model = peft.PeftModel.from_pretrained(vtr.patch(base) if early else base, str(tmp_path)).eval()
        vtr.patch(model, SPEC)
        got = tiny.generate(model, inputs, max_new_tokens=3)
        assert vtr.report(model).rows[0].vision_tokens == KEPT
        want = tiny.generate(lora()(vtr.patch(tiny.llava(), SPEC)), inputs, max_new_tokens=3)
        assert torch.equal(got, want)
    merged = model.merge_and_unload()
    assert merged is base and torch.equal(tiny.generate(merged, inputs, max_new_tokens=3), want)


def test_adapters_of_transformers_own(inputs: Any) -> None:
    peft = pytest.importorskip("peft")
    outs = []
    for early in (True, False):
        model = tiny.llava()
        if early:
            vtr.patch(model)
        torch.manual_seed(0)
        try:
            model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
        except (ImportError, ValueError) as error:  # transformers wants a newer peft
            if "PEFT" not in str(error):
                raise
            pytest.skip(str(error))
        vtr.patch(model)
        outs.append(tiny.generate(model.eval(), inputs, policy=SPEC, max_new_tokens=3))
        assert vtr.report(model).rows[0].vision_tokens == KEPT
        model.disable_adapters()
        plain = tiny.generate(
            model, inputs, policy=SPEC, max_new_tokens=3, output_logits=True, return_dict_in_generate=True
        )
        stock = vtr.patch(tiny.llava())
        same = tiny.generate(
            stock, inputs, policy=SPEC, max_new_tokens=3, output_logits=True, return_dict_in_generate=True
        )
        torch.testing.assert_close(torch.stack(plain.logits), torch.stack(same.logits))
    assert torch.equal(*outs)


def test_what_needs_the_model_itself_names_the_way_in() -> None:
    from vtr.engine.adapters import find_adapter

    with pytest.raises(vtr.UnsupportedError, match=r"stands around a LlavaForConditionalGeneration.*model\.module"):
        find_adapter(torch.nn.DataParallel(tiny.llava()))
    with pytest.raises(vtr.UnsupportedError, match=r"model\.get_base_model\(\)"):
        find_adapter(lora()(tiny.llava()))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_name_the_model_to_patch(family: str) -> None:
    model = getattr(tiny, family)()
    with pytest.raises(vtr.UnsupportedError, match=f"part of a {type(model).__name__}"):
        vtr.patch(model.model)
    for part in (model.model.language_model, model.model.vision_tower):
        with pytest.raises(vtr.UnsupportedError, match="patch that whole model"):
            vtr.patch(part)
    with pytest.raises(vtr.UnsupportedError, match="no model family vtr knows"):
        vtr.patch(torch.nn.Linear(2, 2))
    vtr.patch(model)


def replicated(model: Any) -> Any:
    """As torch.nn.parallel.replicate makes it: copies that know that they are."""
    inner, copied = copy.copy(model.model), copy.copy(model)
    inner.__dict__ = {**model.model.__dict__, "_is_replica": True}
    copied.__dict__ = {**model.__dict__, "_is_replica": True, "_modules": {**model._modules, "model": inner}}
    return copied


def test_copies_that_data_parallel_makes_are_refused(inputs: Any) -> None:
    """On several devices its copies run in threads that know nothing of ``vtr.use``."""
    model = vtr.patch(tiny.llava())
    copied = replicated(model)
    with torch.no_grad():
        assert torch.equal(copied(**inputs).logits, model(**inputs).logits)
        with pytest.raises(vtr.UnsupportedError, match="DistributedDataParallel"):
            copied(**inputs, policy=SPEC)
        with vtr.use(model, SPEC), pytest.raises(vtr.UnsupportedError, match="DistributedDataParallel"):
            copied(**inputs)
        vtr.patch(model, SPEC)
        with pytest.raises(vtr.UnsupportedError, match="DistributedDataParallel"):
            copied(**inputs)
        copied(**inputs, policy=None)
