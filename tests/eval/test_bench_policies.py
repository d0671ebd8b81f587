"""What policies cost: the figures of a tiny run, the checks that end it, contenders at budgets, published shapes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from vtr.eval.cost import batch as bench_batch
from vtr.eval.cost import engine as bench_engine
from vtr.eval.cost import midsize, peak_memory, shapes
from vtr.eval.cost import policies as bench_policies
from vtr.eval.cost import scale as bench_scale
from vtr.eval.cost.contenders import shipped
from vtr.eval.cost.timing import between, mark
from vtr.eval.report import plots, results

import vtr
from vtr.budget import at_share
from vtr.cli import app

TINY = midsize.Size(6, 32, 64, 2, side=6, text_tokens=8, vocab_size=64, decode_tokens=(9, 10, 17), repeats=2)
LADDER = bench_scale.Ladder(TINY, (1, 2, 4), (1, 2, 3), (4, 8, 12), answer=3, repeats=2)


def tiny_setup() -> bench_policies.Setup:
    whole = shapes.of_size(TINY)
    return bench_policies.Setup(whole, whole.downsampled(4), (0.5, 0.25), 2, TINY, answer=3, decode_tokens=4)


def no_processes(patch: pytest.MonkeyPatch) -> None:
    """Peak memory is asked of fresh processes, which take seconds to start."""
    patch.setattr(peak_memory, "measure", lambda size, dtype, policy, seed: size.vision_tokens * 100)


@pytest.fixture(scope="module")
def body() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        no_processes(patch)
        return bench_policies.measure(tiny_setup(), batches=(1, 3))


# ------------------------------------------------------------------------------------------------------- the policies
@pytest.mark.slow
def test_every_policy_is_there_at_every_budget(body: dict[str, Any]) -> None:
    names = [(row["name"], row["budget"]) for row in body["rows"]]
    assert names[0] == ("none", None)
    assert set(names[1:]) | {(left["name"], left["budget"]) for left in body["left_out"]} == {
        (name, budget) for name in [*shipped(), "downsample"] for budget in (0.5, 0.25)
    }
    assert {"random", "uniform", "pool", "downsample", "fastv", "gsearch", "pyramid"} <= {name for name, _ in names}


SIMPLE = ("none", "downsample", "random", "uniform", "pool", "fastv", "gsearch", "pyramid", "m3", "globalcom2")


def test_every_figure_is_there(body: dict[str, Any]) -> None:
    assert json.loads(json.dumps(body)) == body
    for row in body["rows"]:
        for key in ("prefill_ms", "first_token_ms", "decode_ms"):
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]
        assert row["prefill_ms"]["median"] < row["first_token_ms"]["median"]
        rates = row["throughput"]  # none of a policy that cannot be set to this budget on the smaller served pictures
        assert set(rates) == {"1", "3"} and (set(rates.values()) == {None} or min(rates.values()) > 0)
        assert set(rates.values()) != {None} or row["name"] not in SIMPLE
        reduced = row["name"] not in ("none", "downsample")
        assert (row["selector_ms"] > 0) == reduced
        assert row["peak_bytes"] == {"downsample:side=4": 1600, "downsample:side=3": 900}.get(row["policy"], 3600)
        assert len(row["vision_tokens"]) == 6
        assert row["mean_keep"] == sum(row["vision_tokens"]) / (6 * 36)
    assert body["rows"][0]["speed_up"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_counts_are_exact(body: dict[str, Any]) -> None:
    """Of no reduction and of an even share, by hand: Linear layers, full attention, keys and values."""
    linear = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    for row in body["rows"]:
        assert row["flops_counted"] == row["flops_closed"] and row["kv_bytes"] == row["kv_bytes_tensors"]
        lengths = [vision + 8 for vision in row["vision_tokens"]]
        assert row["kv_bytes"] == sum(lengths) * 2 * 32 * 4
        if row["name"] in ("none", "random", "uniform", "pool", "downsample"):  # nothing is scored
            assert row["flops_closed"] == sum(n * linear + 4 * n * n * 32 for n in lengths)


def test_equal_budgets_cost_equal_tokens(body: dict[str, Any]) -> None:
    by_name = {(row["name"], row["budget"]): row for row in body["rows"]}
    assert by_name["random", 0.5]["vision_tokens"] == by_name["uniform", 0.5]["vision_tokens"] == [18] * 6
    assert by_name["pool", 0.25]["vision_tokens"] == by_name["downsample", 0.25]["vision_tokens"] == [9] * 6
    assert by_name["pool", 0.25]["flops_closed"] == by_name["downsample", 0.25]["flops_closed"]
    assert {row["mean_keep"] for row in body["rows"] if row["name"] == "m3"} == {0.25}  # 6 × 6 has no nearer scale
    for row in (row for row in body["rows"][1:] if row["name"] not in ("m3", "vtw")):  # (those go in steps)
        assert row["mean_keep"] == pytest.approx(row["budget"], abs=0.06)


def test_chosen_specs_are_measured_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    no_processes(monkeypatch)
    specs = ["fastv:keep=0.25,layer=1", "pool:grid=3+random:keep=0.5"]
    body = bench_policies.measure(tiny_setup(), specs=specs, batches=(1,), repeats=1)
    assert [row["policy"] for row in body["rows"]] == ["none", *specs]
    assert body["rows"][2]["vision_tokens"] == [4] * 6 and body["left_out"] == []


def test_a_batch_without_room_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    no_processes(monkeypatch)
    decode = bench_policies.generate

    def full(contender: Any, inputs: Any, *args: Any) -> None:
        if len(inputs["input_ids"]) == 3 and contender.policy is None:
            raise torch.OutOfMemoryError
        decode(contender, inputs, *args)

    monkeypatch.setattr(bench_policies, "generate", full)
    body = bench_policies.measure(tiny_setup(), specs=["random:keep=0.5"], batches=(1, 3), repeats=1)
    rates = [row["throughput"]["3"] for row in body["rows"]]
    assert rates[0] is None and rates[1] > 0
    assert "–" in bench_policies.table(body)[1][0][7]
    plots.policies(body)


@pytest.mark.parametrize(("what", "field"), [("FLOPs", "flops"), ("bytes", "kv_bytes")])
def test_wrong_accounting_is_not_reported(monkeypatch: pytest.MonkeyPatch, what: str, field: str) -> None:
    """A closed form or a report a little off ends the run and names the policy."""
    truth = vtr.report

    def wrong(model: Any) -> Any:
        report = truth(model)
        return dataclasses.replace(report, **{field: int(getattr(report, field) * 1.002)})

    monkeypatch.setattr(vtr, "report", wrong)
    with pytest.raises(RuntimeError, match=f"none: .*{what}.*vtr/accounting.py"):
        bench_policies.measure(tiny_setup(), specs=["random:keep=0.5"], batches=(1,), repeats=1)


def test_keys_projected_to_look_ahead_are_not_cached_ones() -> None:
    stock = midsize.build(TINY, "cpu", torch.float32)
    model = vtr.patch(stock)
    inputs = midsize.prompts(model, TINY, [(True, 8)])
    policy = vtr.Pyramid([0.5, 0.25], [2, 4])
    assert peak_memory.cached_bytes(model, inputs, policy=policy) == 2 * 32 * 4 * (2 * 44 + 2 * 26 + 2 * 17)
    assert not any(layer.self_attn._forward_hooks for layer in model.get_decoder().layers)


# ------------------------------------------------------------------------------------------------------------- setups
@pytest.mark.slow
def test_who_cannot_be_set_to_a_budget_on_the_served_grid_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested scales of 6 × 6 have a quarter, those of 5 × 5 do not; and the other way round."""
    no_processes(monkeypatch)
    whole = shapes.of_size(TINY)
    setup = bench_policies.Setup(whole, whole.downsampled(5), (0.25,), 1, TINY, answer=2, decode_tokens=1)
    rows = {row["name"]: row for row in bench_policies.measure(setup, batches=(1,))["rows"]}
    assert rows["m3"]["throughput"] == {"1": None} and rows["m3"]["throughput_policy"] is None
    assert all(row["throughput"]["1"] > 0 for name, row in rows.items() if name != "m3")
    setup = bench_policies.Setup(whole.downsampled(5), whole, (0.25,), 1, None, answer=2, decode_tokens=1)
    names = [row["name"] for row in bench_policies.measure(setup, batches=(1,))["rows"]]
    assert "m3" not in names and "fastv" in names


