"""The engine's benchmark: what its result holds, what its parts measure, and how it says that it cannot."""

from __future__ import annotations

import itertools
import json
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from vtr.eval.cost import engine, midsize, peak_memory
from vtr.eval.cost.interleave import decode_in_turns, decode_one_by_one, in_turns, median_ratio, text_times, total_ratio
from vtr.eval.report import results

import vtr
from vtr.cli import app

TINY = midsize.Size(6, 32, 64, 2, side=6, text_tokens=8, vocab_size=64, decode_tokens=(9, 10, 17), repeats=2)


def no_processes(patch: pytest.MonkeyPatch) -> None:
    """Peak memory is asked of fresh processes, which take seconds to start: one test does it for all."""
    patch.setattr(peak_memory, "measure", lambda size, dtype, policy, seed: 2000 if policy is None else 1000)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        no_processes(patch)
        return engine.measure(TINY, repeats=2)


@pytest.fixture
def bench() -> engine.Bench:
    stock = midsize.build(TINY, "cpu", torch.float32)
    return engine.Bench(TINY, stock, vtr.patch(midsize.twin(stock)), repeats=1, seed=0)


def test_every_ratio_is_there_and_a_number(result: dict[str, Any]) -> None:
    wanted = set(engine.WHAT) if peak_memory.available() else set(engine.WHAT) - {"peak_memory_ratio"}
    assert {key.removesuffix("_min") for key in result if key.endswith("_min")} == wanted
    for key in wanted:
        low, value, high = result[key + "_min"], result[key], result[key + "_max"]
        assert all(math.isfinite(x) and x > 0 for x in (low, value, high)), key
        assert low <= high, key


def test_the_result_says_what_it_was_measured_on(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result)) == result
    assert result["decode_tokens"] == {"64": 9, "512": 10, "2048": 17}
    assert (result["vision_tokens"], result["text_tokens"], result["layers"]) == (36, 8, 6)
    for key in ("device", "dtype", "threads", "torch", "transformers", "vtr", "python", "seed", "repeats"):
        assert result[key] is not None


def test_kv_ratio_is_exact(result: dict[str, Any]) -> None:
    full, kept = 36 + 8, 9 + 8
    assert result["kv_ratio"] == (2 * full + 4 * kept) / (6 * full)
    assert result["kv_allocated_ratio"] >= result["kv_ratio"]


