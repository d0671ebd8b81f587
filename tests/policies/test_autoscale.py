"""AutoScale: what it tries, what it chooses, what it counts, and where it is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vtr
from tests import tiny
from vtr.chat import encode
from vtr.policies.trained.autoscale import calibrated
from vtr.training import autoscale as fit


@pytest.fixture(scope="module")
def pocket() -> tuple[Any, Any]:
    model, processor = vtr.pocket.load()
    return vtr.patch(model), processor


@pytest.fixture(scope="module")
def inputs(pocket: tuple[Any, Any]) -> Any:
    rows = list(vtr.pocket.samples(4, split="val", seed=1))
    return encode(pocket[1], [row["question"] for row in rows], [row["image"] for row in rows])


def generate(model: Any, inputs: Any, policy: Any, **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.generate(**inputs, **{"policy": policy, "max_new_tokens": 2, "do_sample": False, **more})


def row_of(inputs: Any, b: int) -> dict[str, torch.Tensor]:
    real = inputs["attention_mask"][b].bool()
    out = {name: inputs[name][b : b + 1] for name in ("pixel_values", "image_sizes")}
    return out | {name: inputs[name][b : b + 1, real] for name in ("input_ids", "attention_mask")}


# -- the cascade -------------------------------------------------------------------------------------------------------
def test_the_cascade_is_the_policy_it_chose(pocket: tuple[Any, Any], inputs: Any) -> None:
    """Tokens are those of the chosen scale; every row chooses as if alone; tries are what a row was not sure of."""
    model, _ = pocket
    policy = vtr.AutoScale(scales=[1, 9, 36], threshold=0.95)
    out = generate(model, inputs, policy)
    rows = vtr.report(model).rows
    assert torch.equal(out, generate(model, inputs, [row.policy for row in rows]))
    assert len({row.policy for row in rows}) > 1
    for b, row in enumerate(rows):
        ladder = ["m3:tokens=1", "m3:tokens=9", "m3:tokens=36"]
        chosen = ladder.index(str(row.policy))
        assert [spec for spec, _ in row.tries] == ladder[: min(chosen + 1, 2)]
        generate(model, row_of(inputs, b), policy)
        alone = vtr.report(model).rows[0]
        assert (alone.policy, alone.tries) == (row.policy, row.tries)


def test_all_tries_are_counted(pocket: tuple[Any, Any], inputs: Any) -> None:
    model, _ = pocket
    one = row_of(inputs, 0)
    costs = []
    for policy in ("m3:tokens=1", "m3:tokens=9", "m3:tokens=36"):
        generate(model, one, policy, max_new_tokens=1)
        costs.append(vtr.report(model).flops)
    never = vtr.AutoScale(scales=[1, 9, 36], threshold=1.0, calibration=[[0.0, 0.0]] * 2)
    generate(model, one, never, max_new_tokens=1)
    report = vtr.report(model)
    assert report.rows[0].policy == "m3:tokens=36" and len(report.rows[0].tries) == 2
    assert report.flops == sum(costs) == report.prefill_flops + report.decode_flops
    assert report.selector_ms > 0
    whole = vtr.AutoScale(scales=[1, 144], threshold=1.0, calibration=[[0.0, 0.0]])
    out = generate(model, one, whole, max_new_tokens=1)  # nothing is reduced in the end: still counted
    report = vtr.report(model)
    assert report.rows[0].policy is None and report.rows[0].tries == [("m3:tokens=1", 7)]
    assert torch.equal(out, generate(model, one, None, max_new_tokens=1))
    assert report.flops == vtr.report(model).flops + costs[0]


def test_the_tower_runs_once(pocket: tuple[Any, Any], inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pocket
    tower, runs = model.get_encoder(modality="image"), []
    real = type(tower).forward
    monkeypatch.setattr(type(tower), "forward", lambda self, *a, **k: runs.append(1) or real(self, *a, **k))
    generate(model, inputs, vtr.AutoScale(threshold=1.0))
    assert len(runs) == 2  # for all tries together, and for the answer
    with vtr.shared_features(model):
        generate(model, inputs, vtr.AutoScale(threshold=1.0))
    assert len(runs) == 3
    assert "forward" not in tower.__dict__


def test_it_shares_a_batch_with_other_policies(pocket: tuple[Any, Any], inputs: Any) -> None:
    model, _ = pocket
    auto = vtr.AutoScale(scales=[1, 9, 144], threshold=0.95)
    policies = [auto, "fastv:keep=0.3", None, auto]
    out = generate(model, inputs, policies)
    report = vtr.report(model)
    fixed = [row.policy for row in report.rows]
    assert fixed[1] == "fastv:keep=0.3" and fixed[2] is None and report.rows[1].tries == []
    assert torch.equal(out, generate(model, inputs, fixed))
    chained = generate(model, inputs, auto + vtr.FastV(keep=0.5))
    specs = [row.policy for row in vtr.report(model).rows]
    assert all("fastv" in str(spec) for spec in specs) and any("m3" in str(spec) for spec in specs)
    assert torch.equal(chained, generate(model, inputs, specs))


def test_threads_choose_for_themselves(pocket: tuple[Any, Any], inputs: Any) -> None:
    model, _ = pocket
    rows = [row_of(inputs, b) for b in range(4)]
    auto = vtr.AutoScale(scales=[1, 9, 36], threshold=0.95)
    want = [generate(model, row, auto) for row in rows]
    got: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda b=b: got.update({b: generate(model, rows[b], auto)})) for b in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(want[b], got[b]) for b in range(4))
    assert "forward" not in model.get_encoder(modality="image").__dict__


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family: str) -> None:
    """Rows with several images or none, any grid."""
    model = vtr.patch(getattr(tiny, family)())
    batch = tiny.batch(model, [["ab", tiny.IMAGE, "cd", tiny.IMAGE, "x"], ["text only"], ["a", tiny.IMAGE, "another"]])
    auto = vtr.AutoScale(threshold=1.0, answer_tokens=2)
    out = tiny.generate(model, batch, policy=auto, max_new_tokens=3)
    rows = vtr.report(model).rows
    assert rows[1].tries == [] and len(rows[0].tries) == len(rows[2].tries) > 0
    assert torch.equal(out, tiny.generate(model, batch, policy=[row.policy for row in rows], max_new_tokens=3))


# -- refused, before anything runs -------------------------------------------------------------------------------------
def test_where_nothing_can_be_tried(pocket: tuple[Any, Any], inputs: Any) -> None:
    from transformers import TextStreamer

    model, processor = pocket
    with pytest.raises(vtr.UnsupportedError, match=r"model\.generate"), torch.inference_mode():
        model(**inputs, policy="autoscale")
    streamer = TextStreamer(processor.tokenizer)
    for wrong in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"streamer": streamer}):
        with pytest.raises(vtr.UnsupportedError, match="fixed policy"):
            generate(model, row_of(inputs, 0), "autoscale", **wrong)
    with pytest.raises(ValueError, match="none of tiles of 12 × 12"):
        generate(model, inputs, vtr.AutoScale(scales=[1, 8]))
    with pytest.raises(ValueError, match="has no weights"):
        generate(model, inputs, vtr.AutoScale("router", scales=[1, 9]))
    with pytest.raises(ValueError, match="cannot act together with one that compresses"):
        vtr.AutoScale() + vtr.Matryoshka(9)
    assert generate(model, inputs, None).shape[0] == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "oracle"}, "'cascade' or 'router'"),
        ({"threshold": 0.0}, "a probability"),
        ({"threshold": 1}, "a probability"),
        ({"answer_tokens": 0}, "1 token at least"),
        ({"scales": [9]}, "at least two"),
        ({"scales": [36, 9]}, "coarsest to the finest"),
        ({"calibration": [[1.0, 0.0]]}, "name scales"),
        ({"scales": [1, 9], "calibration": [[1.0]]}, "slope, intercept"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vtr.AutoScale(**settings)


# -- fitting -----------------------------------------------------------------------------------------------------------
def made_up(n: int = 400) -> fit.Table:
    """Two thirds of the questions need the finer scale; confidence and inputs say which."""
    draw = np.random.default_rng(0)
    easy = draw.random(n) < 1 / 3
    sure = np.where(easy, 0.7 + 0.2 * draw.random(n), 0.4 + 0.2 * draw.random(n))
    right = np.stack([easy, np.ones(n, bool)], 1)
    inputs = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    inputs[:, 2] += torch.from_numpy(4.0 * easy)
    tokens = np.tile([10, 100], (n, 1))
    return fit.Table([1, 9], right, np.stack([sure, np.full(n, 0.99)], 1), tokens, inputs)


def test_what_a_threshold_gives() -> None:
    table = made_up(4)
    estimates = np.array([[0.9], [0.2], [0.9], [0.2]])
    accuracy = table.right[[0, 2], 0].sum() / 4 + 0.5
    assert fit.outcome(table, estimates, 0.5, tried=False) == (accuracy, (10 + 100) / 2)
    assert fit.outcome(table, estimates, 0.5, tried=True) == (accuracy, (20 + 110) / 2)


def test_both_choosers_learn_what_there_is_to_learn(tmp_path: Path) -> None:
    table = made_up()
    rest = table.part(slice(200, None))
    cascade, router = fit.fit_cascade(table, 0.01), fit.fit_router(table, 0.01)
    assert cascade.calibration is not None
    share = rest.right[:, 0].mean()
    accuracy, tokens = fit.outcome(rest, fit.cascade_estimates(rest, cascade.calibration), cascade.threshold, True)
    assert accuracy == 1 and tokens == pytest.approx(20 * share + 110 * (1 - share))
    accuracy, tokens = fit.outcome(rest, router.estimates(rest.inputs).numpy(), router.threshold, False)
    assert accuracy > 0.96 and tokens < 80
    router.save_pretrained(tmp_path)
    loaded = vtr.Policy.from_pretrained(tmp_path)
    assert isinstance(loaded, vtr.AutoScale) and loaded == router
    assert torch.equal(loaded.estimates(rest.inputs), router.estimates(rest.inputs))
    with pytest.raises(ValueError, match="hidden_size of 2, not 3"):
        loaded.estimates(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="a router's tensors are"):
        loaded.load_tensors({"mean": torch.zeros(3)})
    with pytest.raises(ValueError, match="has shape"):
        loaded.load_tensors({**router.tensors(), "std": torch.zeros(3)})
    assert calibrated(0.5, (1.0, 0.0)) == pytest.approx(0.5)


def test_every_question_is_asked_at_every_scale(pocket: tuple[Any, Any]) -> None:
    model, processor = pocket
    rows = list(vtr.pocket.samples(5, split="val", seed=2))
    data = [(row["image"], row["question"], row["answer"]) for row in rows]
    table = fit.ask_all(model, processor, data, [1, 36], batch_size=2, max_new_tokens=2)
    assert table.right.shape == table.sure.shape == table.tokens.shape == (5, 2)
    assert (table.tokens[:, 0] < table.tokens[:, 1]).all() and table.inputs.shape == (5, 3 * 160)
    assert ((table.sure > 0) & (table.sure <= 1)).all() and table.right[:, 1].mean() > 0.5
    with pytest.raises(ValueError, match="no data"):
        fit.ask_all(model, processor, [], [1, 36])
    with pytest.raises(ValueError, match="nothing to choose"):
        fit.ask_all(model, processor, data, [36])


@pytest.mark.parametrize("method", ["cascade", "router"])
def test_the_shipped_choosers(pocket: tuple[Any, Any], inputs: Any, method: str) -> None:
    model, _ = pocket
    policy = vtr.pocket.autoscale(method)
    generate(model, inputs, policy)
    assert all(row.vision_tokens[0] <= row.total for row in vtr.report(model).rows)
    with pytest.raises(ValueError, match="choose 'cascade'"):
        vtr.pocket.autoscale("oracle")