def test_setups() -> None:
    assert bench_policies.choose(False, "cuda", "internvl2-8b").shape == shapes.SHAPES["internvl2-8b"]
    assert bench_policies.choose(False, "cuda").shape == shapes.SHAPES["llava-1.5-7b"]
    assert bench_policies.choose(False, "cpu").shape.vision_tokens == midsize.MIDSIZE.vision_tokens
    assert bench_policies.choose(True, "cpu", "llava-next-7b").shape.family == "llava_next"
    assert bench_policies.choose(False, "cpu", "llava-next-mid").shape.vision_tokens == 5 * 576 + 48
    with pytest.raises(ValueError, match=r"choose one of llava-next-mid"):
        bench_policies.choose(True, "cpu", "gpt-2")
    with pytest.raises(ValueError, match="needs a GPU"):
        bench_policies.choose(False, "cpu", "llava-1.5-7b")


# -------------------------------------------------------------------------------------------------------------- batch
def test_batch() -> None:
    body = bench_batch.measure(TINY, repeats=2)
    assert json.loads(json.dumps(body)) == body
    assert [row["name"] for row in body["rows"]] == list(bench_batch.mixes(TINY))
    for row in body["rows"]:
        assert len(row["policies"]) == len(row["tokens"]) == 8
        for spec in {*row["policies"]} - {"none"}:
            vtr.policy(spec).check(TINY.layers)
        for key in ("over_rows", "over_padded"):
            assert 0 < row[key + "_low"] <= row[key] <= row[key + "_high"]
        assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
    tokens = {row["name"]: row["tokens"] for row in body["rows"]}
    assert tokens["all unreduced"] == [44] * 8 and tokens["half without image"] == [44] * 4 + [8] * 4
    assert len(set(tokens["short and long"])) == 8
    assert body["rows"][0]["policies"] == ["none"] * 8


