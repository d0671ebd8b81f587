"""Modules of version 0.1 that have moved: their old names still import, with a warning that says the new one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

ROOMS = {
    "vtr.eval.accuracy": "answers blind contenders data instructions journal kinds metrics processes run stats summary",
    "vtr.eval.cost": "interleave midsize peak_memory servable shapes timing",
    "vtr.eval.studies": "apart autoscale budgets equal_flops oracle schedule_report schedules trained",
    "vtr.eval.report": "page plots readme results",
    "vtr.policies.blind": "matryoshka pool random_keep uniform_grid",
    "vtr.policies.picture": "cls_top globalcom2",
    "vtr.policies.decoder": "fastv gsearch pyramid",
    "vtr.policies.trained": "autoscale dynamic_llava pmod",
}
MOVED = {"vtr.demo": "vtr.commands.run", "vtr.engine.memo": "vtr.engine.resolve"}
MOVED |= dict.fromkeys(("vtr.eval.downsample", "vtr.eval.accuracy.downsample"), "vtr.policies.input.downsample")
for _room, _names in ROOMS.items():
    MOVED |= {f"{_room.rpartition('.')[0]}.{_name}": f"{_room}.{_name}" for _name in _names.split()}
for _name in ("batch", "engine", "gate", "policies", "scale", "serve"):
    MOVED[f"vtr.eval.bench_{_name}"] = f"vtr.eval.cost.{_name}"
"""Old name → new name."""


class _Moved(Loader):
    """Imports the new module under the old name; ``python -m`` with the old name runs it."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new
        self.spec: Any = None

    def _warn(self) -> None:
        warnings.warn(f"{self.old} is now {self.new}", DeprecationWarning, stacklevel=2)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._warn()
        module = importlib.import_module(self.new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # importing has put the old name's in its place

    def get_code(self, name: str) -> CodeType | None:
        self._warn()
        loader: Any = getattr(find_spec(self.new), "loader", None)
        code: CodeType | None = loader.get_code(self.new)
        return code


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        new = MOVED.get(name)
        if new is None:
            return None
        return ModuleSpec(name, _Moved(name, new), origin=getattr(find_spec(new), "origin", None))


if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.append(_Finder())