def test_wrong_accounting_is_not_reported(bench: engine.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = engine.cached_bytes
    monkeypatch.setattr(engine, "cached_bytes", lambda *args, **kwargs: 1 + counted(*args, **kwargs))
    with pytest.raises(RuntimeError, match="accounting"):
        engine.measure_kv(bench)


def test_the_limit_is_the_stock_model_on_the_kept_lengths(bench: engine.Bench) -> None:
    embeds = engine.merged(bench.stock, bench.prompt())
    hidden, cache = engine.limit(bench.stock.get_decoder(), embeds, [44] * 6)
    whole = bench.stock.get_decoder()(inputs_embeds=embeds, use_cache=True)
    assert torch.equal(hidden, whole.last_hidden_state)
    assert torch.equal(cache.layers[5].keys, whole.past_key_values.layers[5].keys)
    lengths = engine.kept_lengths(bench, engine.every_layer(6))
    assert lengths == [8 + int(36 * round(1 - 0.9 * layer / 5, 4) + 1e-9) for layer in range(6)]
    hidden, cache = engine.limit(bench.stock.get_decoder(), embeds, lengths)
    assert hidden.shape[1] == lengths[-1] and [len(c.keys[0, 0]) for c in cache.layers] == lengths


def test_twins_share_their_weights_but_not_the_patch(bench: engine.Bench) -> None:
    pairs = zip(bench.stock.parameters(), bench.patched.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert not bench.stock.get_decoder()._forward_pre_hooks and bench.patched.get_decoder()._forward_pre_hooks


def test_a_row_alone_is_the_row_of_the_batch(bench: engine.Bench) -> None:
    requests = engine.mixed(TINY)
    inputs = midsize.prompts(bench.stock, TINY, [(image, text) for _, image, text in requests])
    assert len(requests) == 8 and {policy is None for policy, _, _ in requests} == {True, False}
    batch = bench.stock(**inputs).logits[:, -1]
    for b in range(8):
        torch.testing.assert_close(bench.stock(**midsize.row_of(inputs, b)).logits[0, -1], batch[b])


def test_text_times_counts_forwards_and_leaves_no_hooks(bench: engine.Bench) -> None:
    model, text = bench.patched, bench.patched.get_decoder()
    before = [list(hooks) for m in (model, text) for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    with text_times(model) as spans:
        model(**bench.prompt(), policy="fastv:keep=0.5")
        model(**bench.prompt())
    assert len(spans) == 2 and min(spans) > 0
    assert [list(hooks) for m in (model, text) for hooks in (m._forward_pre_hooks, m._forward_hooks)] == before


def test_runs_take_turns_and_every_other_round_goes_backwards() -> None:
    seen: list[str] = []
    times = in_turns({name: lambda name=name: seen.append(name) or float(len(seen)) for name in "ab"}, 3)
    assert "".join(seen) == "ba" + "ab" + "ba" + "ab"
    assert times == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_ratios() -> None:
    ratio = median_ratio([2.0, 2.0, 9.0], [1.0, 2.0, 3.0])
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 1.0, 3.0)
    ratio = total_ratio([1.0] * 15 + [17.0], [1.0] * 16)
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 1.0, 9.0)


def test_generating_in_turns_gives_the_same_tokens(bench: engine.Bench) -> None:
    inputs, outs = bench.prompt(), {}

    def start(name: str, policy: Any) -> Any:
        def run(criteria: Any) -> None:
            outs[name] = bench.patched.generate(
                **inputs, policy=policy, max_new_tokens=20, do_sample=False, stopping_criteria=criteria
            )

        return run

    policies = {"none": None, "half": "fastv:keep=0.5", "tenth": "fastv:keep=0.1"}
    times = decode_in_turns({name: start(name, policy) for name, policy in policies.items()}, bench.device)
    assert [len(seconds) for seconds in times.values()] == [19] * 3  # the first token comes out of the prompt's forward
    for name, policy in policies.items():
        alone = bench.patched.generate(**inputs, policy=policy, max_new_tokens=20, do_sample=False)
        assert torch.equal(outs[name], alone)


def test_a_failing_generate_ends_the_others(bench: engine.Bench) -> None:
    def fails(criteria: Any) -> None:
        raise ValueError("no such luck")

    def runs(criteria: Any) -> Any:
        return bench.stock.generate(**bench.prompt(), max_new_tokens=400, do_sample=False, stopping_criteria=criteria)

    with pytest.raises(ValueError, match="no such luck"):
        decode_in_turns({"runs": runs, "fails": fails}, bench.device)


def generating(bench: engine.Bench, tokens: int) -> Any:
    def run(criteria: Any) -> None:
        bench.stock.generate(**bench.prompt(), max_new_tokens=tokens, do_sample=False, stopping_criteria=criteria)

    return run


def test_who_ends_early_leaves_the_turns_to_the_others(bench: engine.Bench) -> None:
    """Also who never took one; what is read may be an array."""
    reads = itertools.count()
    runs = {"none": lambda criteria: None, "few": generating(bench, 3), "many": generating(bench, 9)}
    spent = decode_in_turns(runs, bench.device, read=lambda: np.array([next(reads), 0]))
    assert {name: len(tokens) for name, tokens in spent.items()} == {"none": 0, "few": 2, "many": 8}
    assert [tuple(token) for token in spent["few"] + spent["many"]] == [(1, 0)] * 10, "nothing else runs in a turn"


def test_one_by_one_each_runs_to_its_end_in_this_thread(bench: engine.Bench) -> None:
    seen: list[Any] = []
    runs = {name: generating(bench, tokens) for name, tokens in (("a", 4), ("b", 6))}
    spent = decode_one_by_one(runs, lambda: seen.append(threading.current_thread()), lambda: 1.0)
    assert {name: len(tokens) for name, tokens in spent.items()} == {"a": 3, "b": 5}
    assert seen == [threading.main_thread()] * 10


@pytest.mark.slow
@pytest.mark.skipif(not peak_memory.available(), reason="needs Linux's clear_refs")
def test_peak_memory_grows_with_what_is_kept() -> None:
    size = midsize.Size(6, 64, 2048, 2, side=32, text_tokens=8, vocab_size=64)
    few, none = (peak_memory.measure(size, torch.float32, policy) for policy in (vtr.Random(0.1), None))
    assert 0 < few < none


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["bench", *args], env={"COLUMNS": "120"})


def test_help_teaches() -> None:
    assert "engine" in run("--help").output and "vtr bench engine --small" in run("--help").output
    text = run("engine", "--help").output
    for key in ("pruned_over_limit", "mixed_over_rows", "decode_equal_lengths", "kv_ratio", "--small", "--json"):
        assert key in text


def test_the_command_prints_a_table_and_writes_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(midsize, "SMALL", TINY)
    no_processes(monkeypatch)
    result = run("engine", "--small", "--repeats", "1", "--json", str(tmp_path / "engine.json"))
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "engine.json").read_text())
    assert written["repeats"] == 1
    assert results.load(tmp_path / "engine.json") == written and written["kind"] == "engine"
    for key in (key for key in engine.WHAT if key in written):
        assert key in result.output
    assert "the first 17 decoded tokens" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device", "tpu"], "choose cpu or cuda"),
        (["--dtype", "int4"], "choose one of float32, bfloat16"),
        (["--repeats", "0"], "needs at least 1"),
        pytest.param(
            ["--device", "cuda"],
            "use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_errors_are_one_line(args: list[str], message: str) -> None:
    result = run("engine", *args)
    assert result.exit_code == 1 and message in result.output
    assert len(result.output.strip().splitlines()) == 1
