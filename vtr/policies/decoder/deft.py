"""DeFT (Kang et al., arXiv 2609.34861): the tower chooses more tokens than wanted, the text of those, midway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from vtr.base import Attention, Best, Tokens
from vtr.checks import check_layer, check_number, check_on_continue
from vtr.image import Image, Layout, cell
from vtr.keep import Keep, check_keep, top
from vtr.policies.decoder._stages import Staged
from vtr.policies.picture._saliency import saliency
from vtr.settings import register_policy
from vtr.shares import ratio

MEMO = "deft"


def counts(total: int, keep: Keep, alpha: float) -> tuple[int, int]:
    """(candidates, kept) of ``total`` tokens, rounded as the official code does; a ratio above 0 keeps at least one."""
    kept = max(round(total * keep), int(keep > 0)) if isinstance(keep, float) else keep
    kept = min(kept, total)
    return min(total, kept + math.ceil(alpha * (total - kept))), kept


def exposed(received: torch.Tensor, place: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """float32 [n]: attention got of text rows, over what it would get if every row looked evenly at what it sees.

    Args:
        received: float32 [n], the sum over text rows. place: int64 [n], where the tokens stand in the row. text: int64
            [t], where text does, ascending.
    """
    even = (1.0 / (text + 1)).flip(0).cumsum(0).flip(0)
    behind = torch.cat([even, even.new_zeros(1)]).index_select(0, torch.searchsorted(text, place))
    return received / (behind + 1e-8)


@register_policy("deft")
@dataclass
class DeFT(Staged):
    """The tower chooses more tokens than wanted before the decoder; at its middle the text looks, and chooses of those.

    DeFT (arXiv 2609.34861). K of N tokens are wanted, K + alpha · (N − K) enter the decoder: those that get most
    attention in the vision tower, the sum over all queries of its last layer, or what the CLS token pays in the last
    but one where there is one. From the middle layer on the K stay that the text looked at most in the layer before,
    mean over heads. Positions stay. Differs from the official code: each image has its own K (the same for one image),
    newline tokens all stay and are not counted, and tokens are chosen once, not again at every decoded token. A budget
    compares with one cut that leaves the mean of both counts.

    With ``first="none"`` any compressor may stand in front: ``visionzip:0.3+deft:keep=0.5,first=none``.

    Args:
        keep: tokens that stay in the end, of each image: a ratio (float) or a count (int). With ``first="none"``: of
            the row's tokens that enter the decoder, newlines too.
        alpha: which share of the others goes along to the middle, in [0, 1].
        layer: the decoder layer before which the text chooses; None for the middle one.
        first: "tower", or "none": nothing is chosen before the decoder.
        pool: "image": budgets are each image's own. "request": one budget for all images of a row (published code).
        score: "exposure" divides what a token gets by what it would get of evenly looking text (published code), so
            that of several images the first is not preferred; "sum" does not (paper). Of one image both are the same.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.2
    alpha: float = 0.2
    layer: int | None = None
    first: Literal["tower", "none"] = "tower"
    pool: Literal["image", "request"] = "image"
    score: Literal["exposure", "sum"] = "exposure"
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True
    layers = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not 0 <= check_number(self.alpha, "alpha") <= 1:
            raise ValueError(f"alpha={self.alpha} is the share of the other tokens that goes along: choose 0…1")
        if self.layer is not None:
            check_layer(self.layer, 1, "the text chooses by attention of the layer before: choose at least 1")
        for name, known in (
            ("first", ("tower", "none")),
            ("pool", ("image", "request")),
            ("score", ("exposure", "sum")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, known))}")
        check_on_continue(self.on_continue)

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("attentions[-2]", "attentions[-1]") if self.first == "tower" else ()

    def asks(self, question: str) -> bool:
        return super().asks(question) and (question != "compress" or self.first == "tower")

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """The text chooses in the middle, or in ``layer``; of small budgets fewer go along."""
        at = num_hidden_layers // 2 if layer is None else layer
        part = at / num_hidden_layers
        alpha = ratio(min(cls.alpha, share))
        keep = ratio((share - part * alpha) / (1 - part * alpha))
        return {"keep": keep, "alpha": alpha, "layer": layer}

    # -- before the decoder ----------------------------------------------------------------------------------------
    def kept_of(self, layout: Layout) -> int:
        """How many tokens of an image of this layout enter the decoder, newlines included."""
        if self.first == "none" or self.pool == "request":
            return super().kept_of(layout)
        newlines = int(layout.newline.sum())
        return counts(len(layout) - newlines, self.keep, self.alpha)[0] + newlines

    def compress(self, image: Image) -> torch.Tensor:
        return self._chosen([image])[0]

    def compress_row(self, images: Sequence[Image]) -> list[torch.Tensor]:
        if self.pool == "request":
            return self._chosen(images)
        return [self.compress(image) for image in images]

    def _chosen(self, images: Sequence[Image]) -> list[torch.Tensor]:
        """Of images with one budget: the candidates and the newline tokens of each."""
        patches = [(image.layout.newline == 0).nonzero().squeeze(1) for image in images]
        pairs = zip(images, patches, strict=True)
        scores = torch.cat([_looked_at(image).cpu()[cell(image.layout)[mine]] for image, mine in pairs])
        candidates, kept = counts(len(scores), self.keep, self.alpha)
        chosen = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, top(scores, candidates), True)
        for image, wanted in zip(images, [kept, *[0] * (len(images) - 1)], strict=True):
            image.memo.setdefault(MEMO, {})[image.index] = wanted, int(image.layout.newline.sum())
        parts = zip(images, patches, chosen.split([len(mine) for mine in patches]), strict=True)
        return [torch.cat([mine[stay], image.layout.newline.nonzero().squeeze(1)]) for image, mine, stay in parts]

    # -- inside it -------------------------------------------------------------------------------------------------
    def cuts(self, num_hidden_layers: int) -> list[int]:
        return [num_hidden_layers // 2 if self.layer is None else self.layer]

    def check(self, num_hidden_layers: int) -> None:
        if num_hidden_layers < 2:
            raise ValueError("the text chooses between two halves of the decoder, which has only one layer")
        super().check(num_hidden_layers)

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        """How many enter each layer, with ``first="none"``; else it depends on how many there were before."""
        if self.first == "tower":
            raise ValueError(
                f"{self.spec} keeps a share of what there was before the decoder: its report says how many"
            )
        cut, kept = self.cuts(num_hidden_layers)[0], counts(total, self.keep, 0)[1]
        return [total if layer < cut else kept for layer in range(num_hidden_layers)]

    def entering_of(self, num_hidden_layers: int, layout: Layout) -> list[int]:
        if self.first == "none":
            return super().entering_of(num_hidden_layers, layout)
        newlines, cut = int(layout.newline.sum()), self.cuts(num_hidden_layers)[0]
        candidates, kept = counts(len(layout) - newlines, self.keep, self.alpha)
        return [(candidates if layer < cut else kept) + newlines for layer in range(num_hidden_layers)]

    def needs(self, layer: int) -> Attention | None:
        return Attention("text", over="sum") if self.acts(layer) else None

    def prune(self, layer: int, tokens: Tokens) -> Best | None:
        if layer not in self.cuts(tokens.num_hidden_layers) or tokens.scores is None:
            return None
        noted: dict[int, tuple[int, int]] | None = tokens.memo.get(MEMO)
        kept, newlines = counts(tokens.total, self.keep, 0)[1], 0
        if noted is not None:
            kept, newlines = (sum(numbers) for numbers in zip(*noted.values(), strict=True))
        if kept + newlines >= len(tokens):
            return None
        scores: torch.Tensor = tokens.scores
        if self.score == "exposure":
            scores = exposed(scores, tokens.place, tokens.text_place)
        if newlines:
            scores = scores.masked_fill(tokens.newline.bool(), torch.finfo(scores.dtype).max)
        return Best(scores, kept + newlines)


def _looked_at(image: Image) -> torch.Tensor:
    """float32 [tiles * h * w]: attention that each patch gets; of all queries of its tile the sum."""
    scores = saliency(image.tower, -2, without_cls=-1)
    assert image.tower is not None
    return (scores if image.tower.has_cls else scores * scores.shape[1]).flatten()
