"""Calibration data, splits that share no picture, presets and schedules for other depths, rank agreement."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vtr
from tests.search.search_models import questions, short
from vtr.schedule import presets
from vtr.search import Example, Split, examples, rank_agreement, split
from vtr.search.data import refuse_overlap
from vtr.search.ranking import Ranks


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, shade, shade))


def test_examples_come_from_triples_dicts_files_and_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    expected = [("what", "a"), ("who", "b")]
    rows = [{"image": picture(i), "question": q, "answer": a} for i, (q, a) in enumerate(expected)]
    picture(0).save(tmp_path / "0.png")
    picture(1).save(tmp_path / "1.png")
    lines = [json.dumps({**row, "image": f"{i}.png"}) for i, row in enumerate(rows)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    sources: list[Any] = [
        [(row["image"], row["question"], row["answer"]) for row in rows],
        iter(rows),
        tmp_path / "data.jsonl",
        str(tmp_path),
        datasets.Dataset.from_list(rows),
    ]
    for source in sources:
        found = examples(source)
        assert [(one.question, one.answer) for one in found] == expected
        assert [one.picture for one in found] == [Example(picture(i), "").picture for i in range(2)]


def test_of_several_answers_the_most_frequent_counts() -> None:
    made = examples([{"image": picture(0), "question": "q", "answers": ["two", "2", "2"]}, (picture(1), "q")])
    assert [one.answer for one in made] == ["2", None]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (("no picture", "q", "a"), "1 of 1 records cannot be used:\nrecord 0: picture: FileNotFoundError"),
        ((picture(0), "", "a"), "record 0: no question"),
        ((picture(0), "q", " "), "empty answer"),
        ((b"", "q", "a"), "record 0: no picture"),
        ((3, "q", "a"), "record 0: no picture: a file's name is text, got int"),
    ],
)
def test_records_that_cannot_be_used_are_named(record: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        examples([record])


@pytest.mark.parametrize("data", [3, {"image": 1}, [3], ["abc"]])
def test_data_of_another_kind_is_refused(data: Any) -> None:
    with pytest.raises(TypeError, match=r"\(image, question, answer\) triples"):
        examples(data)


def test_files_that_are_not_there_or_no_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data at"):
        examples(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        examples(tmp_path)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match="2 JSONL files"):
        examples(tmp_path)
    with pytest.raises(ValueError, match="no records"):
        examples([])


def test_a_split_is_fixed_and_shares_no_picture() -> None:
    data = [(picture(i // 3), f"q{i}", "a") for i in range(30)]
    made, again, other = (split(d, 9, seed) for d, seed in ((data, 0), (data[::-1], 0), (data, 1)))
    sides = [{one.picture for one in side} for side in (made.calibration, made.evaluation)]
    assert not sides[0] & sides[1] and len(made.calibration) == 9 and len(made.evaluation) == 21
    assert sides[0] == {one.picture for one in again.calibration}  # whatever the order the data came in
    assert sides[0] != {one.picture for one in other.calibration}


def test_measuring_on_calibration_pictures_is_refused_also_under_another_name(tmp_path: Path) -> None:
    picture(7).save(tmp_path / "same.png")
    same = examples([(str(tmp_path / "same.png"), "another question", "a")])
    with pytest.raises(ValueError, match="1 evaluation questions are about pictures that the search has seen"):
        Split(examples([(picture(7), "q", "a")]), same)
    with pytest.raises(ValueError, match="has seen"):
        refuse_overlap([Example(picture(7), "q").picture], same)
    with pytest.raises(ValueError, match="both sides"):
        split([(picture(0), "q", "a")], 1)


# -- presets and depths ------------------------------------------------------------------------------------------------
def test_published_schedules_are_presets_with_their_provenance() -> None:
    depths = {"llava-1.5-7b": 32, "internvl2-1b": 24, "internvl2-2b": 24, "internvl2-4b": 32, "internvl2-8b": 32}
    for name, depth in depths.items():
        policy, preset = vtr.GSearch(name), presets()[name]
        policy.check(depth)
        assert list(policy.schedule[:2]) == [1.0, 1.0] and policy.schedule[2] < 1.0
        assert "2412.00556" in preset.source and "read off the figure" in preset.source
        assert vtr.policy(policy.spec) == policy
    assert vtr.GSearch("LLaVA-1.5-7B").schedule.mean_keep(576) == pytest.approx(0.307, abs=0.003)
    assert vtr.policy("gsearch:schedule=internvl2-8b").schedule[5] == 0.791  # type: ignore[attr-defined]


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a file nor one of the presets: .*llava-1\.5-7b"):
        vtr.GSearch("llava-1.5-13b")


def test_another_depth_raises_unless_resampling_is_asked_for_which_warns() -> None:
    with pytest.raises(ValueError, match=r"GSearch\(…, layers=10\)"):
        vtr.GSearch("llava-1.5-7b").check(10)
    with pytest.warns(UserWarning, match="32 layers is resampled to 10"):
        short_one = vtr.GSearch("llava-1.5-7b", layers=10)
    short_one.check(10)
    whole = vtr.GSearch("llava-1.5-7b").schedule
    assert short_one.schedule[0] == 1.0 and short_one.schedule[-1] == whole[-1]
    assert short_one.schedule.mean_keep(1000) == pytest.approx(whole.mean_keep(1000), abs=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vtr.GSearch("llava-1.5-7b", layers=32).schedule == whole
        assert vtr.policy(short_one.spec) == short_one


def test_counts_are_resampled_too_and_mixtures_refused() -> None:
    with pytest.warns(UserWarning):
        assert vtr.Schedule([1.0, 100, 50]).resample(5) == vtr.Schedule([1.0, 100, 100, 75, 50])
    with pytest.raises(ValueError, match="cannot be resampled"):
        vtr.Schedule([1.0, 0.5, 50]).resample(5)
    with pytest.raises(ValueError, match="at least 1"):
        vtr.Schedule([1.0, 0.5]).resample(0)


# -- the assumption ----------------------------------------------------------------------------------------------------
def test_rank_agreement_is_measured_and_drawn(tmp_path: Path) -> None:
    model, processor = short(5)
    ranks = rank_agreement(model, processor, list(questions(2)))
    assert ranks.tau.shape == ranks.within.shape == (4, 4)
    assert np.allclose(np.diag(ranks.tau), 1) and np.allclose(ranks.tau, ranks.tau.T)
    assert np.allclose(np.diag(ranks.within), 1)
    assert (np.abs(ranks.tau) <= 1 + 1e-9).all()
    ranks.plot().savefig(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 5000


def test_rankings_that_disagree_are_warned_of() -> None:
    tau = np.eye(4)
    for i, value in enumerate((0.1, 0.9, 0.2)):
        tau[i, i + 1] = value
    ranks = Ranks(tau, tau, 1, "text")
    with pytest.warns(UserWarning, match=r"at 2–3 \(0\.20\): the assumption"):
        assert ranks.warning(start=2) is not None
    with pytest.warns(UserWarning, match=r"0–1 \(0\.10\), 2–3"):
        ranks.warning(start=1)
    good = Ranks(np.full((4, 4), 0.8), tau, 1, "text")
    assert good.warning(start=1) is None


def test_a_search_says_where_the_assumption_fails() -> None:
    model, processor = short(4)
    found = vtr.search.gsearch(
        model, processor, list(questions(2)), tolerance=0.5, levels=(0.1, 0.5), start=1, progress=False
    )
    neighbours = [found.record["ranks"]["tau"][i][i + 1] for i in range(2)]
    assert bool(found.record["warnings"]) == (min(neighbours) < 0.5)


def test_importing_vtr_does_not_import_the_search() -> None:
    code = (
        "import sys, vtr; print('vtr.search' in sys.modules, 'bayes_opt' in sys.modules, vtr.search.gsearch.__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False", "gsearch"]
