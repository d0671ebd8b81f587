"""What the two baselines that look at nothing share: a rank by place, in the decoder or before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtr.checks import check_before
from vtr.image import Image, Layout
from vtr.keep import keep_count, top
from vtr.score import ScorePolicy

if TYPE_CHECKING:
    import torch

    from vtr.base import Tokens


class Blind(ScorePolicy):
    """A subclass has a field ``before_decoder``: then it compresses each image instead of pruning its row."""

    before_decoder: bool

    def rank(self, y: torch.Tensor, x: torch.Tensor, layer: int) -> torch.Tensor:
        """[n] scores of tokens at these places (int64 [n] each), on entering ``layer``."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        super().__post_init__()
        check_before(self.before_decoder, self.layer)
        if self.before_decoder and self.share != "row":
            raise ValueError("before_decoder=true takes every image by itself as it is: leave out share")

    def asks(self, question: str) -> bool:
        return question == ("compress" if self.before_decoder else "prune")

    def score(self, tokens: Tokens) -> torch.Tensor:
        return self.rank(tokens.y, tokens.x, tokens.layer)

    def compress(self, image: Image) -> torch.Tensor:
        return top(self.rank(image.layout.y, image.layout.x, 0), self.kept_of(image.layout))

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps with ``before_decoder``."""
        return keep_count(self.keep, len(layout)) if self.before_decoder else super().kept_of(layout)
