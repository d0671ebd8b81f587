"""What an accepted try has said beyond its first token: ``generate`` gets it without another forward.

The keys and values of these tokens are in the cache already. As long as ``generate`` says the same tokens, its steps
get the try's states; at the first other one (sampling, a penalty, beams that change places) what it did not say is
taken out of the cache, and the steps run as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vtr.engine.once import from_host

if TYPE_CHECKING:
    from vtr.engine.cache import RaggedLayer
    from vtr.engine.trace import Trace


@dataclass(frozen=True, eq=False)
class Drafted:
    """The rows of one try that were accepted.

    Attributes:
        rows: which of the batch. at: their places in the try.
        said: int64 [rows of the try, t]. there: bool likewise, False behind a row's end.
        following: of each token that was read, the text model's output, [rows of the try, 1, D].
        over: whether all of these rows have ended.
    """

    rows: Sequence[int]
    at: Sequence[int]
    said: torch.Tensor
    there: torch.Tensor
    following: Sequence[torch.Tensor]
    over: bool


class Ahead:
    """The rows of a ragged cache that holds more tokens than ``generate`` has said; stands in its state's ``decoding``.

    Args:
        module: the text model. layers: of the cache. drafts: every row of the batch is in one of them.
        fields: what else is in the text model's output. pad: the id that rows get when they have ended.
    """

    def __init__(
        self, module: Any, layers: list[RaggedLayer], drafts: Sequence[Drafted], fields: Mapping[str, Any], kind: type,
        pad: int, trace: Trace,
    ) -> None:  # fmt: skip
        self.module, self.layers, self.drafts, self.trace = module, layers, drafts, trace
        self.fields, self.kind, self.done = fields, kind, 0
        self.rows = sum(len(draft.rows) for draft in drafts)
        device = drafts[0].said.device
        self.order = torch.argsort(from_host([row for draft in drafts for row in draft.rows], device))
        self.places = [from_host(list(draft.at), device) for draft in drafts]
        going_on = [draft for draft in drafts if not draft.over]
        self.steps = min(map(_read, going_on)) if going_on else max(map(_read, drafts))
        self.expected = [self._expected(j, pad) for j in range(self.steps)]
        taken = {row: _read(draft) for draft in drafts for row in draft.rows}
        self.base = [[n - taken[row] for row, n in enumerate(layer.lengths())] for layer in layers]

    def _expected(self, j: int, pad: int) -> torch.Tensor:
        """int64 [rows]: what ``generate`` feeds into its step ``j`` if it says what the tries have said."""
        parts = []
        for draft, at in zip(self.drafts, self.places, strict=True):
            if j >= draft.said.shape[1]:
                parts.append(torch.full((len(at),), pad, device=draft.said.device))
                continue
            said = torch.where(draft.there[:, j], draft.said[:, j], pad)
            parts.append(said.index_select(0, at))
        return torch.cat(parts).index_select(0, self.order)

    # -- as what goes on in a cache ------------------------------------------------------------------------------------
    def taken(self) -> int:
        """Tokens that ``generate`` has said again."""
        return self.done

    def thaw(self) -> None:
        """Take what it has not said out of the cache, which goes on as any."""
        state, done = self.layers[0].state, self.done
        state.decoding = None
        state.logical += done
        state.tail += done
        for layer, base in zip(self.layers, self.base, strict=True):
            held = layer.lengths()
            left = [min(n, first + done) for n, first in zip(held, base, strict=True)]
            if left != held:
                layer._set_lengths(left)
            layer.record_past = False
            layer.tidy()

    def reorder(self, beam_idx: Any) -> None:
        """Beams change places: the cache goes on as any."""
        self.thaw()
        self.layers[0].reorder_cache(beam_idx)

    # -- steps -----------------------------------------------------------------------------------------------------
    def says(self, embeds: torch.Tensor) -> bool:
        """Whether these are the embeddings, [rows, 1, D], of the tokens that the tries have said next."""
        if self.done >= self.steps or embeds.shape[:2] != (self.rows, 1):
            return False
        mine = self.module.get_input_embeddings()(self.expected[self.done][:, None])
        return torch.equal(mine.to(embeds), embeds)

    def __call__(self) -> Any:
        """The text model's output of the step that has just been found to say the same."""
        j, parts = self.done, []
        for draft, at in zip(self.drafts, self.places, strict=True):
            states = draft.following[min(j, len(draft.following) - 1)] if draft.following else None
            states = self._none(draft) if states is None else states
            parts.append(states.index_select(0, at))
        self.done += 1
        self.trace.decode_steps += 1
        if self.done == self.steps:
            self.thaw()
        states = torch.cat(parts).index_select(0, self.order)
        return self.kind(**{**self.fields, "last_hidden_state": states})

    def _none(self, draft: Drafted) -> torch.Tensor:
        """States of rows that ended with their first token: nobody reads them."""
        like = next(d.following[0] for d in self.drafts if d.following)
        return like.new_zeros(len(draft.said), *like.shape[1:])


def _read(draft: Drafted) -> int:
    """How many tokens of its answers a try has read."""
    return len(draft.following)
