"""What nobody runs on one's own machine: workflows, packaging, versions, templates. They name only what there is."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import vtr
from vtr import settings

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SCRIPTS = [ROOT / "Makefile", *(path for path in (ROOT / ".ci").iterdir() if path.is_file() and path.suffix != ".py")]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def jobs() -> list[Any]:
    return [
        pytest.param(job, id=f"{path.stem}-{name}") for path in WORKFLOWS for name, job in read(path)["jobs"].items()
    ]


def check_command(line: str) -> None:
    """Scripts, targets of make, extras and tests that a shell command names are there."""
    words = shlex.split(line, comments=True)
    if words and words[0] == "make":
        known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(known), line
    for at, word in enumerate(words):
        word = word.removeprefix("@")
        if word.startswith(".ci/"):
            path = ROOT / word
            assert path.is_file() and (path.suffix == ".py" or os.access(path, os.X_OK)), line
        if word == ".ci/setup" and len(words) > at + 2:
            assert set(words[at + 2].split(",")) <= set(EXTRAS), line
        if re.fullmatch(r"tests/[\w/]+\.py", word):
            assert (ROOT / word).is_file(), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_what_it_needs(path: Path) -> None:
    flow = read(path)
    assert flow["name"] and flow[True]  # YAML reads "on" as True
    assert flow["permissions"] == {"contents": "read"}
    assert flow["concurrency"]["group"] and "cancel-in-progress" in flow["concurrency"]
    for job in flow["jobs"].values():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(flow["jobs"])


@pytest.mark.parametrize("job", jobs())
def test_a_job_names_only_what_there_is(job: dict[str, Any]) -> None:
    if called := job.get("uses"):
        assert "workflow_call" in read(ROOT / called)[True]
        return
    assert job["runs-on"] and job["timeout-minutes"] <= 60
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"(actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1)", step["uses"])
        for line in step.get("run", "").splitlines():
            check_command(line)


def test_only_publishing_may_write() -> None:
    writes = {(path.stem, name): {k for k, v in job.get("permissions", {}).items() if v == "write"}
              for path in WORKFLOWS for name, job in read(path)["jobs"].items()}  # fmt: skip
    assert {key: found for key, found in writes.items() if found} == {
        ("docs", "deploy"): {"pages", "id-token"},
        ("release", "publish"): {"id-token"},
    }


def test_a_release_is_of_what_was_tested() -> None:
    """Tags alone are published, after all of CI, from the files that it built."""
    flow = read(ROOT / ".github/workflows/release.yml")
    assert flow[True] == {"push": {"tags": ["v*"]}}
    jobs = flow["jobs"]
    assert jobs["publish"]["needs"] == "ci" and jobs["ci"]["needs"] == "check"
    assert jobs["publish"]["environment"]["name"] == "pypi"
    fetched = next(step["with"] for step in jobs["publish"]["steps"] if "download-artifact" in step["uses"])
    built = read(ROOT / jobs["ci"]["uses"])["jobs"]["wheel"]["steps"]
    assert next(s["with"]["name"] for s in built if "upload-artifact" in s.get("uses", "")) == fetched["name"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_name_only_what_there_is(path: Path) -> None:
    for line in path.read_text().splitlines():
        line = line.strip()
        if re.match(r"@?(make|\.ci/|\.venv/bin/python -m (pytest|mypy))", line):
            check_command(line.rstrip("\\"))


def test_pythons_agree() -> None:
    """Those of the workflow are those of the classifiers; the oldest is what all tools are set to."""
    matrix = read(ROOT / ".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    said = [found[1] for c in PROJECT["project"]["classifiers"] if (found := re.search(r"Python :: (3\.\d+)", c))]
    assert matrix["python"] == said
    assert PROJECT["project"]["requires-python"] == f">={said[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == said[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + said[0].replace(".", "")
    assert matrix["transformers"] == ["oldest", "newest"]


def setup(folder: Path, transformers: str) -> tuple[int, str]:
    """.ci/setup on an environment whose python only notes what it was asked to do: (exit code, what pip was told)."""
    python = folder / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {folder}/log\n')
    python.chmod(0o755)
    given = {**os.environ, "TRANSFORMERS": transformers, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / ".ci/setup", folder / "venv", "dev"], env=given, capture_output=True, check=False)
    log = folder / "log"
    return done.returncode, log.read_text() if log.exists() else ""


def test_the_oldest_transformers_is_what_pyproject_admits(tmp_path: Path) -> None:
    wanted = next(r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "transformers")
    bound = next(one.version for one in wanted.specifier if one.operator == ">=")
    code, told = setup(tmp_path / "oldest", "oldest")
    assert code == 0 and told.endswith(f"install -e .[dev] transformers=={bound}\n")
    code, told = setup(tmp_path / "newest", "newest")
    assert code == 0 and told.endswith("install -e .[dev]\n")
    assert setup(tmp_path / "wrong", "oldset") == (1, "")


# -- versions, addresses, packages -------------------------------------------------------------------------------------
def release(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci/release.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_release_needs_one_version_and_its_own_address() -> None:
    address = PROJECT["project"]["urls"]["Repository"]
    assert "version" in PROJECT["project"]["dynamic"]
    assert release(f"v{vtr.__version__}", "--repository", address).returncode == 0
    other = release("v99.0", "--repository", "https://github.com/someone/else")
    assert other.returncode == 1
    for what in ("vtr/__init__.py", "CITATION.cff names", "CHANGELOG.md", "pyproject.toml says", "CITATION.cff says"):
        assert what in other.stderr
    assert "the tag names no version" in release(vtr.__version__).stderr


def test_every_package_is_in_the_wheel() -> None:
    folders = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
    found = set()
    for name, folder in {"vtr": ROOT / "vtr", **folders}.items():
        inside = [path.parent.relative_to(folder).parts for path in folder.rglob("__init__.py")]
        found |= {".".join((name, *parts)) for parts in inside}
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["vtr"] and (ROOT / "vtr/py.typed").exists()


def test_nobody_is_sent_to_a_package_that_is_not_there_yet() -> None:
    """Before the first release on PyPI one installs a clone."""
    for folder in ("docs", "notebooks", "vtr", "integrations", "eval", "examples", "README.md", "tests"):
        for path in [ROOT / folder, *(ROOT / folder).rglob("*")]:
            if path.suffix in (".md", ".py", ".ipynb", ".toml") and path != Path(__file__):
                for wrong in re.findall(r"pip install [^\n]*vision-token-reduction[^\n]*", path.read_text()):
                    assert "git+https" in wrong, f"{path}: {wrong}"


def test_messages_ask_for_what_the_extras_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtr.commands import serve
    from vtr.training import loop

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match="the gate needs uvicorn") as gate:
        serve._gate_alone("http://127.0.0.1:1", 1, "127.0.0.1", 1)
    assert shlex.split(str(gate.value).partition("pip install ")[2]) == EXTRAS["serve"]
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="accelerate") as train:
        loop.run(None, [], "out", None)  # type: ignore[arg-type]
    assert shlex.split(str(train.value).partition("pip install ")[2]) == EXTRAS["train"]


# -- types, templates --------------------------------------------------------------------------------------------------
def test_the_typed_script_names_all_that_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its types are mypy's to check (.ci/run); .ci/wheel runs the whole of it."""
    path = ROOT / "tests/public_api.py"
    named = set(re.findall(r"\bvtr\.(\w+)", path.read_text()))
    assert set(vtr.__all__) <= named
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))  # what it registers goes again
    script = runpy.run_path(str(path))
    assert len(script["policies"]()) == 53 and len(script["schedules"]()) == 3
    assert "no model family" in script["refused"]()


def test_what_is_not_public_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        vtr.serach  # noqa: B018


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_ask(name: str) -> None:
    form = read(ROOT / f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"] and form["description"]
    asked = {part["id"]: part for part in form["body"] if part["type"] != "markdown"}
    assert all(part["attributes"]["label"] for part in asked.values())
    if name == "bug":
        assert set(asked) >= {"model", "policy", "script", "versions"}
        assert all(part["validations"]["required"] for part in asked.values())
        code = re.search(r'python -c "(.+?)"', asked["versions"]["attributes"]["description"])
        assert code is not None
        exec(code[1], {})


def test_hooks_before_a_commit_run_what_ci_runs() -> None:
    hooks = [hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    ours = {hook["id"]: hook["entry"] for hook in hooks if "entry" in hook}
    assert set(ours) == {"ruff", "ruff-format", "mypy"}
    for entry in ours.values():
        check_command(entry)
    assert {"end-of-file-fixer", "check-added-large-files"} <= {hook["id"] for hook in hooks}
