"""However a model is called, a policy is heeded or refused: ``forward``, the model inside, peft, ``torch.compile``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import vtr
from tests import tiny
from tests.families import FAMILIES, Chat
from tests.support import Models
from tests.tiny import IMAGE

ROWS = [["ab", IMAGE, "what"], [IMAGE, "cde"]]
SPEC = "fastv:keep=0.2,layer=1"


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.kind)
def models(request: pytest.FixtureRequest) -> Models:
    return Models.from_family(request.param)


def inputs_of(models: Models) -> dict[str, Any]:
    inputs = models.family.batch(models.stock, ROWS)
    if isinstance(models.family, Chat):
        inputs = {**inputs, "image_flags": torch.ones(len(inputs["pixel_values"]), 1).long()}
    return inputs


def ways(model: Any, inner: bool) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    yield "model.forward", lambda **kw: model.forward(**kw).logits
    yield "a wrapper that calls model.forward", lambda **kw: Wrapper(model)(**kw).logits
    if inner:
        yield "model.model", lambda **kw: model.lm_head(model.model(**kw).last_hidden_state)
        yield "model.base_model", lambda **kw: model.lm_head(model.base_model(**kw)[0])


class Wrapper(torch.nn.Module):
    """What peft's LoRA models did until 0.20."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


def test_named_used_or_default_every_way_is_reduced(models: Models) -> None:
    """Or, where a family's forward cannot take a policy past its hooks, refused."""
    model, inputs = models.patched, inputs_of(models)
    chat = isinstance(models.family, Chat)
    with torch.no_grad():
        full = model(**inputs, policy=None).logits
        reduced = model(**inputs, policy=SPEC).logits
        report = [row.vision_tokens for row in vtr.report(model).rows]
        assert not torch.allclose(full, reduced, atol=1e-3)
        for name, call in ways(model, inner=not chat):
            calls: list[Callable[[], torch.Tensor]] = [lambda call=call: call(**inputs, policy=SPEC)]  # type: ignore[misc]
            calls += [lambda call=call: used(model, call, inputs), lambda call=call: defaulted(model, call, inputs)]  # type: ignore[misc]
            for ask in calls:
                if chat:
                    with pytest.raises((vtr.UnsupportedError, TypeError), match=r"where the images are|policy"):
                        ask()
                    continue
                torch.testing.assert_close(ask(), reduced, atol=1e-5, rtol=1e-5, msg=name)
                assert [row.vision_tokens for row in vtr.report(model).rows] == report, name


