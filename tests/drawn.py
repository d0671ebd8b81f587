"""Policies that answer what is drawn, by seed, layer and number of tokens; what the slow reference makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import vtr
from tests import oracle
from vtr.base import Attend, Attention, Merged


def some(n: int, share: float, made: torch.Generator, least: int = 0) -> Tensor:
    """int64, ascending: so large a share of ``n``."""
    return torch.randperm(n, generator=made)[: max(int(n * share), min(least, n))].sort().values


def generator(seed: int, layer: int) -> torch.Generator:
    """What ``Tokens.generator`` says it is."""
    return torch.Generator().manual_seed(seed * 1009 + layer)


# ------------------------------------------------------------------------------------------------------ who takes part
@vtr.register_policy("parts-for-test")
@dataclass
class Parts(vtr.Policy):
    """In some layers drawn tokens ask, others are seen; of the text some too, where ``text`` is a share.

    itself: who asks is seen as well.
    """

    layers: Sequence[int] = (0, 1)
    asking: float | None = 0.5
    seen: float | None = 0.5
    text: float | None = None
    seed: int = 0
    itself: bool = True

    def attend(self, layer: int, tokens: Any, attention: Any) -> Attend | None:
        if layer not in self.layers:
            return None
        made, answer = tokens.generator(self.seed), []
        sizes = (len(tokens), len(tokens), len(tokens.text_place))
        for i, (share, n) in enumerate(zip((self.asking, self.seen, self.text), sizes, strict=True)):
            answer.append(None if share is None else some(n, share, made, int(i == 2)).to(tokens.place.device))
        if self.itself and answer[1] is not None:
            answer[1] = None if answer[0] is None else torch.cat(answer[:2]).unique()  # type: ignore[arg-type]
        return Attend(*answer)


# --------------------------------------------------------------------------------------------------------- new tokens
@vtr.register_policy("merges-for-test")
@dataclass
class Merges(vtr.Policy):
    """Before some layers a drawn share stays, and ``new`` tokens come in, each the mean of drawn ones."""

    layers: Sequence[int] = (1, 2)
    keep: float = 0.5
    new: int = 2
    anew: bool = False
    seed: int = 0

    question_guided: ClassVar[bool] = True
    """So that text stands behind the images: it is left open what a prompt says that ends in a new token."""

    @property
    def renumbers(self) -> bool:
        return self.anew

    def answer(self, layer: int, n: int) -> tuple[Tensor, list[list[int]]]:
        """Of ``n`` tokens those that stay, and what the new ones are made of."""
        made = generator(self.seed, layer)
        keep = some(n, self.keep, made, 1)
        new = min(self.new, n - len(keep))
        return keep, [some(n, 0.3, made, 1).tolist() for _ in range(new)]

    def prune(self, layer: int, tokens: Any) -> Merged | None:
        if layer not in self.layers:
            return None
        keep, sources = self.answer(layer, len(tokens))
        states = [tokens.hidden[torch.tensor(one)].mean(0) for one in sources]
        device = tokens.place.device
        return Merged(keep.to(device), torch.stack(states) if states else tokens.hidden[:0], sources)

    def given(self, row: oracle.Row, layers: int) -> tuple[oracle.Given, list[list[list[int]]]]:
        """The same for the slow reference, and of each layer's tokens which slots they were made from."""
        here, kept, merged, sources = row.slots, list[list[int]](), dict[int, oracle.Made](), list[list[list[int]]]()
        made_of = {slot: [slot] for slot in here}
        for layer in range(layers):
            if layer in self.layers and here:
                keep, groups = self.answer(layer, len(here))
                merged[layer] = oracle.Made([[here[i] for i in group] for group in groups])
                here = [here[i] for i in keep.tolist()]
                for group in merged[layer].groups:
                    here.append(min([0, *made_of]) - 1)
                    made_of[here[-1]] = sorted({slot for part in group for slot in made_of[part]})
            kept.append(here)
            sources.append([made_of[slot] for slot in here])
        return oracle.Given(kept, self.anew, merged), sources


# ------------------------------------------------------------------------------------------------------ what is asked
@vtr.register_policy("curious-drawn-for-test")
@dataclass
class Curious(vtr.Policy):
    """Asks for attention, ranks by the sum of all that comes, and writes down what did. Attention as (rows, heads,
    over) each; several at once; the rows called "drawn" are some of the text."""

    requests: Sequence[Sequence[str]] = (("text", "mean", "mean"),)
    layers: Sequence[int] = (1, 2)
    keep: float = 0.5
    seed: int = 0
    seen: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    question_guided: ClassVar[bool] = True

    def needs(self, layer: int) -> Any:
        if layer not in self.layers:
            return None
        asked = tuple(Attention(*request) for request in self.requests)  # type: ignore[arg-type]
        return asked if len(asked) > 1 else asked[0]

    def drawn(self, texts: int) -> Tensor:
        return some(texts, 0.5, generator(self.seed, 0))

    def prune(self, layer: int, tokens: Any) -> vtr.Best | None:
        if layer == 0:
            tokens.memo["drawn"] = self.drawn(len(tokens.text_place)).to(tokens.place.device)
        if layer not in self.layers:
            return None
        scores = tokens.scores if len(self.requests) > 1 else (tokens.scores,)
        self.seen[layer] = [one.clone() for one in scores]
        total = sum(one.reshape(-1, len(tokens)).sum(0) for one in scores)
        return vtr.Best(total, max(int(tokens.total * self.keep), 1))  # type: ignore[arg-type]

    def config(self) -> dict[str, Any]:
        return {name: value for name, value in super().config().items() if name != "seen"}

    def rows(self, name: str, row: oracle.Row, here: list[int]) -> list[int]:
        """The slots that a name of rows means."""
        text = (~row.vision).nonzero().squeeze(1).tolist()
        return {
            "last": text[-1:],
            "text": [slot for slot in text if slot > row.slots[0]],
            "behind": [slot for slot in text if slot > row.slots[-1]],
            "vision": here,
            "drawn": [text[i] for i in self.drawn(len(text)).tolist()],
        }[name]

    def expected(self, row: oracle.Row, want: oracle.Dense, layer: int) -> list[Tensor]:
        """What should come in ``layer``, by the slow reference's attention in the layer before."""
        here = want.kept[layer - 1]
        return [
            oracle.requested(want.paid[layer - 1], self.rows(rows, row, here), here, heads, over)
            for rows, heads, over in self.requests
        ]
