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

import vtr
from tests import tiny
from vtr import settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_policy_of_the_readme_works(monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "register_policy" in block)
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))  # what it registers goes again
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    exec(code, module.__dict__)
    model = vtr.patch(tiny.llava())
    with torch.no_grad():
        model(**tiny.batch(model, [["ab", tiny.IMAGE, "cd"]]), policy="top-norm:keep=0.25")
    assert vtr.report(model).rows[0].vision_tokens == [36, 9, 9, 9, 9]


def test_its_commands_files_and_policies_exist() -> None:
    make = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in make
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for spec in re.findall(r"--policy (\S+)", README):
        if "weights=" in spec:  # of a folder that only the reader has
            assert spec.partition(":")[0] in vtr.list_policies()
        else:
            vtr.policy(spec.rstrip("`"))


def test_the_landing_page_has_its_order() -> None:
    """What and why, a picture, two commands, six lines, results, families and policies, limits; then the rest."""
    marks = [
        "side-by-side.png",
        "make demo",
        "vtr.patch(",
        "<!-- vtr:table pocket -->",
        "<!-- vtr:families -->",
        "## Limits",
    ]
    at = [README.index(mark) for mark in marks]
    assert at == sorted(at)


def numbers_in(file: Path) -> int:
    """How many numbers a file of weights holds; a policy's settings are counted where it has no other file."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            shapes = [opened.get_slice(name).get_shape() for name in names]
        return sum(torch.Size(shape).numel() for shape in shapes)
    return sum(map(len, json.loads(file.read_text())["settings"]["calibration"]))


def test_the_table_of_shipped_weights_is_that_of_the_files() -> None:
    rows = re.findall(r"^\| .+, `(vtr/pocket/\S+)` \| ([\d,]+) \| ([\d,.]+) \|$", README, re.M)
    told = {file: (int(count.replace(",", "")), float(size.replace(",", ""))) for file, count, size in rows}
    there = {str(file.relative_to(ROOT)) for file in (ROOT / "vtr" / "pocket").rglob("*.safetensors")}
    assert there <= told.keys(), "weights that the table does not name"
    for name, (count, size) in told.items():
        assert numbers_in(ROOT / name) == count, name
        assert round((ROOT / name).stat().st_size / 1000, 1) == size, name
