"""The pages of the methods, and the pages that choose among them, say what the code and the result files say."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import vtr
from vtr.settings import policy_class

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    "fastv": "fastv", "gsearch": "gsearch", "pyramid": "pyramid", "matryoshka": "m3", "globalcom2": "globalcom2",
    "pmod": "pmod", "dynamic-llava": "dynamic-llava", "baselines": "autoscale", "by-image": "by_image",
}  # fmt: skip
"""Page → the policy whose options its table lists."""


def options(text: str) -> dict[str, Any]:
    """Option → default of a page's table; a dash (nothing to show) as None."""
    rows = re.search(r"\| option \| default \| \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", text)
    assert rows is not None, "there is no table of options"
    found: dict[str, Any] = {}
    for row in rows[1].splitlines():
        names, defaults = (cell.strip() for cell in row.split(" | ")[:2])
        keys = re.findall(r"`(\w+)[`=]", names)
        shown = defaults.replace("`", "")
        values = (None,) * len(keys) if shown == "–" else ast.literal_eval(shown)
        for key, value in zip(keys, values if len(keys) > 1 else [values], strict=True):
            found[key] = value
    return found


def sections() -> dict[str, str]:
    """Policy → its section of the pages on several methods."""
    found: dict[str, str] = {}
    for page in ("input", "picture", "question", "video", "inside"):
        parts = re.split(r"^## `([\w-]+)`.*\n", (DOCS / "methods" / f"{page}.md").read_text(), flags=re.M)
        found |= dict(zip(parts[1::2], parts[2::2], strict=True))
    return found


ROOMS = ("vtr.policies.input.", "vtr.policies.picture.", "vtr.policies.question.", "vtr.policies.decoder.")
IN_ROOMS = [name for name in vtr.list_policies() if policy_class(name).__module__.startswith(ROOMS)]


@pytest.mark.parametrize("name", sorted(set(IN_ROOMS) - {"cls", "downsample", *PAGES.values()}))
def test_every_method_has_a_section(name: str) -> None:
    """With its options and their defaults, its source, and a citation."""
    text = sections()[name]
    check_options(name, text)
    source = re.search(r"arxiv\.org/abs/(\d{4}\.\d{5})|(github\.com/Tencent/AngelSlim)", text)
    assert source is not None and (source[1] or source[2]) in (DOCS / "citations.md").read_text()
    assert re.search(rf"`vtr\.{policy_class(name).__name__}\(", (DOCS / "policies.md").read_text())


@pytest.mark.parametrize("page", PAGES)
def test_every_option_is_there_with_its_default(page: str) -> None:
    check_options(PAGES[page], (DOCS / "methods" / f"{page}.md").read_text())


def check_options(name: str, text: str) -> None:
    cls, listed = policy_class(name), options(text)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    assert listed.keys() - {"weights"} == fields.keys()
    for name, field in fields.items():
        if field.default is not dataclasses.MISSING:
            assert repr(listed[name]) == repr(field.default), name


@cache
def result(path: str) -> Any:
    return json.loads((ROOT / path).read_text())


def row(path: str, name: str) -> dict[str, Any]:
    """A policy's row of a ``vtr eval`` result, by its name or spec."""
    return next(r for r in result(path)["policies"] if name in (r["name"], r["policy"]))


def accuracy(path: str, name: str) -> str:
    return f"{100 * row(path, name)['accuracy']:.1f} %"


def points(part: dict[str, Any]) -> str:
    """−6.6 points [−7.7, −5.5]"""
    middle, low, high = (100 * part[key] for key in ("difference", "low", "high"))
    return f"{middle:.1f} points [{low:+.1f}, {high:+.1f}]".replace("-", "−")


POCKET, SCALES = "eval/results/pocket.json", "eval/results/scales.json"
ELEVEN, INSIDE = "eval/results/pocket-11.json", "eval/results/inside.json"
WHERE = {
    "fastv": "fastv", "pyramid": "pyramid", "random": "baselines", "uniform": "baselines", "pool": "baselines",
    "cls": "baselines", "autoscale": "baselines", "pmod": "pmod", "dynamic-llava": "dynamic-llava",
}  # fmt: skip


