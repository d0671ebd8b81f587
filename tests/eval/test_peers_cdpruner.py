"""OpenVINO GenAI's CDPruner beside ours: with made-up sides in this process."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from vtr.eval.peers import cdpruner
from vtr.eval.peers.channel import PeerError

import vtr


class Side:
    """Answers the questions' numbers; ours answers others where it prunes, but not with their words."""

    def __init__(self, ours: bool, fault: str = "") -> None:
        self.ours, self.fault, self.asked = ours, fault, 0

    def ask(self, do: str, timeout: float, index: int, method: str, steps: int, their_words: bool = False) -> Any:
        self.asked += 1
        if self.fault and method != cdpruner.NONE:
            raise PeerError(self.fault)
        other = self.ours and method != cdpruner.NONE and not their_words
        return {"ids": [index + 100 * other] * steps, "tokens": 60.0, "cpu_ms": 10.0 + steps}


def compare(theirs: Side, ours: Side, rounds: int) -> list[cdpruner.Row]:
    return cdpruner.compare(theirs, ours, 2, rounds, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pruned", "kept"), [("50", 72), ("75", 36), ("90", 14)])
def test_as_many_are_kept_as_theirs_rounds_to(pruned: str, kept: int) -> None:
    policy: Any = vtr.policy(cdpruner.ours_of(pruned))
    assert (policy.keep, policy.relevance) == (kept, "embeddings")
    assert cdpruner.ours_of(cdpruner.NONE) == cdpruner.NONE


def test_equal_answers_with_their_words_show_equal_tokens() -> None:
    rows = compare(Side(False), Side(True), rounds=1)
    assert [row.same_answers for row in rows] == [1.0, 0.0, 0.0, 0.0]
    assert [row.same_words_same_answers for row in rows] == [1.0] * 4
    assert rows[1].prefill_ms == rows[1].ours_prefill_ms == {"median": 11.0, "low": 11.0, "high": 11.0}
    assert rows[1].decode_ms == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_times_can_be_left_out_and_faults_are_shown() -> None:
    theirs = Side(False, fault="RuntimeError: pruning")
    rows = compare(theirs, Side(True), rounds=0)
    assert rows[0].error is None and rows[0].prefill_ms is None and rows[0].tokens == 60.0
    assert [row.error for row in rows[1:]] == ["RuntimeError: pruning"] * 3
    assert theirs.asked == 2 + 3
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(cdpruner.table(rows))
    assert console.export_text().count("fails") == 3