def used(model: Any, call: Callable[..., torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
    with vtr.use(model, SPEC):
        return call(**inputs)


def defaulted(model: Any, call: Callable[..., torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
    vtr.patch(model, SPEC)
    try:
        return call(**inputs)
    finally:
        vtr.patch(model)


def test_without_a_policy_every_way_gives_the_same_bits(models: Models) -> None:
    stock, model, inputs = models.stock, models.patched, inputs_of(models)
    with torch.no_grad():
        want = stock(**inputs).logits
        for _, call in ways(model, inner=not isinstance(models.family, Chat)):
            assert torch.equal(call(**inputs), want)
        vtr.patch(model, SPEC)
        try:
            assert torch.equal(model(**inputs, policy=None).logits, want)
            if not isinstance(models.family, Chat):
                assert torch.equal(model.lm_head(model.model(**inputs, policy=None)[0]), want)
        finally:
            vtr.patch(model)


def test_the_text_model_alone_is_refused_where_a_policy_applies(models: Models) -> None:
    """Its embeddings do not say where the images are; word ids hold none."""
    model = models.patched
    text = vtr.engine.install.patch_of(model).decoder.text
    ids = torch.tensor([[1, 9, 10]])
    embeds = text.get_input_embeddings()(ids)
    with torch.no_grad():
        text(inputs_embeds=embeds), text(input_ids=ids, policy=None)
        with vtr.use(model, SPEC):
            text(input_ids=ids)
            with pytest.raises(vtr.UnsupportedError, match="where the images are"):
                text(inputs_embeds=embeds)
        with pytest.raises(vtr.UnsupportedError, match="where the images are"):
            text(inputs_embeds=embeds, policy=SPEC)
        with pytest.raises(vtr.UnsupportedError, match=r"call model\(…\)"):
            text.forward(inputs_embeds=embeds, policy=SPEC)


def test_the_model_inside_by_its_forward_is_refused() -> None:
    model = vtr.patch(tiny.llava())
    inputs = tiny.batch(model, ROWS)
    with torch.no_grad():
        for call in (
            lambda: model.model.forward(**inputs, policy=SPEC),
            lambda: used(model, model.model.forward, inputs),
        ):
            with pytest.raises(vtr.UnsupportedError, match="where the images are"):
                call()


def test_several_sequences_in_a_row_are_refused() -> None:
    """Padding-free batches say by position ids alone where a sequence begins."""
    model = vtr.patch(tiny.llava())
    one = tiny.batch(model, [["ab", IMAGE, "what"]])
    ids, length = one["input_ids"], one["input_ids"].shape[1]
    joined = {"input_ids": torch.cat([ids, ids], 1), "pixel_values": one["pixel_values"].repeat(2, 1, 1, 1)}
    places = torch.arange(length)[None]
    with torch.no_grad():
        model(**joined, position_ids=torch.cat([places, places], 1), policy=None)
        with pytest.raises(vtr.UnsupportedError, match="several sequences"):
            model(**joined, position_ids=torch.cat([places, places], 1), policy=SPEC)
        padded = tiny.batch(model, ROWS)
        mask = padded["attention_mask"]
        for pad in (0, 1):  # what transformers has given padding, now and before
            places = (mask.cumsum(1) - 1).masked_fill(mask == 0, pad)
            torch.testing.assert_close(
                model(**padded, position_ids=places, policy=SPEC).logits[:, -1],
                model(**padded, policy=SPEC).logits[:, -1],
                atol=1e-5, rtol=1e-4,
            )  # fmt: skip


def test_a_copy_made_inside_a_block_is_in_no_block() -> None:
    model = vtr.patch(tiny.llava())
    with vtr.use(model, SPEC):
        copied = copy.deepcopy(model)
    users = [vtr.engine.install.patch_of(one).choice.users for one in (model, copied)]
    assert users == [0, 0]


# ------------------------------------------------------------------------------------------------------- torch.compile
def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)


def inside(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    return model


def language_model(model: Any) -> Any:
    model.model.language_model = torch.compile(model.model.language_model, backend="eager", fullgraph=True)
    return model


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
@pytest.mark.parametrize("compiled", [whole, inside, language_model])
def test_an_unreduced_call_compiles_into_one_graph(compiled: Any, family: str) -> None:
    """As it does unpatched; what may be reduced is refused, also after a graph was made."""
    stock = getattr(tiny, family)()
    rows = (
        [[IMAGE, "cde"]] if family != "llava_next" else [["cde"]]
    )  # its crops are counted in Python: stock breaks too
    inputs = tiny.batch(stock, rows)
    model = vtr.patch(getattr(tiny, family)())
    torch._dynamo.reset()
    with torch.no_grad():
        want = stock(**inputs).logits
        model(**inputs)  # transformers puts hooks of its own into a model's first call
        fast = compiled(model)
        torch.testing.assert_close(fast(**inputs, use_cache=False).logits, want, atol=1e-5, rtol=1e-5)
        with (
            vtr.use(model, SPEC),
            pytest.raises((vtr.UnsupportedError, torch._dynamo.exc.Unsupported), match="cannot be compiled"),
        ):
            fast(**inputs, use_cache=False)
        with pytest.raises((vtr.UnsupportedError, torch._dynamo.exc.Unsupported), match="cannot be compiled"):
            fast(**inputs, use_cache=False, policy=SPEC)
        vtr.patch(model, SPEC)
        with pytest.raises((vtr.UnsupportedError, torch._dynamo.exc.Unsupported), match="cannot be compiled"):
            fast(**inputs, use_cache=False)
        torch.testing.assert_close(fast(**inputs, use_cache=False, policy=None).logits, want, atol=1e-5, rtol=1e-5)
        vtr.patch(model)
        torch.testing.assert_close(fast(**inputs, use_cache=False).logits, want, atol=1e-5, rtol=1e-5)
