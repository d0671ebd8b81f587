"""Which policy applies, who sees which report, and what a cache does when a conversation goes on."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

import vtr
from tests import tiny

ROWS = [["ab", tiny.IMAGE, "cde"], ["a", tiny.IMAGE, "b", tiny.IMAGE, "cd"], ["abcdef"]]
F = vtr.FastV(0.25, 2)


@pytest.fixture
def model() -> Any:
    return vtr.patch(tiny.llava())


@pytest.fixture
def inputs(model: Any) -> dict[str, torch.Tensor]:
    return tiny.batch(model, ROWS)


def specs(model: Any) -> list[str | None]:
    return [row.policy for row in vtr.report(model).rows]


def test_argument_beats_use_beats_default(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    vtr.patch(model, policy="random:keep=0.5")
    tiny.generate(model, inputs, max_new_tokens=1)
    assert specs(model) == ["random:keep=0.5"] * 3
    with vtr.use(model, "uniform:keep=0.5"):
        tiny.generate(model, inputs, max_new_tokens=1)
        assert specs(model) == ["uniform:keep=0.5"] * 3
        tiny.generate(model, inputs, max_new_tokens=1, policy=F)
        assert specs(model) == [F.spec] * 3
        tiny.generate(model, inputs, max_new_tokens=1, policy=None)
        assert specs(model) == [None] * 3
        with vtr.use(model, [F, None, None]):
            with torch.no_grad():
                model(**inputs)
            assert specs(model) == [F.spec, None, None]
        model(**inputs)
        assert specs(model) == ["uniform:keep=0.5"] * 3
    model(**inputs)
    assert specs(model) == ["random:keep=0.5"] * 3
    model(**inputs, policy=None)
    assert specs(model) == [None] * 3
    vtr.patch(model)  # no default again
    tiny.generate(model, inputs, max_new_tokens=1)
    assert specs(model) == [None] * 3


def test_use_ends_with_an_exception(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(KeyError), vtr.use(model, F):
        raise KeyError
    tiny.generate(model, inputs, max_new_tokens=1)
    assert specs(model) == [None] * 3


def test_an_image_row_by_row_report(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    schedule = vtr.Schedule([1.0, 0.75, 0.5, 0.5, 0.25])
    tiny.generate(model, inputs, policy=[vtr.GSearch(schedule), F, None], max_new_tokens=4)
    report = vtr.report(model)
    assert report.rows[0].vision_tokens == [36, 27, 18, 18, 9] == schedule.counts(36)
    assert report.rows[1].vision_tokens == [72, 72, 18, 18, 18]
    assert report.rows[2].vision_tokens == [0] * 5 and report.rows[2].mean_keep == 1.0
    vision = (inputs["input_ids"] == tiny.IMAGE_ID)[0].nonzero().squeeze(1).tolist()
    assert report.rows[0].kept(0) == vision
    for layer in range(1, 5):
        kept = report.rows[0].kept(layer)
        assert kept == sorted(kept) and set(kept) <= set(report.rows[0].kept(layer - 1))
    assert report.steps == 3 and report.kv_bytes <= report.kv_bytes_allocated
    assert "gsearch" in report.table() and "GFLOPs" in report.table()


def test_an_unreduced_call_is_reported_too(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Its numbers are those of a packed run that keeps everything, padding added (transformers computes it)."""
    one = tiny.single(inputs, 0, model)
    tiny.generate(model, one, max_new_tokens=4)
    dense = vtr.report(model)
    tiny.generate(model, one, policy=vtr.Random(1.0), max_new_tokens=4)
    packed = vtr.report(model)
    assert dense.flops == packed.flops and dense.prefill_flops == packed.prefill_flops
    assert dense.kv_bytes == packed.kv_bytes
    assert dense.rows[0].vision_tokens == packed.rows[0].vision_tokens


