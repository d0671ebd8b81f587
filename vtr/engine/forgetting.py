"""Forgotten words where no cache leaves them out: a policy is asked about the words themselves, at every layer.

In decoding without a cache the words said so far come by at every step, and those not remembered are dropped. In a
forward over question and answer every word still says what follows it, so forgotten ones stay and are hidden from the
others. With a cache none of this is needed (``vtr/engine/decode.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtr.base import Token
from vtr.engine.checks import version, write_error
from vtr.engine.decode import answers, as_tensor, on_device
from vtr.engine.rows import Row, packed_indices, spans
from vtr.engine.trace import Trace


class Forgetting:
    """The words of one packed forward that policies may forget.

    Args:
        given: they are a given answer, not decoded ones that come by again.
    """

    def __init__(self, rows: Sequence[Row], given: bool, trace: Trace) -> None:
        self.given, self.trace = given, trace
        self.memos: list[list[dict[str, Any]]] = [[{} for _ in row.text.decoded] for row in rows]

    @classmethod
    def from_rows(cls, rows: Sequence[Row], given: bool, trace: Trace) -> Forgetting | None:
        """None if no word of any row may be forgotten."""
        may = any(map(_may_forget, rows))
        return cls(rows, given, trace) if may else None

    def to(self, device: torch.device) -> None:
        self.memos = [[on_device(memo, device) for memo in memos] for memos in self.memos]

    def drop(self, index: int, rows: Sequence[Row], hidden: torch.Tensor) -> torch.Tensor | None:
        """Decoded words: packed indices of what enters layer ``index``; None for all. Reads the device."""
        if self.given:
            return None
        kept: list[torch.Tensor | None] = []
        before = [row.length for row in rows]
        for row, here in spans(rows):
            keep = None
            answer = self._remembered(index, row, hidden[0, here])
            if answer is not None and not bool(answer.all()):
                keep = row.forget(answer)
                memos = zip(self.memos[row.index], answer.tolist(), strict=True)
                self.memos[row.index] = [memo for memo, remembered in memos if remembered]
            kept.append(keep)
        return None if all(keep is None for keep in kept) else packed_indices(kept, before, hidden.device)

    def masked_keys(self, index: int, rows: Sequence[Row], hidden: torch.Tensor) -> torch.Tensor | None:
        """Words of a given answer: bool [T], those that layer ``index`` hides from all others; None for none."""
        if not self.given:
            return None
        parts, found = [], False
        for row, here in spans(rows):
            masked = torch.zeros(row.length, dtype=torch.bool, device=hidden.device)
            answer = self._remembered(index, row, hidden[0, here])
            if answer is not None:
                masked, found = masked.index_copy(0, row.text.decoded, ~answer), True
            parts.append(masked)
        return torch.cat(parts) if found else None

    def _remembered(self, index: int, row: Row, states: torch.Tensor) -> torch.Tensor | None:
        """bool [words of the row]; None if its policy is not asked. states: [tokens of the row, D]."""
        p = row.policy
        if p is None or not _may_forget(row):
            return None
        memos = self.memos[row.index]
        words = states.index_select(0, row.text.decoded)
        tokens, before = [Token(state, memo) for state, memo in zip(words, memos, strict=True)], version(words)
        said = answers(p, (p.remember_all if self.given else p.recall)(index, tokens), len(tokens))
        if version(words) != before:
            raise write_error(p, "remember", "token.hidden")
        self.trace.selector_flops += sum(token.flops for token in tokens)
        return torch.stack([as_tensor(a, states.device) for a in said])


def _may_forget(row: Row) -> bool:
    return len(row.text.decoded) > 0 and row.asks("remember")
