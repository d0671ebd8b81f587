"""The commands that a reader is told to try first give the right answer: no picture, no help text shows a wrong one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

import vtr
from tests.docs.test_docs import PAGES, ROOT, commands, commands_of
from vtr.chat import decode
from vtr.cli import app
from vtr.commands.run import in_full, mean_of, prepare, tokenize


def examples() -> dict[str, list[str]]:
    """Every `vtr run` with a shipped sample → where it stands: --help texts, README, docs, make."""
    found: dict[str, list[str]] = {}
    lines = [(page.name, words) for page in PAGES for words in commands(page)]
    for path, command in commands_of(typer.main.get_command(app)).items():
        shown = re.findall(r"`(vtr run [^`]+)`", (command.help or "").replace("\n", " "))
        lines += [(f"{' '.join(('vtr', *path))} --help", shlex.split(one)) for one in shown]
    lines += [("Makefile", shlex.split(one)) for one in re.findall(r"vtr run .*", (ROOT / "Makefile").read_text())]
    for where, words in lines:
        if words[:2] == ["vtr", "run"] and "--sample" in words:
            found.setdefault(shlex.join(words), []).append(where)
    return found


def options(line: str) -> dict[str, Any]:
    """What the command line makes of it."""
    command = commands_of(typer.main.get_command(app))["run",]
    return command.make_context("run", shlex.split(line)[2:]).params


@pytest.mark.parametrize(("line", "where"), examples().items())
def test_a_first_command_gives_the_right_answer(line: str, where: list[str]) -> None:
    """The answer that the command prints is the sample's, under the policy that it names."""
    from vtr.commands.run import at_budget

    given = options(line)
    asked = prepare(None, None, given["sample"], given["model"], "cpu")
    spec, mean = given["policy"], mean_of(given["budget"], given["policy"])
    spec = in_full(spec) if mean is None else at_budget(asked, spec, mean)
    before, policy = vtr.split(None if spec == "none" else spec)
    inputs = tokenize(asked.processor, asked.picture, asked.question, "cpu", before)
    with torch.inference_mode():
        out = asked.model.generate(**inputs, policy=policy, max_new_tokens=8, do_sample=False)
    said = decode(asked.processor, out, inputs["input_ids"].shape[1])[0]
    assert said == asked.answer, f"{line} says {said!r}, in {', '.join(where)}"


def test_first_commands_are_found() -> None:
    places = {place for where in examples().values() for place in where}
    assert {"vtr --help", "vtr run --help", "index.md", "Makefile"} <= places


def test_the_demo_fits_eighty_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is folded, no word broken, and right and wrong answers are marked."""
    monkeypatch.chdir(tmp_path)
    (line,) = (line for line, where in examples().items() if "Makefile" in where)
    shown = CliRunner().invoke(app, [*shlex.split(line)[1:], "--repeats", "1"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [words for words in map(str.split, lines) if "%" in " ".join(words)]
    assert [words[0].rstrip(",") for words in rows] == [
        "none", "fastv:keep=0.02", "random:keep=14", "uniform:keep=14",
    ]  # fmt: skip
    assert all(re.fullmatch(r"\w+ [✓✗] \d+% [\d.]+ [\d.]+× \S+ [\d.]+ \d+", " ".join(words[1:])) for words in rows)
    assert [words[2] for words in rows][:2] == ["✓", "✓"]
    assert sum("layer=2" in line.split() for line in lines) == 3, "a spec is broken at a comma alone"
    assert (tmp_path / "demo.png").stat().st_size > 10_000
