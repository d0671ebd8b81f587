"""What the README shows works."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import vtr
from tests import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_policy_of_the_readme_works(monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "register_policy" in block)
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
