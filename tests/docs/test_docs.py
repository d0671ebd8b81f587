"""Every code block of the README and the docs: Python runs on the pocket model, commands of ours parse, links exist."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import vtr
from tests.versions import as_named_here
from vtr import settings
from vtr.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = {"search.md", "own-policy.md"}
SKIP = re.compile(r"<!-- not run: (.+?) -->\n+\Z")
"""Stands directly in front of a block that cannot run here, with the reason."""


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language, but for those that say why they cannot run."""
    text, out = page.read_text(), []
    for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.S | re.M):
        if not SKIP.search(text[: found.start()]):
            out.append(found.group(1))
    return out


def with_code(language: str) -> list[Any]:
    named = [(page, str(page.relative_to(ROOT))) for page in PAGES if blocks(page, language)]
    return [pytest.param(page, id=name, marks=[pytest.mark.slow] * (page.name in SLOW)) for page, name in named]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A reader's names: checkpoints of the hub are the pocket model, `prompts`, `images` and photo.jpg exist."""
    import transformers

    for name in ("AutoModelForImageTextToText", "AutoProcessor"):
        auto = getattr(transformers, name)
        original = auto.from_pretrained

        def local(folder: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            return original(vtr.pocket.WEIGHTS if str(folder).startswith("llava-hf/") else folder, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", local)
    stubs = {"vlmeval": {}, "vlmeval.vlm": {}, "vlmeval.vlm.base": {"BaseModel": type("BaseModel", (), {})}}
    stubs |= {"vlmeval.run": {"main": lambda: None}, "vlmeval.config": {"supported_VLM": {}}}
    for name, names in stubs.items():  # VLMEvalKit itself is tested in test_vlmevalkit.py
        module = types.ModuleType(name)
        module.__dict__.update(names, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.startswith("vtr.integrations.vlmevalkit")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))
    monkeypatch.chdir(tmp_path)
    model, processor = vtr.pocket.load()
    samples = [vtr.pocket.sample(i) for i in range(3)]
    samples[0][0].convert("RGB").save("photo.jpg")
    content = [{"type": "image"}]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": question}]}], add_generation_prompt=True
        )
        for _, question, _ in samples
    ]
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    inputs = processor(text=prompts, images=[[s[0]] for s in samples], padding=True, return_tensors="pt")
    given = {"model": model, "processor": processor, "prompts": prompts, "images": [s[0] for s in samples]}
    drawn = [(s["image"], s["question"], s["answer"]) for s in vtr.pocket.samples(72)]  # of nine pictures
    given |= {"data": drawn, "inputs": inputs}
    module.__dict__.update(given)
    return module.__dict__


@pytest.mark.parametrize("page", with_code("python"))
def test_python_blocks_run(page: Path, world: dict[str, Any]) -> None:
    """One after another, as a reader would type them."""
    for n, code in enumerate(map(as_named_here, blocks(page, "python"))):
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            exec(compile(code, f"{page.name}, Python block {n}", "exec"), world)


def commands(page: Path) -> list[list[str]]:
    """Every command line of the shell blocks, split into words."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", with_code("sh"))
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of `vtr …` exist and their values are of the right kind; modules and make's targets exist."""
    monkeypatch.chdir(tmp_path)
    targets = (ROOT / "Makefile").read_text()
    for words in commands(page):
        for name in (word for word in words if re.fullmatch(r"[\w/-]+\.(jpg|png|jsonl|py|json)", word)):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()
        if words[0] == "vtr":
            parse(words[1:])
        elif words[0] == "make":
            assert all(f"\n{target}:" in targets for target in words[1:]), words
        elif words[:2] == ["python", "-m"] and words[2].startswith("vtr."):
            assert importlib.util.find_spec(words[2]) is not None, words


def commands_of(group: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The command line's commands and groups, by what one types behind ``vtr``."""
    found = {path: group}
    for name, command in getattr(group, "commands", {}).items():
        found |= commands_of(command, (*path, name))
    return found


def parse(words: list[str]) -> None:
    """Let the command line read its arguments, without running it.

    Whatever library stands behind typer: a command is run whose functions do nothing.
    """
    program = typer.main.get_command(app)
    for command in commands_of(program).values():
        command.callback = lambda **kwargs: None
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            program.main(list(words), prog_name="vtr")
        except SystemExit as done:
            assert not done.code, f"vtr {shlex.join(words)}: {said.getvalue()}"


def test_the_command_line_is_really_read() -> None:
    parse(["run", "--sample", "1"])
    for wrong in (["runn"], ["run", "--sampel", "1"], ["run", "--sample", "one"], ["bench", "engine", "--smal"]):
        with pytest.raises(AssertionError):
            parse(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)", prose):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_page_is_in_the_navigation() -> None:
    """A page that no reader finds might as well not be there; tables of results are linked where they are spoken of."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    added = ("results/", "methods/")  # the docs' hook adds pages of methods
    missing = [name for name in pages if not name.startswith(added) and f": {name}\n" not in nav]
    assert not missing, f"put {missing} into mkdocs.yml's nav"


def test_a_block_is_left_out_only_with_a_reason() -> None:
    for page in PAGES:
        for reason in re.findall(r"<!-- not run:(.*?)-->", page.read_text()):
            assert len(reason.split()) >= 3, page
