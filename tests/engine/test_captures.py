"""What vision tower and projector give to compress policies: to the right call, once, with its gradients."""

from __future__ import annotations

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import oracle, shorter, tiny
from tests.conftest import Pair
from tests.engine.test_compress import MIXES, ROWS, RUN, G, M, close
from tests.loads import forward, trainable
from tests.spy import Spy
from tests.tiny import IMAGE, VIDEO
from vtr.engine.captures import capturing
from vtr.image import arrange

pytestmark = pytest.mark.sample(1)

SOME = [M(9), G(0.5), None, M([1, 9]), vtr.FastV(0.5)]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    stock = getattr(tiny, request.param)()
    return Pair(stock, vtr.patch(copy.deepcopy(stock)))


class Counter:
    """How often modules ran, and with which keyword arguments."""

    def __init__(self, *modules: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.handles = [m.register_forward_pre_hook(self.note, with_kwargs=True) for m in modules]

    def note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append(dict(kwargs))

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


# -------------------------------------------------------------------------------------------------- what is captured
@pytest.mark.parametrize("how", ["forward", "generate", "beams", "embeddings"])
def test_tiles_and_scores_belong_to_images(pair: Pair, how: str) -> None:
    """Of every image of every row, also where images are encoded before the forward and rows are repeated after."""
    model, inputs = pair.patched, tiny.batch(pair.stock, ROWS)
    spies = [Spy() for _ in ROWS]
    if how == "forward":
        forward(model, inputs, policy=spies)
    elif how == "embeddings":
        given = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        forward(model, {k: v for k, v in given.items() if k != "input_ids"}, policy=spies)
    else:
        tiny.generate(model, inputs, policy=spies, max_new_tokens=2, num_beams=2 if how == "beams" else 1)
    times = 2 if how == "beams" else 1
    for b, spy in enumerate(spies):
        alone = tiny.single(inputs, b, pair.stock)
        images = shorter.pixels(pair.stock, alone) if "pixel_values" in alone else []
        assert len(spy.seen) == len(images) * times
        for i, (image, scores) in enumerate(spy.seen):
            with torch.no_grad():
                tiles, want = shorter.encoded(pair.stock, images[i % len(images)])
            if image.layout.thumbnail_last:
                tiles, want = tiles.roll(1, 0), want.roll(1, 0)
            assert image.tiles is not None and (image.index, image.count) == (i % len(images), len(images))
            close(image.tiles, tiles)
            close(scores, want)
            close(arrange(image.layout, image.tiles, image.newline), image.features)


def test_nothing_is_captured_that_no_row_wants(pair: Pair) -> None:
    """Neither without a policy, nor for policies that want nothing, nor for rows without images."""
    model, inputs = pair.patched, tiny.batch(pair.stock, ROWS)
    tower = model.model.vision_tower
    with Counter(tower) as stock:
        forward(model, inputs)
        forward(model, inputs, policy=vtr.FastV(0.5))
        forward(model, inputs, policy=[None, None, G(0.5), None, None])
    kept = [call.get("output_hidden_states") for call in stock.calls]
    assert kept[0] == kept[1] == kept[2]
    taken: list[int] = []
    watched = patch_captures(model, taken)
    forward(model, inputs, policy=[vtr.FastV(0.5), None, M(1), None, None])
    assert taken == []
    forward(model, inputs, policy=MIXES[0])
    assert taken == [1]
    watched()


def patch_captures(model: Any, taken: list[int]) -> Any:
    """Count calls that take something in; returns what ends it."""
    from vtr.engine.install import patch_of

    hooks, own = patch_of(model).vision, patch_of(model).vision.wanted

    def wanted(*args: Any) -> Any:
        found = own(*args)
        taken.extend([1] if found is not None else [])
        return found

    hooks.wanted = wanted  # type: ignore[method-assign]
    return lambda: hooks.__dict__.pop("wanted")


def test_the_tower_runs_once(pair: Pair) -> None:
    model, inputs = pair.patched, tiny.batch(pair.stock, ROWS)
    layers = [
        m for m in model.model.vision_tower.modules() if type(m).__name__.endswith(("EncoderLayer", "VisionLayer"))
    ]
    for call in (lambda: forward(model, inputs, policy=SOME), lambda: tiny.generate(model, inputs, policy=SOME, **RUN)):
        with Counter(model.model.vision_tower, model.model.multi_modal_projector, *layers) as counter:
            call()
        assert len(counter.calls) == 2 + len(layers)


@pytest.mark.parametrize("keeps", ["states", "nothing"])
def test_a_memoised_tower(pair: Pair, keeps: str) -> None:
    """Callers may answer the tower's forward from memory; what it remembers must hold the states that are asked for."""
    model, inputs, known = copy.deepcopy(pair.patched), tiny.batch(pair.stock, ROWS), {}
    tower = model.model.vision_tower
    own = tower.forward
    want = [tiny.generate(model, inputs, policy=policies, **RUN) for policies in (SOME, MIXES[1])]

    def memo(pixels: Any = None, **kwargs: Any) -> Any:
        pixels = kwargs.pop("pixel_values", pixels)
        if keeps == "states":
            kwargs["output_hidden_states"] = True
        if "out" not in known:
            known["out"] = own(pixels, **kwargs)
        return copy.copy(known["out"])

    tower.forward = memo
    if keeps == "nothing":
        forward(model, inputs)  # remembers what an unreduced call asks for
    last = pair.stock.config.vision_feature_layer == -1
    if keeps == "nothing" and last and pair.stock.config.model_type == "internvl":
        with pytest.raises(vtr.UnsupportedError, match=r"no hidden_states\[-2\]"):
            tiny.generate(model, inputs, policy=SOME, **RUN)
        assert same_run(tiny.generate(model, inputs, policy=None, **RUN), tiny.generate(pair.stock, inputs, **RUN))
        return
    for policies, expected in zip((SOME, MIXES[1]), want, strict=True):
        assert same_run(tiny.generate(model, inputs, policy=policies, **RUN), expected)


def same_run(a: Any, b: Any) -> bool:
    near = all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.logits, b.logits, strict=True))
    return near and torch.equal(a.sequences, b.sequences)