def test_beams_share_a_row(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    tiny.generate(model, inputs, policy=[F, None, None], num_beams=3, max_new_tokens=3)
    report = vtr.report(model)
    assert [row.policy for row in report.rows] == [F.spec, None, None]


def test_threads_do_not_see_each_other(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    policies = [None, F, vtr.Random(0.5), vtr.UniformGrid(0.3), vtr.GSearch([1.0, 0.5, 0.5, 0.5, 0.1]), vtr.Random(3)]
    alone = [tiny.generate(model, inputs, policy=p, max_new_tokens=6) for p in policies]
    got: list[Any] = [None] * len(policies)

    def run(i: int) -> None:
        for _ in range(3):
            with vtr.use(model, policies[i]):
                got[i] = (tiny.generate(model, inputs, max_new_tokens=6), specs(model)[0])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(policies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for p, want, (sequence, spec) in zip(policies, alone, got, strict=True):
        assert torch.equal(sequence, want)
        assert spec == (p and p.spec)


def test_a_streamer_uses_the_default(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    class Letters:
        def decode(self, ids: Any, **kwargs: Any) -> str:
            return " ".join(str(int(i)) for i in ids) + " "

    one = tiny.single(inputs, 0, model)
    want = tiny.generate(model, one, policy=F, max_new_tokens=6)
    vtr.patch(model, policy=F)
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True)  # type: ignore[arg-type]
    thread = threading.Thread(
        target=tiny.generate, args=(model, one), kwargs={"streamer": streamer, "max_new_tokens": 6}
    )
    thread.start()
    heard = [int(word) for word in "".join(streamer).split()]
    thread.join()
    assert heard == want[0, one["input_ids"].shape[1] :].tolist()


def test_a_deep_copy_is_patched_and_independent(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    want = tiny.generate(model, inputs, policy=F, max_new_tokens=4)
    other = copy.deepcopy(model)
    vtr.unpatch(model)
    assert torch.equal(tiny.generate(other, inputs, policy=F, max_new_tokens=4), want)
    other.model.language_model.layers[0].mlp.down_proj.weight.data.zero_()
    vtr.patch(model)
    assert torch.equal(tiny.generate(model, inputs, policy=F, max_new_tokens=4), want)


def test_switching_attention_on_a_patched_model(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        want = model(**inputs, policy=F).logits
        model.set_attn_implementation("eager")
        got = model(**inputs, policy=F).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(got[real], want[real], atol=2e-5)
    vtr.unpatch(model)
    assert model.get_decoder().config._attn_implementation == "eager"


@pytest.mark.parametrize("policy", [F, "random:keep=0.5", "gsearch:schedule=[1.0,0.5,0.5,0.5,0.1]"])
def test_a_conversation_goes_on(model: Any, policy: Any) -> None:
    """A second turn on the returned cache sees what the first kept, and equals feeding its tokens one by one."""
    first = tiny.batch(model, [ROWS[0]])
    second = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad():
        caches = [model(**first, policy=policy, use_cache=True).past_key_values for _ in range(2)]
        chunk = model(input_ids=second, past_key_values=caches[0]).logits
        steps = [model(input_ids=second[:, i : i + 1], past_key_values=caches[1]).logits for i in range(4)]
    assert torch.allclose(chunk, torch.cat(steps, 1), atol=2e-5)
    assert caches[0].get_seq_length() == first["input_ids"].shape[1] + 4
    assert [a.lengths() for a in caches[0].layers] == [b.lengths() for b in caches[1].layers]


@pytest.mark.parametrize("full", [True, False])
def test_generate_goes_on_with_its_cache(model: Any, full: bool) -> None:
    """Turn two through generate, with the whole conversation's ids or the new ones only, equals forwards by hand."""
    policy = vtr.FastV(0.5, 2, on_continue="keep")
    first = tiny.batch(model, [ROWS[0]])
    more = torch.tensor([[20, 21, 22, 23]])
    turn = tiny.generate(model, first, policy=policy, max_new_tokens=3, return_dict_in_generate=True)
    cache, said = turn.past_key_values, turn.sequences
    by_hand = copy.deepcopy(cache)
    ids = torch.cat([said, more], 1)
    new = ids if full else ids[:, cache.get_seq_length() :]
    inputs = {"input_ids": new, "attention_mask": torch.ones_like(ids)}
    got = tiny.generate(
        model, inputs, policy=policy, past_key_values=cache, max_new_tokens=3, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    report = vtr.report(model)
    with torch.no_grad():
        want = model(input_ids=ids[:, by_hand.get_seq_length() :], past_key_values=by_hand).logits[:, -1]
    assert torch.allclose(got.logits[0], want, atol=2e-5)
    assert report.rows[0].total == 0 and report.steps == 2


def test_assisted_decoding_keeps_the_answer(model: Any) -> None:
    """A draft of several tokens is checked in one packed forward, and refused tokens are cropped off the cache."""
    one = tiny.batch(model, [ROWS[0]])
    want = tiny.generate(model, one, policy=F, max_new_tokens=12)
    got = tiny.generate(model, one, policy=F, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(got, want)
    assert vtr.report(model).rows[0].vision_tokens == [36, 36, 9, 9, 9]


def test_a_new_image_in_a_conversation_takes_the_new_policy(model: Any) -> None:
    first = tiny.batch(model, [ROWS[0]])
    second = tiny.batch(model, [["xy", tiny.IMAGE, "ab"]], seed=3)
    keep = vtr.FastV(0.5, 2, on_continue="keep")
    with torch.no_grad():
        cache = model(**first, policy=keep, use_cache=True).past_key_values
        before = [layer.lengths()[0] for layer in cache.layers]
        images = {"pixel_values": second["pixel_values"]}
        model(input_ids=second["input_ids"], past_key_values=cache, policy=vtr.Random(0.25), **images)
    text = second["input_ids"].shape[1] - 36
    assert [layer.lengths()[0] - b for layer, b in zip(cache.layers, before, strict=True)] == [text + 9] * 5


def test_going_on_with_a_question_guided_policy_warns(model: Any) -> None:
    first = tiny.batch(model, [ROWS[0]])
    more = torch.tensor([[20, 21]])
    for how in ("warn", "keep", "error"):
        guided = vtr.FastV(0.5, 2, on_continue=how)
        with torch.no_grad():
            cache = model(**first, policy=guided, use_cache=True).past_key_values
            if how == "warn":
                with pytest.warns(UserWarning, match="kept for the first question"):
                    model(input_ids=more, past_key_values=cache, policy=guided)
            elif how == "error":
                with pytest.raises(vtr.UnsupportedError, match="on_continue='keep'"):
                    model(input_ids=more, past_key_values=cache, policy=guided)
            else:
                model(input_ids=more, past_key_values=cache, policy=guided)


def test_gradients_flow_through_a_reduced_forward(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Labels have logical length; the loss of a run that keeps everything equals the unreduced one."""
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE_ID, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    plain = model(**inputs, labels=labels).loss
    kept = model(**inputs, labels=labels, policy=vtr.Random(1.0)).loss
    assert torch.allclose(plain, kept, atol=1e-5)
    model(**inputs, labels=labels, policy=[F, "random:keep=0.3", None]).loss.backward()
    grads = [p.grad for p in model.get_decoder().layers.parameters()]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


def test_positional_arguments_work(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        want = model(**inputs, policy=F).logits
        got = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], policy=F).logits
    assert torch.equal(want, got)


def test_saving_a_patched_model(model: Any, inputs: dict[str, torch.Tensor], tmp_path) -> None:
    want = tiny.generate(model, inputs, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    assert "vtr" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).eval()
    loaded.generation_config.eos_token_id = None
    assert torch.equal(tiny.generate(loaded, inputs, max_new_tokens=3), want)
