"""Parts of the evaluation: shared tower features, contenders at a budget, refused pictures, the journal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vtr.eval.accuracy import contenders
from vtr.eval.accuracy.answers import Bench
from vtr.eval.accuracy.contenders import Shapes, contender
from vtr.eval.accuracy.data import Sample
from vtr.eval.accuracy.journal import Journal
from vtr.eval.accuracy.metrics import METRICS

import vtr
from tests import tiny
from tests.families import FAMILIES, Family
from tests.support import ROWS

POCKET = Shapes(layers=10, side=12)


# -- the tower runs once -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shared_features_are_exact(family: str) -> None:
    """Same ids, logits and report as without, for every policy; the tower computes once."""
    model = vtr.patch(getattr(tiny, family)())
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "cd"], ["a", tiny.IMAGE, "another"]])
    policies: list[Any] = [None, "fastv:keep=0.3", "random:keep=0.5", [None, "uniform:keep=0.2"]]
    with torch.inference_mode():
        alone = [tiny.generate(model, inputs, policy=p, max_new_tokens=4) for p in policies]
        logits = model(**inputs, policy=policies[1]).logits
        with vtr.shared_features(model) as memo:
            shared = [tiny.generate(model, inputs, policy=p, max_new_tokens=4) for p in policies]
            assert (memo.computed, memo.reused) == (1, len(policies) - 1)
            assert torch.equal(model(**inputs, policy=policies[1]).logits, logits)
    assert all(map(torch.equal, alone, shared))
    assert "forward" not in model.get_encoder(modality="image").__dict__


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_policies_that_read_the_tower_share_its_run(family: Family) -> None:
    """What layers gave is handed on with the output: one run for all, once all the hooks are there."""
    model = vtr.patch(family.make())
    inputs = family.batch(model, ROWS)
    names = ("hiprune", "divprune", "globalcom2", "vscan", "holov", "mmtok")
    policies = [None, *(name for name in names if name not in family.adapter.unsupported), "hiprune:keep=0.3", None]
    with torch.inference_mode():
        alone = [family.generate(model, inputs, policy=p, max_new_tokens=3)[1] for p in policies]
        with vtr.shared_features(model) as memo:
            shared = [family.generate(model, inputs, policy=p, max_new_tokens=3)[1] for p in policies]
    assert all(map(torch.equal, alone, shared))
    # two runs where a policy needs more of the states than the model itself
    assert memo.computed <= 2 and memo.computed + memo.reused == len(policies)


def test_a_run_without_what_a_policy_reads_does_not_serve_it() -> None:
    """The hooks come with the first call that wants them: the run before has nothing of theirs."""
    model, other = vtr.patch(tiny.llava()), vtr.patch(tiny.llava())
    inputs = tiny.batch(model, [["ab", tiny.IMAGE, "cd"]])
    with torch.inference_mode():
        expected = tiny.generate(other, inputs, policy="hiprune:keep=0.5", max_new_tokens=4)
        with vtr.shared_features(model) as memo:
            tiny.generate(model, inputs, policy=None, max_new_tokens=4)
            first, again = (tiny.generate(model, inputs, policy="hiprune:keep=0.5", max_new_tokens=4) for _ in "12")
    assert torch.equal(first, expected) and torch.equal(again, expected)
    assert (memo.computed, memo.reused) == (2, 1)


def test_other_pixels_are_computed_anew() -> None:
    model = vtr.patch(tiny.llava())
    one, other = (tiny.batch(model, [["ab", tiny.IMAGE, "cd"]], seed=seed) for seed in (1, 2))
    with torch.inference_mode():
        expected = model(**other).logits
        with vtr.shared_features(model) as memo:
            model(**one)
            assert torch.equal(model(**other).logits, expected)
            assert torch.equal(model(**other).logits, expected)
    assert (memo.computed, memo.reused) == (2, 1)


def test_hooks_of_tower_and_projector_run_and_inner_hooks_forbid_reuse() -> None:
    model = vtr.patch(tiny.llava())
    inputs, tower = tiny.batch(model, [["ab", tiny.IMAGE, "cd"]]), model.get_encoder(modality="image")
    seen: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: seen.append(name)

    handles = [
        tower.register_forward_hook(note("tower")),
        model.model.multi_modal_projector.register_forward_hook(note("projector")),
    ]
    with torch.inference_mode(), vtr.shared_features(model) as memo:
        model(**inputs)
        model(**inputs)
        assert seen == ["tower", "projector"] * 2 and memo.reused == 1
        inner = next(m for m in tower.modules() if isinstance(m, torch.nn.LayerNorm))
        handles.append(inner.register_forward_hook(note("inside")))
        model(**inputs)
        assert seen.count("inside") == 1 and memo.reused == 1
    with vtr.shared_features(model) as memo:
        model(**inputs)  # with gradients
        model(**inputs)
    assert (memo.computed, memo.reused) == (0, 0)
    for handle in handles:
        handle.remove()


def test_a_forward_of_somebody_elses_is_put_back() -> None:
    model = vtr.patch(tiny.llava())
    tower = model.get_encoder(modality="image")
    theirs = tower.forward
    tower.forward = theirs
    with pytest.raises(KeyError), vtr.shared_features(model):
        raise KeyError
    assert tower.__dict__["forward"] is theirs
    with pytest.raises(ValueError, match="no vision tower"), vtr.shared_features(model.get_decoder()):
        pass


# -- contenders --------------------------------------------------------------------------------------------------------
def test_all_is_one_of_each_registered_policy_at_the_budget() -> None:
    found, only_all, left_out = contenders.contenders(["all"], POCKET)
    names = [one.name for one in found]
    assert names[0] == "none" and names[1:3] == ["random", "uniform"]
    assert set(names) | set(left_out) == {"none", "downsample", *vtr.list_policies()} - {"auto", "chain", "by_image"}
    assert only_all == found[1:]
    specs = {one.name: one.spec for one in found}
    assert specs["fastv"] == "fastv:keep=0.0625" and specs["random"] == "random:keep=0.25"
    assert specs["downsample"] == "downsample:scale=0.5"


def test_of_pictures_all_leaves_out_what_thins_films() -> None:
    thins = {"dycoke", "evs", "vidcom2"}
    assert thins <= {one.name for one in contenders.contenders(["all"], POCKET)[0]}
    found, _, left_out = contenders.contenders(["all", "evs:0.5"], replace(POCKET, films=False))
    assert thins & {one.name for one in found} == {"evs"}  # named
    assert {left_out[name] for name in thins} == {"it thins films, and leaves pictures whole"}


def test_a_new_policy_takes_part_without_a_word_here() -> None:
    from dataclasses import dataclass

    from vtr import settings
    from vtr.shares import nearest_side

    @vtr.register_policy("test-tiles")
    @dataclass
    class Tiles(vtr.Policy):
        grid: int = 3

        @classmethod
        def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> Any:
            return {"grid": nearest_side(share, side)}

    @vtr.register_policy("test-needs-weights")
    @dataclass
    class Trained(vtr.Policy):
        weights: str

    try:
        found, _, left_out = contenders.contenders(["all"], POCKET)
    finally:
        for name in ("test-tiles", "test-needs-weights"):
            settings._POLICIES.pop(name)
    assert "test-tiles:grid=6" in [one.spec for one in found]
    assert "needs weights" in left_out["test-needs-weights"]


def test_specs_of_contenders() -> None:
    found, only_all, _ = contenders.contenders(["none", "fastv:keep=0.25 ; random:keep=36"], POCKET)
    assert [one.spec for one in found] == ["none", "fastv:keep=0.25", "random:keep=36"] and not only_all
    both = contender("downsample:scale=0.5+fastv:keep=0.25,layer=3")
    assert (both.spec, both.before) == ("downsample:scale=0.5+fastv:keep=0.25,layer=3", vtr.Downsample(0.5))
    assert isinstance(both.policy, vtr.FastV)
    assert contender("downsample").spec == "downsample:scale=0.5"
    for spec, said in {
        "fastvv": "unknown policy",
        "downsample:factor=2": "no setting 'factor'",
        "downsample:scale=2": "lies in",
        "fastv:layer=12": "10 decoder layers",
        "random;random": "there twice",
    }.items():
        with pytest.raises(ValueError, match=said):
            contenders.contenders([spec], POCKET)
    with pytest.raises(TypeError, match="a number"):
        contender("downsample:scale=x")
    with pytest.raises(ValueError, match="between 0 and 1"):
        contenders.contenders(["all"], POCKET, budget=1.5)
    _, _, left_out = contenders.contenders(["all"], POCKET, budget=0.05)
    assert {"fastv", "gsearch"} <= left_out.keys()  # in a tenth of the layers all tokens stand


# -- pictures that a processor refuses --------------------------------------------------------------------------------
class Refusing(Bench):
    """Its processor takes no picture of these samples, and nobody in a batch of more than ``most``."""

    refused: tuple[str, ...] = ()
    most = 9

    def encode(self, samples: Any, pictures: Any) -> Any:
        if len(samples) > self.most or any(sample.id in self.refused for sample in samples):
            raise KeyError("aspect ratio")
        return [sample.id for sample in samples]


def test_a_picture_the_processor_refuses_is_a_bad_sample() -> None:
    made = [Sample(i, str(i), "q", ("a",), None, "all", "g", lambda: Image.new("RGB", (4, 4))) for i in range(3)]
    bench = Refusing(None, None, [], METRICS["exact"])
    bench.refused = ("1",)
    batch = bench.prepare(made)
    assert [sample.id for sample in batch.samples] == batch.inputs == ["0", "2"]
    assert [(bad.index, bad.reason) for bad in batch.bad] == [(1, "processor: KeyError: 'aspect ratio'")]
    bench.refused, bench.most = (), 1
    with pytest.raises(KeyError, match="aspect ratio"):
        bench.prepare(made)  # none of them alone is the reason


# -- the journal -------------------------------------------------------------------------------------------------------
def test_processes_share_a_journal(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, 0), Journal(tmp_path, 1)
    first.begin({"a": 1}, resume=False)
    first.append([{"index": 0, "x": 1}, {"index": 1, "x": 1}])
    second.append([{"index": 3, "x": 2}, {"index": 2, "x": 2}])
    (tmp_path / "samples_mine.jsonl").write_text("not ours\n")
    with (tmp_path / "samples.1.jsonl").open("a") as file:
        file.write('{"index": 4, "x"')
    again = Journal(tmp_path, 1)
    again.read()
    assert sorted(again.rows) == [0, 1, 2, 3] and again.redone == 1
    assert (tmp_path / "samples.1.jsonl").read_text().endswith('"x":2}\n')
    merged = Journal(tmp_path, 0).merge()
    assert [row["index"] for row in merged] == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["samples.jsonl", "samples_mine.jsonl"]