def test_features_memoised_above_the_tower_are_refused_by_name(pair: Pair) -> None:
    """Where tokens alone do not hold what a policy needs; nothing has changed then."""
    model, inputs = copy.deepcopy(pair.patched), tiny.batch(pair.stock, ROWS)
    own, known = model.model.get_image_features, {}

    def memo(*args: Any, **kwargs: Any) -> Any:
        if "out" not in known:
            known["out"] = own(*args, **kwargs)
        return known["out"]

    want = forward(model, inputs, policy=M(1)).logits
    model.model.get_image_features = memo
    forward(model, inputs)
    family = pair.stock.config.model_type
    if family in ("llava_next", "llava_onevision"):
        with pytest.raises(vtr.UnsupportedError, match=r"projector of .* did not run"):
            forward(model, inputs, policy=M(1))
    else:  # all tiles' tokens are there
        close(forward(model, inputs, policy=M(1)).logits, want)
    with pytest.raises(vtr.UnsupportedError, match="did not run"):
        forward(model, inputs, policy=G(0.5))
    assert torch.equal(forward(model, inputs).logits, forward(pair.stock, inputs).logits)


def test_a_video_is_not_taken_for_memoised_images() -> None:
    """The tower's only run of this call is the video's."""
    model = vtr.patch(tiny.llava_onevision())
    inputs = tiny.batch(model, [["a", IMAGE, "b", VIDEO, "which"]])
    own, known = model.model.get_image_features, {}

    def memo(*args: Any, **kwargs: Any) -> Any:
        return known.setdefault("out", known.get("out") or own(*args, **kwargs))

    want = forward(model, inputs, policy=M(9)).logits
    model.model.get_image_features = memo
    close(forward(model, inputs, policy=M(9)).logits, want)
    with pytest.raises(vtr.UnsupportedError, match=r"projector of .* did not run"):
        forward(model, inputs, policy=M(9))


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("policy", [M(1), G(0.5), vtr.FastV(0.5)])
def test_encoded_images_are_refused(pair: Pair, policy: Any, call: str) -> None:
    model, inputs = pair.patched, tiny.batch(pair.stock, ROWS[:1])
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        encoded = {"image": model.model.get_image_features(**images)}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    run = (
        (lambda **kw: forward(model, text, **kw))
        if call == "forward"
        else (lambda **kw: tiny.generate(model, text, **kw))
    )
    with pytest.raises(vtr.UnsupportedError, match="pixel_values, not mm_encoder_outputs"):
        run(mm_encoder_outputs=encoded, policy=policy)
    with pytest.raises(vtr.UnsupportedError, match="hold no image placeholder"):
        merged = torch.randn(1, 40, 48)
        forward(model, {"inputs_embeds": merged}, policy=policy)
    assert torch.equal(forward(model, inputs).logits, forward(pair.stock, inputs).logits)


# ------------------------------------------------------------------------------------------------ whose call it is
def test_threads_do_not_share_captures(pair: Pair) -> None:
    """Different pictures and policies at once, encoded while the others are."""
    model = pair.patched
    batches = [tiny.batch(pair.stock, ROWS[:2] + ROWS[3:4], seed=seed) for seed in range(4)]
    policies = [[M(9), G(0.5), M([1, 9])], [G(0.3), M(1), G(0.6)], [None, M(9), None], [M(1), M(1), M(9)]]
    want = [tiny.generate(model, b, policy=p, **RUN) for b, p in zip(batches, policies, strict=True)]
    gate = threading.Barrier(len(batches))

    def call(i: int) -> Any:
        gate.wait()
        return [tiny.generate(model, batches[i], policy=policies[i], **RUN) for _ in range(3)]

    with ThreadPoolExecutor(len(batches)) as pool:
        for i, runs in enumerate(pool.map(call, range(len(batches)))):
            assert all(same_run(run, want[i]) for run in runs)


