"""What a policy answers inside the decoder, written down as the slow reference takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vtr.base import Attend, Best, Merged, Policy
from vtr.testing import dense


class Watched:
    """The answers that a policy gives to ``prune`` and ``attend`` from now on, of one row.

    They are written down as indices, and say nothing of how the engine acts on them. The states of merged tokens are
    taken as they were answered.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.pruned: dict[int, tuple[list[int], Merged | None]] = {}
        self.took_part: dict[int, Attend] = {}
        if policy.asks("prune"):
            self._watch_prune(policy.prune_all)
        if policy.asks("attend"):
            self._watch_attend(policy.attend)

    def _watch_prune(self, own: Any) -> None:
        def prune_all(layer: int, tokens: Any) -> Sequence[Any]:
            (answer,) = answers = own(layer, tokens)
            if answer is not None:
                kept = answer.indices() if isinstance(answer, Best) else answer
                made = answer if isinstance(answer, Merged) else None
                self.pruned[layer] = sorted((kept if made is None else made.keep).tolist()), made
            return answers  # type: ignore[no-any-return]

        self.policy.prune_all = prune_all  # type: ignore[method-assign]

    def _watch_attend(self, own: Any) -> None:
        def attend(layer: int, tokens: Any, attention: Any) -> Attend | None:
            answer = own(layer, tokens, attention)
            if answer is not None:
                self.took_part[layer] = answer
            return answer  # type: ignore[no-any-return]

        self.policy.attend = attend  # type: ignore[method-assign]

    def given(self, row: dense.Row, layers: int) -> dense.Given:
        """The run that these answers make of a row."""
        out, here, made = dense.Given([], self.policy.renumbers, {}, {}), row.slots, 0
        text = (~row.vision).nonzero().squeeze(1).tolist()
        for layer in range(layers):
            if layer in self.pruned:
                kept, merged = self.pruned[layer]
                stays = [here[i] for i in kept]
                if merged is not None and len(merged.states):
                    groups = [[here[i] for i in some] for some in merged.sources]
                    out.merged[layer] = dense.Made(groups, merged.states)
                    stays += range(made - 1, made - 1 - len(groups), -1)
                    made -= len(groups)
                here = stays
            out.kept.append(here)
            if (answer := self.took_part.get(layer)) is not None:
                mute = _left_out(text, answer.text)
                silent, unseen = _left_out(here, answer.asks), _left_out(here, answer.seen)
                out.attend[layer] = dense.Part(silent + mute, unseen + mute)
        return out


def _left_out(slots: list[int], chosen: Tensor | None) -> list[int]:
    """The slots but for the chosen ones (None: all are)."""
    within = set(range(len(slots))) if chosen is None else set(chosen.tolist())
    return [slot for i, slot in enumerate(slots) if i not in within]
