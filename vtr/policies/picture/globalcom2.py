"""GlobalCom² (Liu et al., AAAI 2026, arXiv 2501.05179): the thumbnail says how much of each crop stays, and what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import interpolate, normalize

from vtr.base import Policy, UnsupportedError
from vtr.checks import check_number
from vtr.image import Image, Layout, Pooled, remembered, stitch, tokens_at
from vtr.keep import best, keep_count
from vtr.settings import register_policy
from vtr.shares import apportion, ratio

TINIEST = 1e-9
"""Of no picture does a smaller share keep a whole token."""


@dataclass(frozen=True, eq=False)
class Crops:
    """Where the patches of an image's crops are. Per crop, in the order of the tokens.

    Attributes:
        tokens: int64 [n_j], indices into the image's tokens.
        places: int64 [n_j], indices into the crops' map (:func:`~vtr.image.stitch`), row by row.
        shape: (height, width) of that map.
        blocks: int64 [h * w], the crop that shows what each patch of the thumbnail shows.
    """

    tokens: list[torch.Tensor]
    places: list[torch.Tensor]
    shape: tuple[int, int]
    blocks: torch.Tensor


@remembered(1024)
def crops_of(layout: Layout) -> Crops:
    """The crops of an image that has some."""
    (rows, columns), (h, w) = layout.crops, layout.grid
    top, left, height, width = layout.window or (0, 0, rows * h, columns * w)
    mine = ((layout.newline == 0) & (layout.tile > 0)).nonzero().squeeze(1)
    crop = layout.tile[mine] - 1
    if layout.scaled is not None:  # tokens are the scaled map, row by row
        (height, width), place = layout.scaled, torch.arange(len(mine))
    else:
        y, x = crop // columns * h + layout.y[mine] - top, crop % columns * w + layout.x[mine] - left
        place = y * width + x
    which = [(crop == j).nonzero().squeeze(1) for j in range(rows * columns)]
    down = (torch.arange(h) // max(h // rows, 1)).clamp(max=rows - 1)
    across = (torch.arange(w) // max(w // columns, 1)).clamp(max=columns - 1)
    blocks = (down[:, None] * columns + across).flatten()
    return Crops([mine[i] for i in which], [place[i] for i in which], (height, width), blocks)


def ratios(thumbnail: torch.Tensor, crops: Crops, retention: float, temperature: float = 10.0) -> list[float]:
    """What share of each crop's tokens stays: more where the thumbnail's tokens score higher.

    ``r_j = min(R · (1 + w_j − mean(w)), 1)`` with w the softmax of the crops' summed thumbnail scores / temperature
    (the code's "adaptive compression adjustment", in float64).

    Args:
        thumbnail: float32 [h * w] scores.
    """
    sums = torch.zeros(len(crops.tokens), dtype=torch.float64).index_add_(0, crops.blocks, thumbnail.double())
    weights = ((sums - sums.max()) / temperature).exp()
    weights = weights / (weights.sum() + 1e-8)
    return (retention * (1 + weights - weights.mean())).clamp(max=1.0).tolist()


@register_policy("globalcom2")
@dataclass
class GlobalCom2(Policy):
    """Keep the tokens the vision tower's CLS token looks at: crops share the budget as the thumbnail says.

    The thumbnail keeps its own best. Each crop keeps a share that grows with what the thumbnail sees in its place; its
    tokens are ranked by their own score plus the thumbnail's at that spot, each L2-normalised over the crop. Newline
    tokens all stay. Images without crops (LLaVA-1.5, frames of a video) follow the thumbnail's rule alone. Towers
    without a CLS token are scored by dissimilarity to the mean token (the paper's variant for SigLIP, known from notes
    about it alone; which layer it takes is not known, ours is the projector's output). It never looks at the question.

    Args:
        retention: share of the patches that stay, a float in (0, 1]; at least one of a thumbnail and of a tile without
            crops. A crop may lose all of its own.
        placement: "true" leaves every token where it was. "official" repeats the published LLaVA-NeXT code: thumbnail
            tokens by score, crop tokens at places counted without padding, newlines for padding rows too, crop part
            rounded to float16.
        budget: "paper" rounds each crop's count down by itself. "exact" makes the crops together keep
            ``floor(patches · retention)``, at least one: the total is known from sizes alone (:meth:`kept_of`).
        temperature: of the softmax over crops; ``inf`` gives every crop the same share.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    retention: float = 0.25
    placement: Literal["true", "official"] = "true"
    budget: Literal["paper", "exact"] = "paper"
    temperature: float = 10.0

    wants: ClassVar[tuple[str, ...]] = ("cls",)

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """The share itself, of patches."""
        return {"retention": ratio(share)}

    def __post_init__(self) -> None:
        if not isinstance(self.retention, float):
            raise TypeError(f"retention must be a float, the share of tokens that stays, got {self.retention!r}")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, (int, float)):
            raise TypeError(f"temperature must be a number, got {self.temperature!r}")
        if isinstance(self.temperature, int):
            check_number(self.temperature, "temperature")  # one of hundreds of digits is no float
        if not 0.0 < self.retention <= 1.0:
            raise ValueError(f"retention={self.retention}: the share of tokens that stay lies above 0 and at most at 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0 (inf: every crop keeps the same share)")
        if self.placement not in ("true", "official"):
            raise ValueError(f"placement={self.placement!r}: choose 'true' or 'official'")
        if self.budget not in ("paper", "exact"):
            raise ValueError(f"budget={self.budget!r}: choose 'paper' or 'exact'")

    def compress(self, image: Image) -> torch.Tensor | Pooled:
        layout = image.layout
        scores = image.cls_attention().cpu()  # how many each crop keeps depends on them: the device is waited for
        if self.placement == "official" and (layout.crops == (0, 0) or layout.scaled or not layout.newline.any()):
            raise UnsupportedError(
                "placement='official' is the published code for LLaVA-NeXT: thumbnail, crops and newline tokens; "
                "for this image use placement='true'"
            )
        if layout.crops == (0, 0):
            chosen = best(scores, self._tile(scores.shape[1]))
            chosen = chosen + torch.arange(len(scores))[:, None] * scores.shape[1]
            return torch.cat([tokens_at(layout)[chosen.flatten()], layout.newline.nonzero().squeeze(1)])
        crops = crops_of(layout)
        thumbnail = tokens_at(layout)[best(scores[0], self._tile(scores.shape[1]))]
        ranked = self.rank(layout, scores)
        retention = max(self.retention, TINIEST)  # only their proportions matter down there
        counts = self.counts(ratios(scores[0], crops, retention, self.temperature), crops)
        kept = [order[:k] for order, k in zip(ranked, counts, strict=True)]
        if self.placement == "official":
            return official(image, thumbnail, kept)
        parts = [tokens[some] for tokens, some in zip(crops.tokens, kept, strict=True)]
        return torch.cat([thumbnail, *parts, layout.newline.nonzero().squeeze(1)])

    def rank(self, layout: Layout, scores: torch.Tensor) -> list[torch.Tensor]:
        """Per crop, its tokens best first (int64 [n_j], counted among that crop's tokens). scores: [tiles, h * w]."""
        crops = crops_of(layout)
        if 0 in crops.shape:
            return [torch.empty(0, dtype=torch.int64) for _ in crops.tokens]
        own = stitch(layout, scores[1:, :, None]).flatten()
        wide = interpolate(scores[0].view(1, 1, *layout.grid), crops.shape, mode="bilinear").flatten()
        return [best(normalize(own[at], dim=0) + normalize(wide[at], dim=0), len(at)) for at in crops.places]

    def counts(self, shares: list[float], crops: Crops) -> list[int]:
        """How many tokens each crop keeps, of its :func:`ratios`."""
        sizes = [len(tokens) for tokens in crops.tokens]
        if self.budget == "paper":
            return [int(n * r) for n, r in zip(sizes, shares, strict=True)]
        wanted = [n * r for n, r in zip(sizes, shares, strict=True)]
        return apportion(wanted, sizes, keep_count(self.retention, sum(sizes)))

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included: from its size alone, before any encoding.

        Raises:
            ValueError: the image has crops, and budget="paper" lets their scores decide how many stay.
        """
        n, newlines = layout.grid[0] * layout.grid[1], int(layout.newline.sum())
        if layout.crops == (0, 0):
            return self._tile(n) * layout.tiles + newlines
        if self.budget == "paper":
            raise ValueError("with budget='paper' the total depends on the picture: use budget='exact'")
        if self.placement == "official":
            newlines = layout.crops[0] * layout.grid[0]
        patches = len(layout) - int(layout.newline.sum()) - n
        return self._tile(n) + keep_count(self.retention, patches) + newlines

    def _tile(self, n: int) -> int:
        """What a thumbnail, or a tile without crops, of n tokens keeps: at least one."""
        return keep_count(self.retention, n, slack=0.0 if self.budget == "paper" else 1e-9)


def official(image: Image, thumbnail: torch.Tensor, kept: list[torch.Tensor]) -> Pooled:
    """Kept tokens put together as the published code does.

    A crop token goes to the cell of its rank among the crop's un-padded tokens (as if they filled its first rows), the
    canvas is read row by row, and every canvas row ends in a newline token, rows of padding too. The crop part is
    rounded to float16.

    Args:
        thumbnail: int64 [k], token indices, best first. kept: per crop, which of its tokens stay.
    """
    layout, crops, n = image.layout, crops_of(image.layout), len(image)
    assert image.newline is not None
    (rows, columns), (h, w) = layout.crops, layout.grid
    lines, width = rows * h, columns * w
    at, which = [], []
    for j, some in enumerate(kept):
        at.append((j // columns * h + some // w) * (width + 1) + j % columns * w + some % w)
        which.append(crops.tokens[j][some])
    at.append(torch.arange(lines) * (width + 1) + width)
    which.append(n + torch.arange(lines))  # the newline tokens, one a line
    body = torch.cat(which)[torch.cat(at).argsort()]
    features = torch.cat([image.features, image.newline.to(image.features)[None]])
    part = features.index_select(0, body.clamp(max=n).to(features.device)).half().to(features.dtype)
    made = torch.cat([features.index_select(0, thumbnail.to(features.device)), part])
    return Pooled(made, *_laid_out(layout, torch.cat([thumbnail, body])))


def _laid_out(layout: Layout, which: torch.Tensor) -> tuple[list[list[int]], Layout]:
    """Sources and layout of the tokens ``which``: of the image's own, and behind them one newline a canvas row."""
    (rows, columns), (h, w), n = layout.crops, layout.grid, len(layout)
    line = torch.arange(rows * h)
    tile = torch.cat([layout.tile, (line // h + 1) * columns])[which]
    y, x = torch.cat([layout.y, line % h])[which], torch.cat([layout.x, torch.full_like(line, w)])[which]
    newline = torch.cat([layout.newline, torch.ones_like(line)])[which]
    ends = layout.newline.nonzero().squeeze(1)
    own = dict(zip(((layout.tile[ends] - 1) // columns * h + layout.y[ends]).tolist(), ends.tolist(), strict=True))
    sources = [[i] if i < n else [own[i - n]] if i - n in own else [] for i in which.tolist()]
    return sources, Layout(tile, y, x, newline, layout.grid, layout.crops, groups=layout.groups)
