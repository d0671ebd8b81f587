"""What notebooks show of reports, policies and schedules, and what terminals print; nothing gets through unescaped."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import vtr
from vtr import settings
from vtr.accounting import RowReport
from vtr.markup import Raw, stairs, table

EVIL = '<script>alert("1")</script>&'


class Read(HTMLParser):
    """Tags and text of a piece of HTML; fails where a tag is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += attrs

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def row(policy: str | None, counts: list[int], **more: Any) -> RowReport:
    return RowReport(policy, counts, counts[0], **more)


def report(*rows: RowReport) -> vtr.Report:
    return vtr.Report(list(rows), 3_000_000_000, 2_000_000_000, 1_000_000_000, 0, 2048, 4096, 1.25, 3)


def test_a_report_has_a_line_a_row_and_its_costs() -> None:
    seen = Read(report(row("fastv:keep=0.1", [744, 744, 74, 74]), row(None, [36, 36, 36, 36]))._repr_html_())
    assert seen.tags.count("tr") == 3 and seen.tags.count("svg") == 2 and seen.tags.count("rect") == 8
    for words in ("fastv:keep=0.1", "744 × 2, 74 × 2", "55.0%", "36 × 4", "none"):
        assert words in seen.words
    assert any("3.000 GFLOPs" in words and "2.0 KiB live" in words for words in seen.words)


def test_a_report_says_who_asked_where_that_is_something_else() -> None:
    seen = Read(report(row("ee-mllm", [8, 8], asked=[8, 0], seen=[8, 8]))._repr_html_())
    assert "asked" in seen.words and "8, 0" in seen.words and "seen" not in seen.words


@pytest.mark.parametrize("name", [name for name in vtr.list_policies() if not name.endswith("-for-test")])
def test_a_policy_shows_all_of_its_settings(name: str) -> None:
    policy = vtr.policy(vtr.policy_class(name).example())
    seen = Read(policy._repr_html_())
    if name == "chain":
        assert {"m3:tokens=36", "fastv:keep=0.5", "keep"} <= set(seen.words)
        return
    assert policy.spec in seen.words and set(policy.config()) <= set(seen.words)
    assert seen.tags.count("tr") == len(policy.config()) + 1


def test_a_schedule_is_a_bar_a_layer() -> None:
    schedule = vtr.Schedule([1.0, 1.0, 0.5, 36])
    seen = Read(schedule._repr_html_())
    assert seen.tags.count("rect") == 4
    assert schedule.table() == "4 layers: 1.0 × 2, 0.5, 36" and schedule.table() in seen.words


def test_whatever_a_name_or_a_docstring_holds_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))

    @vtr.register_policy("evil-policy")
    @dataclass
    class Evil(vtr.Policy):
        __doc__ = f"{EVIL}\n\nArgs:\n    word: {EVIL}\n"

        word: str = EVIL

    for html in (Evil()._repr_html_(), report(row(EVIL, [4, 4]))._repr_html_(), table([EVIL], [[EVIL]], EVIL, EVIL)):
        seen = Read(html)
        assert "script" not in seen.tags and any('<script>alert("1")' in words for words in seen.words)
    assert table([], [[Raw("<b>1</b>")]]).count("<b>") == 1


def test_stairs_are_as_high_as_what_they_count() -> None:
    seen = Read(stairs([10, 5, 0], 10))
    assert [value for name, value in seen.attributes if name == "height"][1:] == ["28.0", "14.0", "0.0"]
    assert dict(seen.attributes)["aria-label"] == "10 5 0"
    assert stairs([], 3) == "" and stairs([0, 0], 0) == ""  # of a prompt without pictures


def test_a_terminal_gets_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    done = report(row("fastv:keep=0.1", [744, 74]))
    vtr.display(done, vtr.policy("fastv:keep=0.1"), vtr.Schedule([1.0, 0.5]), torch.tensor(3))
    said = capsys.readouterr().out
    assert said.startswith(done.table() + "\nfastv:keep=0.1\n  ") and said.endswith("2 layers: 1.0, 0.5\ntensor(3)\n")


@pytest.mark.parametrize(("kernel", "rich"), [(object(), True), (None, False)])
def test_a_notebook_gets_html(
    kernel: Any, rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """IPython in a terminal has no kernel; a notebook's has one, and shows what has ``_repr_html_``."""
    shown: list[Any] = []
    ipython, inner = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=kernel)  # type: ignore[attr-defined]
    inner.display = lambda *things: shown.extend(things)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    policy = vtr.policy("m3:tokens=36")
    vtr.display(policy)
    assert shown == [policy] * rich and bool(capsys.readouterr().out) is not rich