@pytest.mark.parametrize("name", WHERE)
def test_accuracy_on_two_thousand_questions(name: str) -> None:
    page = (DOCS / "methods" / f"{WHERE[name]}.md").read_text()
    assert accuracy(POCKET, name) in page
    assert points(row(POCKET, name)["versus_none"]) in page
    if name not in ("cls", "autoscale", "pmod"):  # those said to be at a mean of a quarter
        assert 0.24 < row(POCKET, name)["mean_keep"] < 0.26


def test_the_table_that_chooses() -> None:
    page = (DOCS / "choosing.md").read_text()
    for name in ("m3", "pyramid", "fastv", "globalcom2", "cls"):
        assert points(row(POCKET, name)["versus_none"]) in page, name
    assert f"{accuracy(POCKET, 'uniform')[:-2]} against {accuracy(POCKET, 'none')}" in page
    assert f"{accuracy(ELEVEN, 'uniform')} at 11 %" in page
    assert f"{accuracy(POCKET, 'random')[:-2]} and {accuracy(POCKET, 'uniform')} at a quarter" in page
    ranked = [row(POCKET, name)["accuracy"] for name in ("fastv", "pyramid", "gsearch")]
    assert f"have {100 * min(ranked):.1f} to {100 * max(ranked):.1f} %" in page
    rows = {r["spec"]: r for r in result("docs/results/budgets.json")}
    early, late = rows["fastv:keep=0.25,layer=1"], rows["fastv:keep=0.1,layer=2"]
    assert abs(early["gflops"] - late["gflops"]) < 0.01 * early["gflops"]
    assert f"has {early['correct'] / 3.2:.1f} % with" in page and f"and {late['correct'] / 3.2:.1f} % with" in page


def test_what_long_answers_leave_of_the_gain() -> None:
    page = (DOCS / "choosing.md").read_text()
    lines = {s["policy"]: dict(zip(s["x"], s["ms"], strict=True)) for s in result("eval/results/scale.json")["series"]
             if s["axis"] == "answer"}  # fmt: skip
    for tokens, written in ((16, "saves {} % of a request"), (256, "tokens {} %")):
        none = lines["none"][tokens]["median"]
        saved = [round(100 * (1 - ms[tokens]["median"] / none)) for name, ms in lines.items() if name != "none"]
        assert written.format(f"{min(saved)}–{max(saved)}") in " ".join(page.split())


def test_costs_of_choosing() -> None:
    for name, times, written in (("gsearch", 3, "over three times"), ("pyramid", 5, "over five times")):
        assert row(POCKET, name)["selector_ms"] > times * row(POCKET, "fastv")["selector_ms"]
        assert f"{written} what FastV's does" in " ".join((DOCS / "methods" / f"{name}.md").read_text().split())


def test_small_budgets_and_scales() -> None:
    fastv, m3 = ((DOCS / "methods" / f"{page}.md").read_text() for page in ("fastv", "matryoshka"))
    for name in ("fastv", "random"):
        assert accuracy(SCALES, name) in fastv and f"{row(SCALES, name)['mean_keep']:.1%}".replace("%", " %") in fastv
    assert points(row(POCKET, "m3")["versus_none"]) in m3
    assert f"{accuracy(SCALES, 'm3:tokens=9')[:-2]} against {accuracy(SCALES, 'none')}" in m3
    assert accuracy(SCALES, "m3:tokens=1") in m3
    before = [accuracy("docs/results/m3-before.json", f"m3:tokens={n}") for n in (9, 1)]
    assert f"{before[0][:-2]} and {before[1]}" in m3


def test_globalcom2() -> None:
    page = (DOCS / "methods" / "globalcom2.md").read_text()
    assert accuracy(POCKET, "globalcom2") in page
    kept = [accuracy(SCALES, f"globalcom2:retention={r}")[:-2] for r in (0.75, 0.5, 0.25, 0.1)]
    assert f"{', '.join(kept)} %" in page


def test_schedules() -> None:
    page, found = (DOCS / "methods" / "gsearch.md").read_text(), result("docs/results/schedules.json")
    lines = {line["name"]: line for line in found["lines"]}
    none, bayes = lines["none"], lines["gsearch-bayes-from-2"]
    assert f"{none['flops'] / bayes['flops']:.2f}× fewer FLOPs" in page
    assert f"{none['prefill_ms']['median'] / bayes['prefill_ms']['median']:.2f}× faster" in page
    compared = {(c["a"], c["b"]): c for c in found["compared"]}
    assert points(compared["gsearch-bayes-from-2", "none"]) in page
    gains = [100 * c["difference"] for (a, b), c in compared.items() if a.startswith("psigmoid") and "FastV" in b]
    assert len(gains) == 5 and f"by {min(gains):.1f} to {max(gains):.1f} points" in page
    assert points(row(POCKET, "gsearch")["versus_none"]) in page


