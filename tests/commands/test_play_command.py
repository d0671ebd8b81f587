"""``vtr play``: what is refused before a model is loaded, and who may name files."""

from __future__ import annotations

import importlib.util
import shlex
import socket
import sys
import types
from typing import Any

import pytest
from typer.testing import CliRunner

import vtr.play.ask
from tests.test_project import EXTRAS
from vtr.cli import app


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Gradio is there, and nothing is served: how the player was made, and what would be launched."""
    seen: dict[str, Any] = {}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "gradio" else find(name))

    class Player:
        name = "pocket"

        def __init__(self, *args: Any, **more: Any) -> None:
            seen["player"] = (*args, more)

    page = types.ModuleType("vtr.play.page")
    page.build = lambda player: player  # type: ignore[attr-defined]
    page.launch = lambda *args, **more: seen.update(launched=(*args[1:], more))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vtr.play.page", page)
    monkeypatch.setattr(vtr.play.ask, "Player", Player)
    return seen


@pytest.fixture
def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["play", *words])


@pytest.mark.parametrize(
    ("words", "files"),
    [([], True), (["--host", "localhost"], True), (["--host", "0.0.0.0"], False), (["--share"], False)],
)
def test_files_may_be_named_where_nobody_else_can_reach_it(
    words: list[str], files: bool, started: dict[str, Any], port: str
) -> None:
    done = run("--port", port, "--time-limit", "7", "--max-upload-mb", "3", "--device", "cpu", *words)
    assert done.exit_code == 0, done.output
    assert started["player"] == (None, "cpu", None, 7.0, {"files": files})
    host = words[1] if len(words) > 1 else "127.0.0.1"
    assert started["launched"] == (host, int(port), bool(words == ["--share"]), 3, {"quiet": words != ["--share"]})


def test_the_message_asks_for_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    done = run()
    assert done.exit_code == 1
    assert shlex.split(done.stderr.partition("pip install ")[2]) == EXTRAS["play"]


def test_a_port_that_is_taken_is_refused_first(started: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("--port", str(taken.getsockname()[1]))
    assert done.exit_code == 1 and "another program listens there" in done.stderr and not started


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "poket"], "did you mean pocket?"),
        (["--model", "/"], "holds no config.json"),
        (["--dtype", "float8"], "choose one of float32"),
        (["--device", "gpu"], "no device: choose cpu"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_what_to_do(
    words: list[str], message: str, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "gradio" else find(name))
    done = run("--port", port, *words)
    assert done.exit_code == 1 and message in done.stderr and "Traceback" not in done.output
