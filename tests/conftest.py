"""One thread (tiny models are slower on more), and the models that several test files share."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings

import vtr
from tests import tiny

torch.set_num_threads(1)

# `pytest tests/engine/test_properties.py --hypothesis-profile=long --hypothesis-seed=1` draws 13,000 cases. The default
# profile draws the same ones every time, unless a seed is given; .ci/full gives the fuzz targets 2,000 of a fresh seed
settings.register_profile("default", deadline=None, derandomize=True, max_examples=120, print_blob=True)
settings.register_profile("seeded", deadline=None, max_examples=120, print_blob=True)
settings.register_profile("fuzz", deadline=None, max_examples=2000, print_blob=True)
settings.register_profile("more", deadline=None, max_examples=400, print_blob=True)
settings.register_profile("long", deadline=None, max_examples=3334, print_blob=True)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """A seed counts for nothing in a profile that always draws the same: then take the one that does not."""
    if config.getoption("--hypothesis-seed", None) is not None and not config.getoption("--hypothesis-profile", None):
        settings.load_profile("seeded")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``sample(k)``, enough cases stay that each value of each parameter is met k times.

    The others become slow: ``.ci/full`` runs them all. The choice is the same in every run.
    """
    cases: dict[tuple[Path, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("sample") and hasattr(item, "callspec"):
            if item.get_closest_marker("slow"):
                continue
            cases.setdefault((item.path, item.originalname), []).append(item)
    for several in cases.values():
        (times,) = several[0].get_closest_marker("sample").args  # type: ignore[union-attr]
        kept = sampled([values(item) for item in several], times)
        for number, item in enumerate(several):
            if number not in kept:
                item.add_marker(pytest.mark.slow)


def values(item: pytest.Function) -> set[Any]:
    """The values of a case's parameters; of a name of several parts (llava-qwen2-sdpa), each part is one."""
    found: set[Any] = set()
    for name, value in item.callspec.params.items():
        parts = value.split("-") if isinstance(value, str) else [id(value)]
        found |= {(name, *part) for part in enumerate(parts)}
    return found


def sampled(cases: list[set[Any]], times: int) -> set[int]:
    """Which of some cases (the values each has) to run: greedily, until each value has been met so often."""
    missing = {value: times for case in cases for value in case}
    kept: set[int] = set()
    while True:
        gain = [0 if i in kept else sum(missing[value] for value in case) for i, case in enumerate(cases)]
        best = max(range(len(cases)), key=gain.__getitem__)
        if not gain[best]:  # all are met, or there are no more cases
            return kept
        kept.add(best)
        for value in cases[best]:
            missing[value] = max(missing[value] - 1, 0)


class Pair(NamedTuple):
    """The same model twice: as transformers made it, and patched."""

    stock: Any
    patched: Any


def pytest_make_parametrize_id(config: pytest.Config, val: Any, argname: str) -> str | None:
    """Policies are named by their spec, lists of them (one per row) by all of theirs."""
    if isinstance(val, vtr.Policy):
        return val.spec
    if isinstance(val, list) and any(isinstance(v, vtr.Policy) for v in val):
        return "|".join(v.spec if isinstance(v, vtr.Policy) else str(v) for v in val)
    return None


def combinations() -> list[Any]:
    """Family × language model × attention; every other one is slow, so that each pair of the three is always run."""
    out = []
    for (i, family), (j, lm), (k, attn) in itertools.product(
        enumerate(tiny.FAMILIES), enumerate(tiny.LMS), enumerate(("sdpa", "eager"))
    ):
        out.append(pytest.param(f"{family}-{lm}-{attn}", marks=[pytest.mark.slow] * ((i + j + k) % 2)))
    return out


@pytest.fixture(scope="session", params=combinations())
def pair(request: pytest.FixtureRequest) -> Pair:
    """Family × language model × attention."""
    family, lm, attn = request.param.split("-")
    stock = getattr(tiny, family)(attn, lm=lm)
    return Pair(stock, vtr.patch(copy.deepcopy(stock)))


@pytest.fixture
def auto() -> Iterator[Any]:
    """``vtr.auto``, switched on for one test."""
    import vtr.auto

    vtr.auto.disable()
    vtr.auto.enable()
    yield vtr.auto
    vtr.auto.disable()


@pytest.fixture(scope="session")
def result_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result file of every kind, with made-up numbers; nobody writes into it."""
    from tests import result_files

    folder = tmp_path_factory.mktemp("results")
    result_files.write(folder)
    return folder


@pytest.fixture(scope="session")
def site(result_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HTML page made of them."""
    from vtr.eval.report import page

    out = tmp_path_factory.mktemp("site")
    page.write([result_folder], out)
    return out / "index.html"