def test_a_forward_inside_a_generate_has_its_own(pair: Pair) -> None:
    """A callback encodes another picture between steps; without a cache every step compresses the prompt's again."""
    from transformers import LogitsProcessor, LogitsProcessorList

    model, inputs, other = pair.patched, tiny.batch(pair.stock, ROWS), tiny.batch(pair.stock, ROWS[3:4], seed=5)
    want, inner = tiny.generate(model, inputs, policy=SOME, **RUN), forward(model, other, policy=M([9, 1])).logits

    class Nested(LogitsProcessor):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            close(forward(model, other, policy=M([9, 1])).logits, inner)
            forward(model, other, policy=None)
            tiny.generate(model, other, policy=G(0.5), max_new_tokens=1)
            return scores

    for cached in (True, False):
        got = tiny.generate(
            model, inputs, policy=SOME, use_cache=cached, logits_processor=LogitsProcessorList([Nested()]), **RUN
        )
        assert torch.equal(got.sequences, want.sequences)
        close(torch.stack(got.logits), torch.stack(want.logits))


def test_an_interrupted_call_leaves_nothing_behind(pair: Pair) -> None:
    model, inputs = pair.patched, tiny.batch(pair.stock, ROWS)
    want = tiny.generate(model, inputs, policy=SOME, **RUN)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    for place in (model.model.multi_modal_projector, model.get_decoder().layers[2]):
        for call in (forward, tiny.generate):
            hook = place.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                call(model, inputs, policy=MIXES[1])
            hook.remove()
            gc.collect()
            left = capturing.get()
            assert left is None or left() is None
    assert same_run(tiny.generate(model, inputs, policy=SOME, **RUN), want)


def test_captures_are_freed_before_the_decoder_runs(pair: Pair) -> None:
    """The first decoder layer finds nothing kept: tiles and states would be there twice during the prefill."""
    model, inputs, held = pair.patched, tiny.batch(pair.stock, ROWS), []

    def look(*args: Any) -> None:
        found = capturing.get()
        captures = found() if found is not None else None
        held.append(0 if captures is None else len(captures.projected) + len(captures.states))

    hook = model.get_decoder().layers[0].register_forward_pre_hook(look)
    forward(model, inputs, policy=SOME)
    tiny.generate(model, inputs, policy=SOME, **RUN)
    hook.remove()
    assert held and not any(held)


def test_a_conversation_goes_on_with_a_new_image(pair: Pair) -> None:
    """The second turn's picture is compressed by the second turn's policy."""
    model, first = pair.patched, tiny.batch(pair.stock, ROWS[:1])
    second = tiny.batch(pair.stock, [["xy", IMAGE, "z"]], seed=3, bos=False)
    cache = forward(model, first, policy=M(9), use_cache=True).past_key_values
    before = vtr.report(model).rows[0].vision_tokens[0]
    mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1]).long()
    got = forward(model, {**second, "attention_mask": mask}, past_key_values=cache, policy=G(0.5)).logits
    after = vtr.report(model).rows[0].vision_tokens[0]
    with torch.no_grad():
        one = shorter.row(pair.stock, first, shorter.matryoshka(pair.stock, first, [9]))
    spy = Spy()
    forward(model, second, policy=spy)
    image, scores = spy.seen[0]
    kept = G(0.5).compress(replace(image, scorer=lambda: scores))
    assert isinstance(kept, Tensor) and len(kept) == after and int(one.vision.sum()) == before
    with torch.no_grad():
        two = shorter.row(pair.stock, second, [image.features[kept.sort().values]])
    want = forward(pair.stock, {"inputs_embeds": torch.cat([one.embeds, two.embeds])[None]}).logits[0]
    close(got[0, second["input_ids"][0] != tiny.IMAGE_ID], want[len(one.embeds) :][~two.vision])


# --------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("scales", [1, 9, [1, 9]])
def test_gradients_flow_through_the_projector(pair: Pair, scales: Any) -> None:
    """M3 trains projector, language model and tower: gradients are those of a prompt built by hand."""
    stock, model = trainable(copy.deepcopy(pair.stock)), trainable(copy.deepcopy(pair.patched))
    for one in (stock, model):
        one.model.vision_tower.requires_grad_(True)
    inputs = tiny.batch(pair.stock, ROWS[3:4])
    out = model(**inputs, policy=M(scales)).logits[0]
    text = inputs["input_ids"][0] != tiny.IMAGE_ID
    weights = torch.randn(int(text.sum()), out.shape[1], generator=torch.Generator().manual_seed(0))
    (out[text] * weights).sum().backward()
    given = scales if isinstance(scales, list) else [scales] * 2
    row = shorter.row(stock, inputs, shorter.matryoshka(stock, inputs, given))
    want = oracle.run(stock, row, grad=True).logits[~row.vision]
    torch.testing.assert_close(out[text], want, atol=1e-5, rtol=0)
    (want * weights).sum().backward()
    learned = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert any("vision_tower" in name for name in expected) and any(
        "multi_modal_projector" in name for name in expected
    )
    for name, grad in expected.items():
        torch.testing.assert_close(learned[name], grad, atol=1e-5 * max(1.0, float(grad.abs().max())), rtol=0)
