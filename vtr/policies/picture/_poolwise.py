"""What policies share that choose among all tokens of an image, or of a row, at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vtr.base import Policy
from vtr.image import Image, Layout
from vtr.keep import Keep, check_keep, keep_count

Pool = Literal["image", "row"]


@dataclass
class Poolwise(Policy):
    """Base of policies for which all patches of a pool compete, of whichever tile. Newline tokens all stay.

    A method is a subclass with a :meth:`choose`.

    Args:
        keep: patches of the pool that stay: a ratio (float; above 0 at least one), or a count (int).
        pool: "image" lets each image keep its own share; "row" lets all images of a row share one budget, so that how
            many stay of each depends on what they show.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.25
    pool: Pool = "image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.pool not in ("image", "row"):
            raise ValueError(f"pool={self.pool!r}: choose 'image' or 'row'")

    def choose(self, images: Sequence[Image], candidates: list[torch.Tensor], count: int) -> torch.Tensor:
        """int64 [count]: who stays, counted among the ``candidates`` of all images one behind the other.

        Args:
            candidates: int64 [n_i] on the CPU, those tokens of each image that compete.
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose()")

    def candidates(self, layout: Layout) -> torch.Tensor:
        """int64 [n]: the tokens that compete; the others stay."""
        return (layout.newline == 0).nonzero()[:, 0]

    def count(self, n: int) -> int:
        """How many of n candidates stay."""
        return keep_count(self.keep, n)

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included.

        Raises:
            ValueError: pool="row", so it depends on what the other images show.
        """
        if self.pool == "row":
            raise ValueError("with pool='row' how many stay of one image depends on the others: use pool='image'")
        n = len(self.candidates(layout))
        return len(layout) - n + self.count(n)

    def compress(self, image: Image) -> torch.Tensor:
        return self._stay([image])[0]

    def compress_row(self, images: Sequence[Image]) -> list[torch.Tensor]:
        """One answer an image: int64 indices."""
        if self.pool == "row":
            return self._stay(images)
        return [self.compress(image) for image in images]

    def _stay(self, images: Sequence[Image]) -> list[torch.Tensor]:
        candidates = [self.candidates(image.layout) for image in images]
        sizes = [len(some) for some in candidates]
        chosen = torch.zeros(sum(sizes), dtype=torch.bool)
        chosen[self.choose(images, candidates, self.count(sum(sizes))).cpu()] = True
        out = []
        for image, some, mine in zip(images, candidates, chosen.split(sizes), strict=True):
            stays = torch.ones(len(image), dtype=torch.bool)
            stays[some] = mine
            out.append(stays.nonzero()[:, 0])
        return out


def features_of(images: Sequence[Image], candidates: list[torch.Tensor]) -> torch.Tensor:
    """[n, hidden_size]: the candidates' features, of all images one behind the other."""
    parts = [
        image.features if len(some) == len(image) else image.features.index_select(0, some.to(image.features.device))
        for image, some in zip(images, candidates, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
