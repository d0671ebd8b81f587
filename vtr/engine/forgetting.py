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
from vtr.engine.decode import answers, as_tensor, memo_on
from vtr.engine.packed import Packed
from vtr.engine.rows import Row
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
        self.memos = [[memo_on(memo, device) for memo in memos] for memos in self.memos]

    def drop(self, index: int, packed: Packed, hidden: torch.Tensor) -> torch.Tensor | None:
        """Decoded words: packed indices of what enters layer ``index``; None for all. Reads the device."""
        if self.given:
            return None
        kept = torch.ones(sum(packed.texts), dtype=torch.bool)
        texts = packed.texts[:]
        for i, (row, here) in enumerate(zip(packed.rows, packed.decoded(), strict=True)):
            answer = self._remembered(index, row, hidden[0], packed.text[here])
            if answer is not None:
                said = answer.tolist()
                kept[here] = torch.tensor(said)
                texts[i] -= said.count(False)
                self.memos[row.index] = [memo for memo, yes in zip(self.memos[row.index], said, strict=True) if yes]
        if bool(kept.all()):
            return None
        chosen = kept.nonzero().squeeze(1).to(hidden.device, non_blocking=hidden.is_cuda)
        return packed.forget(chosen, texts)

    def masked_keys(self, index: int, packed: Packed, hidden: torch.Tensor) -> torch.Tensor | None:
        """Words of a given answer: bool [T], those that layer ``index`` hides from all others; None for none."""
        if not self.given:
            return None
        masked = None
        for row, here in zip(packed.rows, packed.decoded(), strict=True):
            words = packed.text[here]
            answer = self._remembered(index, row, hidden[0], words)
            if answer is not None:
                masked = torch.zeros_like(hidden[0, :, 0], dtype=torch.bool) if masked is None else masked
                masked = masked.index_copy(0, words, ~answer)
        return masked

    def _remembered(self, index: int, row: Row, states: torch.Tensor, places: torch.Tensor) -> torch.Tensor | None:
        """bool [words of the row]; None if its policy is not asked. states: [T, D], where they stand at ``places``."""
        p = row.policy
        if p is None or not _may_forget(row) or not len(places):
            return None
        memos = self.memos[row.index]
        words = states.index_select(0, places)
        tokens, before = [Token(state, memo) for state, memo in zip(words, memos, strict=True)], version(words)
        said = answers(p, (p.remember_all if self.given else p.recall)(index, tokens), len(tokens))
        if version(words) != before:
            raise write_error(p, "remember", "token.hidden")
        self.trace.selector_flops += sum(token.flops for token in tokens)
        return torch.stack([as_tensor(a, states.device) for a in said])


def _may_forget(row: Row) -> bool:
    return len(row.text.decoded) > 0 and row.asks("remember")
