"""A new policy is one file: put into a room of vtr/policies, it takes part in everything without another edit."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from vtr.eval.accuracy.contenders import Shapes, contenders
from vtr.eval.cost.contenders import shipped

import vtr
from tests import support
from tests.families import FAMILIES
from vtr import settings
from vtr.cli import app
from vtr.policies import decoder
from vtr.testing import check_policy

NAME = "median-norm"
FILE = '''"""A throw-away policy of the tests."""

from dataclasses import dataclass

import vtr


@vtr.register_policy("median-norm")
@dataclass
class MedianNorm(vtr.ScorePolicy):
    """The vision tokens whose hidden states are nearest to the median norm stay."""

    def score(self, tokens):
        norms = tokens.hidden.float().norm(dim=-1)
        return -(norms - norms.median()).abs()
'''


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "median_norm.py").write_text(FILE)
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))
    monkeypatch.setattr(decoder, "__path__", [*decoder.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    module = importlib.import_module("vtr.policies.decoder.median_norm")
    yield
    sys.modules.pop(module.__name__)


def test_it_takes_part_in_everything() -> None:
    assert len(FILE.splitlines()) <= 30
    assert NAME in CliRunner().invoke(app, ["list"], env={"COLUMNS": "200"}).output
    assert vtr.MedianNorm(64).spec == "median-norm:keep=64"  # type: ignore[attr-defined]
    assert NAME in shipped()
    specs = {one.name: one.spec for one in contenders(["all"], Shapes(10, 12))[0]}
    assert re.fullmatch(r"median-norm:keep=0\.\d+", specs[NAME])
    assert len(check_policy(vtr.policy(NAME), families=("llava",)).passed) >= 12


def test_it_has_a_row_in_the_table_of_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "POLICIES", support.policies())
    assert f"\n| `{NAME}` | ✓ |" in support.table(support.declared())
    models = support.Models.from_family(FAMILIES[0])
    inputs = models.inputs()
    with torch.no_grad():
        models.patched(**inputs, policy=models.mixed(NAME, inputs))
    row = vtr.report(models.patched).rows[0]
    assert row.policy is not None and row.policy.startswith(NAME) and row.vision_tokens[-1] < row.total