@pytest.mark.parametrize(("page", "name"), [("pmod", "p-MoD"), ("dynamic-llava", "Dynamic-LLaVA")])
def test_trained(page: str, name: str) -> None:
    text, short = (DOCS / "methods" / f"{page}.md").read_text(), result("docs/results/trained.json")["short"]
    lines = {line["name"]: line for line in short}
    assert f"{100 * lines[name]['accuracy']:.1f} %" in text
    assert f"at {100 * lines[name]['flops'] / lines['none']['flops']:.0f} % of the prefill FLOPs" in text
    chance = 100 * (lines[f"Random = {name}"]["accuracy"] - lines["none"]["accuracy"])
    assert f"{chance:.1f}".replace("-", "−") in text
    listed = {line["name"]: line["accuracy"] for line in result("docs/results/trained.json")["listed"]}
    for other in (name, *(f"{one} = {name}" for one in ("Random", "FastV", "GSearch"))):
        assert f" {100 * (listed['none'] - listed[other]):.1f}" in text, other


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("no reduction", "none"),
        ("p-MoD", "p-MoD"),
        ("Dynamic-LLaVA", "Dynamic-LLaVA"),
        ("FastV, at Dynamic-LLaVA's FLOPs", "FastV = Dynamic-LLaVA"),
        ("random, at p-MoD's FLOPs", "Random = p-MoD"),
        ("random, at Dynamic-LLaVA's FLOPs", "Random = Dynamic-LLaVA"),
    ],
)
def test_the_table_of_trained_policies(said: str, name: str) -> None:
    found = result("docs/results/trained.json")
    short, long = ({line["name"]: line for line in found[kind]} for kind in ("short", "listed"))
    flops, kv = (100 * short[name][key] / short["none"][key] for key in ("flops", "kv_bytes"))
    row = f"| {said} | {short[name]['accuracy']:.1%} | {long[name]['accuracy']:.1%} | {flops:.0f}% | {kv:.0f}%"
    assert row.replace("%", " %") in (DOCS / "weights.md").read_text()


def test_what_is_said_of_methods_before_the_decoder() -> None:
    """Ten lines of results, and two rows of the table that chooses."""
    results, choosing = ((DOCS / f"{name}.md").read_text() for name in ("results", "choosing"))
    for name in ("mmtok", "cdpruner", "pool", "tome", "scope", "uniform", "fastervlm"):
        middle, _, rest = points(row(ELEVEN, name)["versus_none"]).partition(" points")
        assert f"{middle.replace('−0.0', '+0.0')}{rest}" in " ".join(results.split()), name
    for name in ("mmtok", "cdpruner", "tome", "scope", "divprune"):
        assert points(row(ELEVEN, name)["versus_none"]).partition("[")[2] in choosing, name


def test_what_is_said_of_methods_inside_the_decoder() -> None:
    results, choosing = ((DOCS / f"{name}.md").read_text() for name in ("results", "choosing"))
    none, everywhere, half = row(POCKET, "none")["gflops"], 'ee-mllm:layers="all"', "ee-mllm:layers=0.5"
    for file, spec in ((INSIDE, everywhere), (POCKET, half)):
        one = row(file, spec)
        middle, low, high = (100 * one["versus_none"][key] for key in ("difference", "low", "high"))
        said = f"{middle:+.1f} points [{low:+.1f}, {high:+.1f}] at {100 * one['gflops'] / none:.0f} %"
        assert said.replace("-", "−") in choosing
    for file, spec, written in ((INSIDE, everywhere, "has {:.0f} % of"), (POCKET, half, "deeper half {:.0f} %"),
                                (POCKET, "zipvl:tau=0.975", "saves little here ({:.0f} %)")):  # fmt: skip
        assert written.format(100 * row(file, spec)["gflops"] / none) in " ".join(results.split()), spec