# -------------------------------------------------------------------------------------------------------------- scale
def test_slope() -> None:
    x = [16, 64, 256, 1024]
    assert bench_scale.slope(x, [3.0 * n**1.7 for n in x]) == pytest.approx(1.7)


def test_scale() -> None:
    body = bench_scale.measure(LADDER)
    assert json.loads(json.dumps(body)) == body
    wanted = {"vision_tokens": [36, 72, 144], "batch": [1, 2, 3], "answer": [4, 8, 12]}
    specs = ["none", *(at_share(name, 0.25, 6, 6).spec for name in bench_scale.NAMES)]
    assert [(line["axis"], line["policy"]) for line in body["series"]] == [(a, s) for a in wanted for s in specs]
    for line in body["series"]:
        assert line["x"] == wanted[line["axis"]] and len(line["ms"]) == len(line["x"])
        assert all(0 < point["low"] <= point["median"] <= point["high"] for point in line["ms"])
        assert line["slope"] == bench_scale.slope(line["x"], [point["median"] for point in line["ms"]])
    for line in body["series"]:
        if line["axis"] == "answer":  # points of one long answer
            assert [p["median"] for p in line["ms"]] == sorted(p["median"] for p in line["ms"])


def test_an_answers_time_is_its_prompt_and_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill gives the first token; every later one has its own time."""
    growth = bench_scale.Growth(
        LADDER, vtr.patch(midsize.build(TINY, "cpu", torch.float32)), {"none": None}, 0, lambda: None
    )
    monkeypatch.setattr(bench_scale, "prefill", lambda *args, **kwargs: 100.0)
    monkeypatch.setattr(bench_scale, "decode_in_turns", lambda starts, *args: {name: [1.0] * 11 for name in starts})
    x, found = growth.answer()
    assert x == [4, 8, 12] and found == {"none": [[103.0] * 2, [107.0] * 2, [111.0] * 2]}


def test_the_ladders_reach_as_far_as_they_say() -> None:
    for ladder in (bench_scale.CPU, bench_scale.CUDA):
        tokens = [pictures * ladder.size.vision_tokens for pictures in ladder.pictures]
        assert tokens[0] == 576 and tokens[-1] == 29952
        assert (ladder.batches[0], ladder.batches[-1]) == (1, 64)
        assert (ladder.answers[0], ladder.answers[-1]) == (16, 2048)
    assert bench_scale.SMALL.pictures[-1] * 576 == 4608


def test_marks_measure_seconds() -> None:
    cpu = torch.device("cpu")
    start = mark(cpu)
    assert 0 <= between(start, mark(cpu)) < 1


# ----------------------------------------------------------------------------------------------------------- commands
def run(*args: str, width: int = 120) -> Any:
    return CliRunner().invoke(app, ["bench", *args], env={"COLUMNS": str(width)})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    no_processes(monkeypatch)
    monkeypatch.setattr(midsize, "SMALL", TINY)
    monkeypatch.setattr(bench_batch, "SIDES", {"small": 6})
    monkeypatch.setattr(bench_scale, "SMALL", LADDER)
    monkeypatch.setattr(bench_policies, "choose", lambda small, device, shape: replace(tiny_setup(), budgets=(0.25,)))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("command", "shown"),
    [
        pytest.param(
            "policies", ["downsample", "pool", "GFLOPs", "req/s", "36 vision", "closed form"], marks=pytest.mark.slow
        ),
        ("batch", ["all unreduced", "four pooled", "padded"]),
        ("scale", ["vision_tokens", "144:", "slope", "answer"]),
    ],
)
def test_commands_print_write_and_draw(small: None, tmp_path: Any, command: str, shown: list[str]) -> None:
    result = run(command, "--small", "--repeats", "1", "--seed", "3", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    for word in shown:
        assert word in result.output
    data = results.load(tmp_path / f"{command}.json")
    assert (data["kind"], data["seed"]) == (command, 3)
    assert data["hardware"]["name"] and data["versions"]["torch"] == torch.__version__
    assert data["model"]["text"]["hidden_size"] == 32
    assert (tmp_path / f"{command}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_json_names_the_file_and_the_plot_stands_beside_it(small: None, tmp_path: Any) -> None:
    result = run("batch", "--small", "--repeats", "1", "--json", str(tmp_path / "mine.json"))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "mine.png"]


def test_plots_hold_every_series(body: dict[str, Any]) -> None:
    figure = plots.policies(body)
    names = {row["name"] for row in body["rows"]}
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == names
    point = {"median": 2.0, "low": 1.0, "high": 3.0}
    lines = [{"axis": a, "policy": p, "x": [1, 2], "ms": [point] * 2, "slope": 0.5} for a in plots.AXES for p in "ab"]
    figure = plots.scale({"series": lines})
    assert [axis.get_xlabel() for axis in figure.axes] == list(plots.AXES.values())
    assert all(axis.get_xscale() == axis.get_yscale() == "log" for axis in figure.axes)
    assert "n^0.50" in figure.axes[0].get_legend().get_texts()[0].get_text()


def test_help_teaches() -> None:
    for command, words in {
        "policies": ["--shapes", "--policy", "--budget", "closed form", "downsample"],
        "batch": ["--json", "--out", "alone"],
        "scale": ["slope", "--small", "quadratic"],
    }.items():
        text = " ".join(run(command, "--help").output.split())
        assert f"vtr bench {command} --" in text
        for word in words:
            assert word in text, word


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["policies", "--device", "tpu"], "choose cpu or cuda"),
        (["policies", "--shapes", "llava-1.5-7b"], "needs a GPU"),
        (["policies", "--shapes", "mine"], "choose one of llava-next-mid"),
        (["policies", "--small", "--policy", "fastvv"], "unknown policy"),
        (["policies", "--small", "--budget", "25"], "between 0 and 1"),
        (["batch", "--dtype", "int4"], "choose one of float32"),
        (["scale", "--repeats", "0"], "needs at least 1"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(midsize, "SMALL", TINY)
    result = run(*args, width=200)
    assert result.exit_code == 1 and message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_the_engines_command_is_where_it_was() -> None:
    assert "pruned_over_limit" in run("engine", "--help").output
    assert bench_engine.cached_bytes is peak_memory.cached_bytes
