"""Decoding with constant shapes says what decoding on a growing cache says: eager, compiled, and captured."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from vtr.eval.cost import midsize
from vtr.eval.cost.launches import Case, forwards
from vtr.eval.cost.pretend import pretended

import vtr
from tests import learned, tiny
from tests.engine.test_launches import TINY, asked, field
from tests.tiny import IMAGE
from vtr.engine import capture
from vtr.engine.static import StaticRaggedCache, decoding_of

NOISE = 1e-5
STEPS = 10
ROWS = [["ab", IMAGE, "what"], ["a", IMAGE, "bc", IMAGE, "whichone"], ["abcdef"], ["abcd", IMAGE, "efg"]]
ONE = [["abc", IMAGE, "whatis"]]
STATIC = {"cache_implementation": "static"}
POLICIES: dict[str, Callable[[], Any]] = {
    "fastv": lambda: vtr.FastV(0.5, layer=2),
    "gsearch": lambda: vtr.GSearch([1.0, 0.8, 0.5, 0.3, 0.2]),
    "pyramid": lambda: vtr.Pyramid([0.5, 0.25], [1, 3]),
    "m3": lambda: vtr.Matryoshka(9),
    "random": lambda: vtr.Random(0.5, before_decoder=True),
    "pmod": learned.pmod,
    "dynamic-llava": learned.dynamic,
    "mixed": lambda: [vtr.FastV(0.5, layer=2), None, vtr.Pyramid([0.5], [2]), learned.dynamic()],
}
KINDS = {
    "llava": lambda: tiny.llava(),
    "sliding windows": lambda: tiny.llava(lm="mistral"),
    "windows in some layers": lambda: tiny.llava(lm="qwen2"),
    "eager": lambda: tiny.llava_next(attn="eager"),
    "internvl": lambda: tiny.internvl(lm="qwen3"),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sequences": {"num_return_sequences": 2, "do_sample": True},
    "drafts": {"prompt_lookup_num_tokens": 2},
}
EVERY = pytest.mark.parametrize("name", POLICIES)


@functools.cache
def model_of(kind: str) -> Any:
    return vtr.patch(KINDS[kind]())


def said(model: Any, inputs: Any, policy: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    return tiny.generate(model, inputs, policy=policy, **{**defaults, **more})


def same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=NOISE, rtol=0)


def compiling(**more: Any) -> dict[str, Any]:
    """As transformers compiles, on a CPU too; dynamo alone says how many graphs there are."""
    config = CompileConfig(backend="eager", fullgraph=True, mode=None, **more)
    config._compile_all_devices = True
    return {**STATIC, "compile_config": config}


# ------------------------------------------------------------------------------------------------------------- eager
@pytest.mark.sample(1)
@EVERY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_says_the_same_as_a_growing_cache(kind: str, name: str, way: str) -> None:
    model, policy = model_of(kind), POLICIES[name]()
    if way == "drafts" and name in ("dynamic-llava", "mixed"):
        pytest.skip("what is forgotten cannot be taken back; refused, see test_bad_input.py")
    inputs = tiny.batch(model, ONE if way == "drafts" else ROWS)
    want = said(model, inputs, policy, **WAYS[way])
    growing = vtr.report(model)
    try:
        got = said(model, inputs, policy, **STATIC, **WAYS[way])
    except ValueError as error:  # older versions of transformers
        assert way == "drafts" and "not supported with Static cache" in str(error)
        pytest.skip("this transformers refuses drafts on a static cache")
    same(got, want)
    report = vtr.report(model)
    assert isinstance(got.past_key_values, StaticRaggedCache)
    assert report.rows == growing.rows
    assert (report.steps, report.prefill_flops, report.selector_flops) == (
        growing.steps, growing.prefill_flops, growing.selector_flops
    )  # fmt: skip
    if not any(model._vtr.decoder.windows):  # with a window, what nobody sees any more stays until generate ends
        assert (report.flops, report.kv_bytes) == (growing.flops, growing.kv_bytes)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_either_padding(padding: str) -> None:
    model = model_of("llava")
    inputs = tiny.batch(model, ROWS, padding)
    same(said(model, inputs, "fastv:layer=2", **STATIC), said(model, inputs, "fastv:layer=2"))


def test_without_a_policy_the_cache_is_that_of_transformers() -> None:
    model = model_of("llava")
    inputs = tiny.batch(model, ROWS)
    out = said(model, inputs, None, **STATIC)
    assert type(out.past_key_values).__name__ == "StaticCache"
    same(out, said(model, inputs, None))


@EVERY
def test_a_conversation_goes_on(name: str) -> None:
    """The second turn finds the words that the first one remembered, and may be static as well."""
    model, policy = model_of("llava"), POLICIES[name]()
    inputs = tiny.batch(model, ROWS)
    found = []
    for more in ({}, STATIC):
        first = said(model, inputs, policy, **more)
        ids = torch.cat([first.sequences, torch.full((len(ROWS), 3), 17)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ROWS), STEPS + 3, dtype=torch.int64)], 1)
        second = said(model, {"input_ids": ids, "attention_mask": mask}, policy, past_key_values=first.past_key_values)
        found.append((second, vtr.report(model)))
    (want, growing), (got, report) = found
    same(got, want)
    assert isinstance(got.past_key_values, StaticRaggedCache)
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
    assert (report.flops, report.kv_bytes, report.steps) == (growing.flops, growing.kv_bytes, growing.steps)


def test_a_forward_by_hand_goes_on_where_generate_ended() -> None:
    model = model_of("sliding windows")
    inputs = tiny.batch(model, ROWS)
    steps = []
    for more in ({}, STATIC):
        out = said(model, inputs, "pyramid", **more)
        with torch.no_grad():
            steps.append(model(input_ids=out.sequences[:, -1:], past_key_values=out.past_key_values).logits)
    torch.testing.assert_close(steps[1], steps[0], atol=NOISE, rtol=0)


def test_rows_of_the_cache_are_selected_while_it_decodes() -> None:
    """Whatever touches the cache in between gets a ragged one, up to date."""
    model = model_of("llava")
    inputs = tiny.batch(model, ROWS)
    seen: list[int] = []

    class Look(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            layer = model._vtr.choice.generation().cache_layers[0]
            seen.append(layer.get_seq_length())
            if len(seen) == 3:
                layer.thaw()
                assert max(layer.lengths()) <= seen[-1]
            return torch.zeros(len(ids), dtype=torch.bool)

    got = said(model, inputs, "fastv:layer=2", stopping_criteria=StoppingCriteriaList([Look()]), **STATIC)
    same(got, said(model, inputs, "fastv:layer=2"))
    assert seen == list(range(seen[0], seen[0] + STEPS))


def test_a_call_that_fails_leaves_the_cache_in_order() -> None:
    model = model_of("llava")
    inputs = tiny.batch(model, ROWS)
    first = said(model, inputs, "fastv:layer=2", **STATIC)
    cache = first.past_key_values

    class Fails(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            assert decoding_of(cache) is not None
            raise KeyError("mine")

    before = cache.get_seq_length()
    ids = torch.cat([first.sequences[:, :before], torch.full((len(ROWS), 2), 17)], 1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    more = {"past_key_values": cache, "attention_mask": mask}
    with pytest.raises(KeyError, match="mine"):
        said(model, {"input_ids": ids}, "fastv:layer=2", stopping_criteria=StoppingCriteriaList([Fails()]), **more)
    assert decoding_of(cache) is None
    assert cache.get_seq_length() == before + 2


def test_room_is_made_for_what_was_asked() -> None:
    """Allocated: at most 1.25 × what is live, and the room for the tokens to come."""
    model = model_of("llava")
    inputs = tiny.batch(model, [["a" * 150, IMAGE, "b" * 90], ["c" * 200, IMAGE, "what"], ["d" * 110, IMAGE, "e"]])
    for new in (2, 40, 200):
        for name in ("fastv", "gsearch", "random"):
            said(model, inputs, POLICIES[name](), max_new_tokens=new, **STATIC)
            report, geometry = vtr.report(model), model._vtr.decoder.geometry
            token = 2 * geometry.kv_heads * geometry.head_dim * 4
            room = 3 * geometry.num_hidden_layers * (new + 7) * token
            before = report.kv_bytes - 3 * geometry.num_hidden_layers * (new - 1) * token
            assert report.kv_bytes <= report.kv_bytes_allocated <= 1.25 * before + room


def test_the_cache_may_be_made_for_the_worst_case() -> None:
    model = model_of("llava")
    inputs = tiny.batch(model, ONE)
    said(model, inputs, "fastv:layer=2", max_cache_len=400, **STATIC)
    large = vtr.report(model).kv_bytes_allocated
    said(model, inputs, "fastv:layer=2", **STATIC)
    assert large > 2 * vtr.report(model).kv_bytes_allocated


def test_nothing_is_left_after_unpatch() -> None:
    model = tiny.llava()
    before = set(model.__dict__)
    vtr.patch(model)
    said(model, tiny.batch(model, ONE), "fastv:layer=2", **STATIC)
    vtr.unpatch(model)
    assert set(model.__dict__) == before


# ---------------------------------------------------------------------------------------------------------- compiled
@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "m3"])
def test_steps_are_one_graph_without_a_break(name: str, dynamo: Any) -> None:
    model = vtr.patch(tiny.llava())
    inputs, policy = tiny.batch(model, ROWS), POLICIES[name]()
    want = said(model, inputs, policy)
    same(said(model, inputs, policy, **compiling()), want)
    assert dynamo["stats"]["unique_graphs"] == 1
    assert not dynamo["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llava"])
def test_every_kind_of_model_compiles(kind: str, dynamo: Any) -> None:
    model = vtr.patch(KINDS[kind]())
    inputs, policy = tiny.batch(model, ROWS), POLICIES["mixed"]()
    want = said(model, inputs, policy)
    same(said(model, inputs, policy, **compiling()), want)
    assert dynamo["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_inductor_says_the_same() -> None:
    torch._dynamo.reset()
    model = vtr.patch(tiny.llava())
    inputs, policy = tiny.batch(model, ROWS), POLICIES["mixed"]()
    config = CompileConfig(mode="default", fullgraph=True)
    config._compile_all_devices = True
    same(said(model, inputs, policy, compile_config=config, **STATIC), said(model, inputs, policy))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastv", "gsearch", "pyramid"])
@pytest.mark.parametrize("batch", [1, 4])
def test_other_prompts_find_the_compiled_step(name: str, batch: int, dynamo: Any) -> None:
    """A hundred prompts of 50 to 600 tokens: at most six are compiled anew."""
    policy: Any = {"fastv": vtr.FastV(0.5, layer=1), "gsearch": vtr.GSearch([1.0, 0.6, 0.3])}.get(name)
    policy = policy or vtr.Pyramid([0.5], [1])
    model, draw = vtr.patch(tiny.llava(layers=3)), random.Random(0)
    for _ in range(100):
        rows = [
            ["a" * draw.randint(1, 300), *[IMAGE] * draw.randint(1, 3), "b" * draw.randint(1, 200)]
            for _ in range(batch)
        ]
        said(model, tiny.batch(model, rows), policy, max_new_tokens=4, **compiling())
    assert 1 <= dynamo["stats"]["unique_graphs"] <= 7


# ---------------------------------------------------------------------------------------------------------- captured
class Recorded(TorchDispatchMode):
    """A CUDA graph as a CPU can have one: operations in order, run again on the same tensors.

    What a graph cannot hold, a value read on the host, raises as on a GPU. Unlike a capture, recording runs the step;
    so the first replay does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"):
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.ran.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        for func, args, kwargs, out in self.ran:
            again = func(*args, **kwargs)
            outs, agains = (t if isinstance(t, (tuple, list)) else (t,) for t in (out, again))
            for returned, old, new in zip(func._schema.returns, outs, agains, strict=False):
                if returned.alias_info is None and isinstance(old, Tensor):
                    old.copy_(new)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Steps are captured on the CPU too."""
    made: list[Recorded] = []

    def record(step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        mode = Recorded()
        made.append(mode)
        with mode:
            out = step()
        return out, mode.replay

    monkeypatch.setattr(capture, "capture", record)
    monkeypatch.setattr(capture, "CAPTURES", ("cpu",))
    return made


@EVERY
@pytest.mark.parametrize("way", ["greedy", "beams", "sequences"])
def test_captured_steps_say_the_same(name: str, way: str, recorder: list[Recorded]) -> None:
    model, policy = model_of("llava"), POLICIES[name]()
    inputs = tiny.batch(model, ROWS)
    want = said(model, inputs, policy, **WAYS[way])
    growing = vtr.report(model)
    assert not recorder
    for _ in range(2):  # a graph of its own each time
        same(said(model, inputs, policy, **STATIC, **WAYS[way]), want)
    assert [mode.replays for mode in recorder] == [STEPS - 2] * 2
    report = vtr.report(model)
    assert report.rows == growing.rows
    assert (report.flops, report.kv_bytes, report.steps) == (growing.flops, growing.kv_bytes, growing.steps)
    assert "forward" not in model.get_decoder().__dict__


def test_a_windowed_model_is_captured_too(recorder: list[Recorded]) -> None:
    model = model_of("sliding windows")
    inputs, policy = tiny.batch(model, ROWS), POLICIES["mixed"]()
    same(said(model, inputs, policy, **STATIC), said(model, inputs, policy))
    assert len(recorder) == 1


def test_when_steps_are_captured(recorder: list[Recorded]) -> None:
    model = model_of("llava")
    inputs = tiny.batch(model, ROWS)
    said(model, inputs, "fastv:layer=2", disable_compile=True, **STATIC)
    said(model, inputs, "fastv:layer=2", max_new_tokens=capture.WORTHWHILE - 1, **STATIC)
    said(model, inputs, "fastv:layer=2")
    said(model, inputs, None, **STATIC, disable_compile=True)
    assert not recorder
    said(model, inputs, "fastv:layer=2", max_new_tokens=capture.WORTHWHILE, **STATIC)
    assert len(recorder) == 1


class Reads(vtr.DynamicLLaVA):
    """Reads the device to decide about a word."""

    def remember_all(self, layer: int, tokens: Any) -> Any:
        return [bool(token.hidden[0] > 0) for token in tokens]


def test_what_cannot_be_captured_says_how_to_go_on(recorder: list[Recorded]) -> None:
    model = model_of("llava")
    inputs = tiny.batch(model, ROWS)
    policy = learned.randomized(Reads(keep=0.4, width=16, heads=2, inner=24), 5, 0)
    with pytest.raises(vtr.UnsupportedError, match="disable_compile=True"):
        said(model, inputs, policy, **STATIC)
    assert "forward" not in model.get_decoder().__dict__
    same(said(model, inputs, policy, disable_compile=True, **STATIC), said(model, inputs, policy))


def test_copies_made_meanwhile_are_their_own(recorder: list[Recorded]) -> None:
    model = vtr.patch(tiny.llava())
    inputs = tiny.batch(model, ROWS)
    copies: list[Any] = []

    class Copies(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            if not copies:
                copies.append(copy.deepcopy(model))
            return torch.zeros(len(ids), dtype=torch.bool)

    want = said(model, inputs, "fastv:layer=2")
    same(said(model, inputs, "fastv:layer=2", stopping_criteria=StoppingCriteriaList([Copies()]), **STATIC), want)
    same(said(copies[0], inputs, "fastv:layer=2", **STATIC), want)


# ------------------------------------------------------------------------------------------------------------- a GPU
@pytest.mark.parametrize("rows", ["equal", "ragged"])
@pytest.mark.parametrize("name", ["fastv", "gsearch", "pyramid", "m3", "pmod", "dynamic-llava", "seven policies"])
def test_a_step_waits_for_nothing_and_copies_nothing(name: str, rows: str) -> None:
    """So that it can be captured: what the text model asks of a pretended GPU for a token."""
    here, case = field(TINY.layers), Case(name, 8, rows == "ragged")
    inputs = midsize.prompts(here.stock, here.size, case.requests(here.size.text_tokens))
    with pretended() as counts:
        there = {key: t.to("cuda") for key, t in inputs.items()}
        with forwards(here.patched.get_decoder(), counts) as found:
            here.patched.generate(
                **there, policy=here.policy(case), max_new_tokens=4, do_sample=False, disable_compile=True,
                suppress_tokens=[midsize.IMAGE_ID], **STATIC,
            )  # fmt: skip
    assert len(found) == 4
    for step in found[1:]:
        assert not step.waits and not step.copies
        assert step.launches == found[1].launches
    ragged = rows == "ragged" or name == "seven policies"
    assert found[1].launches.total() <= (2.0 if ragged else 1.25) * asked("unpatched", rows).decoding.launches.total()
