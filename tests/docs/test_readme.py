"""What the README shows works."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from vtr.eval.cost import decode

import vtr
from tests import tiny
from vtr import settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
WEIGHTS = (ROOT / "docs" / "weights.md").read_text()


def test_the_policy_of_the_readme_works(monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "register_policy" in block)
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))  # what it registers goes again
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    exec(code, module.__dict__)
    model = vtr.patch(tiny.llava())
    with torch.no_grad():
        model(**tiny.batch(model, [["ab", tiny.IMAGE, "cd"]]), policy="top-norm:keep=0.25")
    assert vtr.report(model).rows[0].vision_tokens == [36, 36, 9, 9, 9]
    with torch.no_grad():  # the spec that stands below it: a count, also where there are fewer tokens
        model(**tiny.batch(model, [["ab", tiny.IMAGE, "cd"]]), policy="top-norm:keep=64,layer=1")
    assert vtr.report(model).rows[0].vision_tokens == [36] * 5 and '"top-norm:keep=64,layer=1"' in README


def test_its_commands_files_and_policies_exist() -> None:
    make = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in make
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for spec in re.findall(r"--policy (\S+)", README):
        if "weights=" in spec:  # of a folder that only the reader has
            assert spec.partition(":")[0] in vtr.list_policies()
        elif spec not in decode.EVERY:  # a name of `vtr bench decode`
            vtr.policy(spec.rstrip("`"))


def test_the_landing_page_has_its_order_and_is_short() -> None:
    """A picture, what one gains, install, two commands, one's own model, results, what to start with, limits."""
    marks = [
        "docs/pictures/idea.png",
        "**What you gain:**",
        "## Install",
        "make demo",
        "vtr.patch(",
        "<!-- vtr:table best:short -->",
        "**Start with",
        "## What it cannot do",
        "## Your own policy",
    ]
    at = [README.index(mark) for mark in marks]
    assert at == sorted(at)
    assert len(README.encode()) <= 12 * 1024


def test_what_the_readme_says_one_gains_is_measured() -> None:
    """The prefill's factor and the cache at a quarter, of every policy of the bench."""
    rows = json.loads((ROOT / "eval/results/policies.json").read_text())["rows"]
    none = next(row for row in rows if row["policy"] == "none")
    quarter = [row for row in rows if 0.24 < row["mean_keep"] < 0.26]
    faster = [none["prefill_ms"]["median"] / row["prefill_ms"]["median"] for row in quarter]
    assert f"a prefill {min(faster):.1f}–{max(faster):.1f} times as fast" in " ".join(README.split())
    best = {row["name"]: row for row in json.loads((ROOT / "eval/results/best.json").read_text())["policies"]}
    start = re.search(r"\*\*Start with `([^`]+)`", README)
    assert (
        start
        and best["uniform"]["policy"]
        == start[1]
        == max((row for row in best.values() if row["name"] != "none"), key=lambda row: row["accuracy"])["policy"]
    )
    assert all(
        best[name]["versus_none"]["difference"] >= -0.01 - 1e-9 for name in ("uniform", "m3", "random", "gsearch")
    )
    assert all(0.3 < row["kv_bytes"] / none["kv_bytes"] < 0.34 for row in quarter)  # "a third of the KV cache"


def test_nothing_is_installed_from_a_release_that_is_not_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for line in re.findall(r"pip install[^`#\n]*", page.read_text()):
            assert (
                "vision-token-reduction" not in line.replace("github.com/vision-token-reduction/vtr", "") or "@" in line
            )
    address = re.search(r'^Repository = "(\S+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert address and f"pip install git+{address[1]}\n" in README and f"git clone {address[1]} " in README


def numbers_in(file: Path) -> int:
    """How many numbers a file of weights holds; a policy's settings are counted where it has no other file."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if not name.endswith(".scale")]  # noqa: SIM118
            shapes = [opened.get_slice(name).get_shape() for name in names]
        return sum(torch.Size(shape).numel() for shape in shapes)
    return sum(map(len, json.loads(file.read_text())["settings"]["calibration"]))


def test_the_table_of_shipped_weights_is_that_of_the_files() -> None:
    rows = re.findall(r"^\| .+, `(vtr/pocket/\S+)` \| ([\d,]+) \| ([\d,.]+) \|$", WEIGHTS, re.M)
    told = {file: (int(count.replace(",", "")), float(size.replace(",", ""))) for file, count, size in rows}
    there = {str(file.relative_to(ROOT)) for file in (ROOT / "vtr" / "pocket").rglob("*.safetensors")}
    assert there <= told.keys(), "weights that the table does not name"
    for name, (count, size) in told.items():
        assert numbers_in(ROOT / name) == count, name
        assert round((ROOT / name).stat().st_size / 1000, 1) == size, name
