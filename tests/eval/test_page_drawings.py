"""What the page says in words, and its drawings: fronts, labels, scales, numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vtr.eval.report.page import cells, plots, svg, words
from vtr.eval.report.page.data import Result, read

from tests import result_files


# -- words -------------------------------------------------------------------------------------------------------------
def row(name: str, low: float, ms: float) -> dict[str, Any]:
    versus = {"difference": low + 0.01, "low": low, "high": low + 0.02}
    costs = {"mean_keep": 0.5, "kv_mib": 1.0, "gflops": 1.0, "prefill_ms": {"median": ms}}
    return {"policy": f"{name}:keep=0.5", "name": name, "versus_none": versus, **costs}


def finding(*rows: dict[str, Any]) -> str:
    none = {**row("none", 0.0, 100.0), "policy": "none", "kv_mib": 4.0}
    data = {"kind": "eval", "policies": [none, *rows]}
    return " ".join(re.sub("<[^>]+>", "", s) for s in words.finding(Result(Path("x.json"), data)))


def test_the_headline_is_the_cheapest_that_is_as_good_as_none() -> None:
    text = finding(row("fastv", -0.021, 10.0), row("gsearch", -0.02, 20.0), row("pyramid", 0.0, 30.0))
    assert "whose interval stays within 2 points of no reduction is gsearch:keep=0.5: −1.0 points [−2.0, +0.0]" in text
    assert "prefill 5.0× faster, KV cache 4.0× smaller" in text and "baseline" not in text


def test_the_headline_does_not_hide_a_baseline_that_does_as_well() -> None:
    text = finding(row("fastv", 0.0, 20.0), row("uniform", -0.01, 10.0), row("random", -0.5, 1.0))
    assert "The cheapest plain baseline that does is uniform:keep=0.5" in text and "prefill 10.0× faster" in text
    text = finding(row("fastv", -0.5, 20.0), row("random", -0.5, 1.0))
    assert text == "No method’s interval stays within 2 points of no reduction."
    assert "No plain baseline" in finding(row("fastv", 0.0, 20.0), row("random", -0.5, 1.0))


def test_without_all_times_the_cheapest_is_by_flops() -> None:
    slow, untimed = row("fastv", 0.0, 20.0), {**row("gsearch", 0.0, 1.0), "prefill_ms": None, "gflops": 0.5}
    assert words.cheapest([slow, untimed]) is untimed
    assert words.cheapest([slow, {**untimed, "gflops": 2.0}]) is slow
    assert words.cheapest([row("fastv", -0.1, 1.0)]) is None


def test_limits_follow_from_what_was_measured(result_folder: Path, tmp_path: Path) -> None:
    found = [read(path) for path in sorted(result_folder.glob("*.json"))]
    text = " ".join(words.limits(found))
    for part in (
        "3.5 M parameters",
        "15 comparisons",
        "p\u00a0<\u00a00.0033",
        "3 samples could not be read",
        "CPU cores",
    ):
        assert part in text
    alone = " ".join(words.limits([read(path) for path in result_files.write(tmp_path, "scale")]))
    assert "pocket" not in alone and "comparisons" not in alone and "random weights" in alone


# -- plots -------------------------------------------------------------------------------------------------------------
def point(cost: float, accuracy: float) -> plots.Point:
    return plots.Point("fastv", f"fastv {cost:g}", cost, accuracy, accuracy - 0.01, accuracy + 0.01, "title")


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    points = [point(1, 0.5), point(2, 0.5), point(2, 0.7), point(3, 0.6), point(4, 0.9)]
    assert plots.front(points) == [points[0], points[2], points[4]]


def test_labels_do_not_lie_on_each_other_or_on_points() -> None:
    rng = np.random.default_rng(0)
    points = [point(float(c), float(a)) for c, a in rng.uniform(0.4, 1.0, (40, 2))]
    drawing = str(plots.pareto(points, "ms", plots.styles(["fastv"])))
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="start" class="label c0">([^<]+)', drawing)
    boxes = [(float(x), float(y) - 9, float(x) + svg.CHAR * len(t), float(y) + 3) for x, y, t in found]
    assert len(boxes) >= 3
    marks = [(float(x) + 4.5, float(y)) for x, y in re.findall(r'<path d="M([\d.]+),([\d.]+)a', drawing)]
    assert len(marks) == 40
    for i, box in enumerate(boxes):
        assert not any(svg.overlap(box, other) for other in boxes[i + 1 :])
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in marks)


def test_scales_and_their_ticks() -> None:
    linear = svg.Scale(0.0, 10.0, 100.0, 0.0)
    assert linear(2.5) == 75.0 and linear.ticks() == [0, 2, 4, 6, 8, 10]
    log = svg.Scale(1.0, 1000.0, 0.0, 300.0, log=True)
    assert log(10.0) == pytest.approx(100.0) and log.ticks() == [1, 10, 100, 1000]
    assert svg.Scale(0.895, 0.99, 0, 1).ticks() == [0.9, 0.92, 0.94, 0.96, 0.98]
    assert svg.Scale(40.0, 44.0, 0, 1, log=True).ticks() == [40, 41, 42, 43, 44]  # no round power in it
    with pytest.raises(ValueError, match="choose one of circle"):
        svg.outline(0, 0, "star", 1)


def test_baselines_are_hollow_and_methods_differ() -> None:
    look = plots.styles(["none", "random", "uniform", *(f"m{i}" for i in range(17))])
    assert (look["none"].css, look["random"].css, look["uniform"].css) == ("none", "base", "base")
    assert len(set(look.values())) == len(look) == 20


def test_numbers_are_written_as_one_reads_them() -> None:
    shown = [cells.number(v) for v in (None, 0, 0.0123, 1.5, 43.0, 99.96, 123.4, 12345.6)]
    assert shown == ["–", "0", "0.0123", "1.50", "43.0", "100", "123", "12,346"]
    assert [cells.chance(p).text for p in (None, 0.0, 0.03, 0.5)] == ["–", "< 0.001", "0.030", "0.50"]
